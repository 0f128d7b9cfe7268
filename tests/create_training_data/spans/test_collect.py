"""Spans against loops over texts, tokens and latents; and the same files whatever the sizes, processes and stops."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers.create_training_data.annotation.tables import escape, read_annotations
from sae_transformers.create_training_data.spans.collect import SpanCollector, Spans
from sae_transformers.create_training_data.spans.files import TextSpan, read_spans, write_features, write_lines
from sae_transformers.create_training_data.spans.settings import SpanSettings
from sae_transformers.create_training_data.spans.tokens import span_bounds, text_tokens
from sae_transformers.create_training_data.spans.top_examples import SpanHeap, add_hidden
from sae_transformers.latents.texts import TextSource, rows_of_list
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import tiny_base, tiny_model, tiny_sae

FILES = ("spans.parquet", "spans.tsv", "features.tsv", "spans.json")
SMALL: dict[str, Any] = {"max_length": 24, "top_n": 3, "window": 4, "rows_per_block": 4, "tokens_per_batch": 40}


@pytest.fixture(scope="module")
def base() -> Any:
    """In float64, so that the size of a batch does not show in float32 scores."""
    return tiny_base(dtype=torch.float64)


def sae_for(**settings: Any) -> Any:
    return tiny_sae(dtype=torch.float64, **{"layer": 1, "site": "resid_post", **settings})


def texts() -> list[str]:
    """With empty ones, one of a word, one that is too long, and ones that are the same."""
    found = word_texts(15, longest=14)
    return [*found[:6], "", "w3", " \n", found[2], " ".join(word_texts(1, 40, 40)), *found[6:], found[0]]


def run(base: Any, sae: Any, rows: list[str], out: Path | None = None, **settings: Any) -> Spans:
    chosen = SpanSettings(**{**SMALL, **settings})
    return SpanCollector(base, word_tokenizer(), sae, rows_of_list(rows), chosen, out=out).run()


def naive(base: Any, sae: Any, rows: list[str], settings: SpanSettings) -> dict[int, list[tuple]]:
    """{latent: [(score, text, position, span)]} by loops, for texts of words in a template of words."""
    tokenizer: Any = word_tokenizer()
    before, after = settings.template.split("{text}")
    found: dict[int, list[tuple]] = {}
    for number, text in enumerate(rows):
        words, lead = text.split(), len(before.split())
        ids = tokenizer.convert_tokens_to_ids([*before.split(), *words, *after.split()])[: settings.max_length]
        words = words[: (settings.max_length or 256) - lead]
        if not words:
            continue
        with torch.no_grad():
            hidden = base(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
            latents = sae.encode(hidden) if settings.activation == "own" else sae.encode_pre_acts(hidden).relu()
        for latent in range(latents.shape[1]):
            best, at = 0.0, None
            for position in range(len(words)):
                score = latents[lead + position, latent].float().item()
                late = settings.last_tokens is None or position >= len(words) - settings.last_tokens
                sink = settings.skip_first and lead + position == 0
                if late and not sink and score > max(best, settings.min_score):
                    best, at = score, position
            if at is not None:
                stop = at + 1 if settings.include_peak else at
                span = " ".join(words[max(0, stop - settings.window) : stop])
                found.setdefault(latent, []).append((-best, number, at, span))
    return {k: [(-s, t, p, w) for s, t, p, w in sorted(v)[: settings.top_n]] for k, v in sorted(found.items())}


def as_dict(spans: Spans) -> dict[int, list[tuple]]:
    found: dict[int, list[tuple]] = {}
    for latent, *entry in zip(
        spans.feature.tolist(),
        spans.score.tolist(),
        spans.text_id.tolist(),
        spans.position.tolist(),
        spans.span,
        strict=True,
    ):
        found.setdefault(latent, []).append(tuple(entry))
    return found


def files(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"skip_first": 0},
        {"include_peak": False, "skip_first": 0, "window": 10, "top_n": 10},  # the original's
        {"activation": "own"},
        {"last_tokens": 3},
        {"last_tokens": 1, "include_peak": False},
        {"min_score": 0.8},
        {"window": 100, "top_n": 100},
        {"template": "w1 w2 {text} w4"},
        {"template": "w1 w2 {text} w4", "max_length": 9, "include_peak": False},
    ],
)
def test_as_by_loops(base: Any, settings: dict) -> None:
    sae, rows = sae_for(), texts()
    spans = run(base, sae, rows, **settings)
    expected = naive(base, sae, rows, SpanSettings(**{**SMALL, **settings}))
    assert as_dict(spans) == expected and len(expected) > 10
    assert spans.complete and spans.n_texts in (18, 19)
    for text, start, end, span in zip(spans.text_id, spans.start, spans.end, spans.span, strict=True):
        assert rows[int(text)][int(start) : int(end)] == span


def test_tokens_of_extreme_length_do_not_count() -> None:
    base, sae, rows = tiny_base(dtype=torch.float64), sae_for(), [*texts(), "w1 w2 w60 w3"]
    with torch.no_grad():
        base.model.embed_tokens.weight[64] *= 1e4  # w60
    every = run(base, sae, rows, outlier_ratio=None)
    ordinary = run(base, sae, rows)
    long = len(rows) - 1
    at = (every.text_id == long) & (every.position == 2)
    assert len(every.feature[at]) > 16 and not bool(((ordinary.text_id == long) & (ordinary.position == 2)).any())
    assert ordinary.n_tokens == every.n_tokens - 1 and ordinary.n_texts == every.n_texts


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "batch_topk", "gated", "abs_topk", "groupmax"])
def test_every_activation_of_an_sae(base: Any, activation: str) -> None:
    sae, rows = sae_for(activation=activation), texts()
    for kind in ("own", "relu"):
        settings = SpanSettings(**SMALL, activation=kind)
        assert as_dict(run(base, sae, rows, activation=kind)) == naive(base, sae, rows, settings)


def test_a_peak_at_the_first_token_gives_an_empty_span_in_the_original() -> None:
    for window, include_peak, position, expected in (
        (10, False, 0, ""), (10, True, 0, "w0"), (3, False, 5, "w2 w3 w4"), (3, True, 5, "w3 w4 w5"),
        (32, False, 4, "w0 w1 w2 w3"), (1, False, 4, "w3"), (1, True, 4, "w4"),
    ):  # fmt: skip
        settings = SpanSettings(window=window, include_peak=include_peak, skip_first=0)
        text = " ".join(f"w{i}" for i in range(9))
        tokens = text_tokens(word_tokenizer(), ["w1 w2", text], settings)
        start, end = span_bounds(tokens, torch.tensor([1]), torch.tensor([position]), settings)
        assert text[int(start) : int(end)] == expected


def test_a_span_is_a_slice_of_the_text(base: Any) -> None:
    """Not words put together again: two blanks and a tab stay what they are."""
    text = "w1  w2\tw3\n w4 w5"
    spans = run(base, sae_for(), [text], window=3)
    assert set(spans.span) <= {"w1  w2", "w1  w2\tw3", "w2\tw3\n w4", "w3\n w4 w5"} and spans.span


@pytest.mark.parametrize(
    "settings",
    [
        {"tokens_per_batch": 1},
        {"tokens_per_batch": 4096},
        {"pre_acts_at_once": 1},
        {"pre_acts_at_once": 7 * 64},
        {"rows_per_block": 1},
        {"rows_per_block": 100},
        {"blocks_per_save": 1},
    ],
)
@pytest.mark.parametrize("activation", ["own", "relu"])
def test_sizes_change_nothing(base: Any, settings: dict, activation: str, tmp_path: Path) -> None:
    run(base, sae_for(), texts(), tmp_path / "a", activation=activation)
    run(base, sae_for(), texts(), tmp_path / "b", activation=activation, **settings)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_two_processes_give_the_same_files(base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(base, sae_for(), texts(), tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    first = run(base, sae_for(), texts(), tmp_path / "two")
    assert not first.complete and not first.span and not (tmp_path / "two" / "spans.tsv").exists()
    monkeypatch.setenv("RANK", "0")
    last = run(base, sae_for(), texts(), tmp_path / "two")
    assert last.complete and files(tmp_path / "one") == files(tmp_path / "two")
    assert (last.n_texts, last.n_tokens) == (whole.n_texts, whole.n_tokens)
    with pytest.raises(ValueError, match="out=None"):
        run(base, sae_for(), texts())


class Killed(BaseException):
    pass


@pytest.mark.parametrize("save_every", [1, 2])
@pytest.mark.parametrize("survived", [0, 1, 3])
def test_a_killed_run_goes_on(
    base: Any, survived: int, save_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(base, sae_for(), texts(), tmp_path / "whole")
    real, done = SpanCollector.add_block, []

    def mortal(self: SpanCollector, number: int, *rest: Any) -> tuple[int, int]:
        if len(done) == survived:
            raise Killed
        done.append(number)
        return real(self, number, *rest)

    monkeypatch.setattr(SpanCollector, "add_block", mortal)
    with pytest.raises(Killed):
        run(base, sae_for(), texts(), tmp_path / "killed", blocks_per_save=save_every)
    again: list[int] = []

    def counted(self: SpanCollector, number: int, *rest: Any) -> tuple[int, int]:
        again.append(number)
        return real(self, number, *rest)

    monkeypatch.setattr(SpanCollector, "add_block", counted)
    monkeypatch.setenv("WORLD_SIZE", "2")  # with more processes than before
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        run(base, sae_for(), texts(), tmp_path / "killed", blocks_per_save=save_every)
    assert sorted(again) == list(range(survived // save_every * save_every, 6))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_the_same_call_again_reads_the_result(base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(base, sae_for(), texts(), tmp_path)
    monkeypatch.setattr(SpanCollector, "add_block", None)
    again = run(base, sae_for(), texts(), tmp_path)
    assert as_dict(again) == as_dict(first) and again.by_feature() == first.by_feature()
    assert (again.n_texts, again.n_tokens, again.d_sae) == (first.n_texts, first.n_tokens, first.d_sae)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"window": 5}, "settings.window is 4 there"),
        ({"seed": 2}, "sae is"),
        ({"rows": 3}, "source.rows is 21 there and 3"),
    ],
)
def test_a_folder_of_something_else_is_refused(base: Any, change: dict, told: str, tmp_path: Path) -> None:
    run(base, sae_for(), texts(), tmp_path)
    sae = sae_for(seed=change.pop("seed", 1))
    rows = texts()[: change.pop("rows", None)]
    with pytest.raises(ValueError, match="another folder") as error:
        run(base, sae, rows, tmp_path, **change)
    assert told in str(error.value)


def test_what_the_files_say(base: Any, tmp_path: Path) -> None:
    rows = ["w1 w2\nw3\tw4 w5 w6", "w7 w8 w9 w10", ""]
    sae = sae_for()
    with torch.no_grad():
        sae.b_enc[5] = -100.0
    spans = run(base, sae, rows, tmp_path)
    grouped = spans.by_feature()
    assert 5 not in grouped and 5 not in spans.feature
    assert read_spans(tmp_path) == read_spans(tmp_path / "spans.parquet") == grouped
    from_lines = read_spans(tmp_path / "spans.tsv")
    assert {k: [(s.text_id, s.span) for s in v] for k, v in from_lines.items()} == {
        k: [(s.text_id, s.span) for s in v] for k, v in grouped.items()
    }
    lines = (tmp_path / "spans.tsv").read_text().splitlines()
    assert lines[0] == "NeuronID\tTextID\tScore\tSpan" and len(lines) == 1 + len(spans.span)
    assert all(line.count("\t") == 3 for line in lines) and any("w2\\nw3\\tw4" in line for line in lines)
    words = (tmp_path / "features.tsv").read_text().split("\n")
    assert words[0] == "FeatureID\tWords" and words[6] == "5\t" and words[-1] == "" and len(words) == 64 + 2
    feature = next(k for k, v in grouped.items() if len(v) == 2)
    first, second = (escape(entry.span, returns=True) for entry in grouped[feature])
    assert words[1 + feature] == f"{feature}\tSpan 1: {first}\\nSpan 2: {second}"
    assert json.loads((tmp_path / "spans.json").read_text()) == {"d_sae": 64, "n_texts": 2, "n_tokens": 8}


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no spans at"):
        read_spans(tmp_path)
    (tmp_path / "a.tsv").write_text("a\tb\n")
    with pytest.raises(ValueError, match="Received: 'a"):
        read_spans(tmp_path / "a.tsv")


def test_a_table_of_spans_has_every_text_as_it_was(tmp_path: Path) -> None:
    texts = ["\\theta\\n \\\\ a\n\tb\r c:\\new\\", "\\"]
    numbers = torch.zeros(2, dtype=torch.int64)
    spans = Spans(numbers, numbers, torch.ones(2), numbers, numbers, numbers, texts, 1, 1, 2)
    write_lines(spans, tmp_path / "spans.tsv")
    assert [one.span for one in read_spans(tmp_path / "spans.tsv")[0]] == texts
    write_features(spans, tmp_path / "features.tsv")
    (row,) = read_annotations(tmp_path / "features.tsv")
    assert row.words == "\n".join(f"Span {i}: {t}" for i, t in enumerate(texts, 1)).replace("\r", "\\r")
    old = "NeuronID\tTextID\tScore\tSpan\n0\t0\t1.0\ta\\nb \\phi \\\n"  # which did not mark backslashes
    (tmp_path / "old.tsv").write_text(old)
    assert read_spans(tmp_path / "old.tsv")[0][0].span == "a\nb \\phi \\"


@pytest.mark.parametrize("rows", [[""], [" ", ""], ["w1"], []])
def test_nothing_to_find(base: Any, rows: list[str], tmp_path: Path) -> None:
    spans = run(base, sae_for(), rows, tmp_path)  # of "w1" the first token does not count
    assert spans.complete and not spans.span and (spans.n_texts, spans.n_tokens) == (0, 0)
    assert read_spans(tmp_path) == read_spans(tmp_path / "spans.tsv") == {}
    assert len((tmp_path / "features.tsv").read_text().splitlines()) == 65


# -- templates -------------------------------------------------------------------------------------------------------


def test_a_template_is_taken_off_by_characters(base: Any) -> None:
    def around(tokenizer: Any, template: str) -> tuple[int, int]:
        """Tokens before and after a text."""
        found = text_tokens(tokenizer, ["text"], SpanSettings(template=template))[0]
        return found.first, len(found.ids) - found.first - len(found.start)

    template = "<s> w1 w2 {text} w4 </s>"
    assert around(word_tokenizer(), template) == (3, 2)
    assert around(word_tokenizer(begins=True), "w1 w2 {text}") == (3, 0)  # with the tokenizer's own <s>
    assert around(word_tokenizer(begins=True), template) == (3, 2)  # and not twice
    assert around(word_tokenizer(begins=True), "{text}") == (1, 0)
    found = text_tokens(word_tokenizer(), ["w5  w6 w7", ""], SpanSettings(template=template))
    assert found[0].ids.tolist() == [1, 5, 6, 9, 10, 11, 8, 2] and found[0].counted.tolist() == [3, 4, 5]
    assert found[0].start.tolist() == [0, 4, 7] and found[0].end.tolist() == [2, 6, 9] and not len(found[1].ids)


def test_a_token_that_takes_a_blank_of_the_template_along() -> None:
    """As those of Llama do: the blank before a word is part of its token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "▁of:", "▁cat", "▁sat", "▁end", "x▁", "▁"]
    raw = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    found = text_tokens(tokenizer, ["cat sat"], SpanSettings(template="of: {text} end"))[0]
    assert found.ids.tolist() == [1, 2, 3, 4] and found.first == 1 and found.counted.tolist() == [1, 2]
    assert found.start.tolist() == [0, 3] and found.end.tolist() == [3, 7]
    assert not len(text_tokens(tokenizer, ["cat"], SpanSettings(template="of:{text}"))[0].start)  # one token of both


def test_a_template_that_fills_the_sequence_leaves_nothing(base: Any) -> None:
    spans = run(base, sae_for(), texts(), template="w1 " * 24 + "{text}")
    assert spans.n_tokens == 0 and not spans.span


# -- the array core --------------------------------------------------------------------------------------------------


def whole_numbers(n_tokens: int, d_sae: int) -> tuple[torch.Tensor, Any]:
    """Small whole numbers: many equal scores, and no rounding."""
    generator = torch.Generator().manual_seed(0)
    sae = tiny_sae(d_in=8, d_sae=d_sae, activation="relu")
    with torch.no_grad():
        for tensor in sae.parameters():
            tensor.copy_(torch.randint(-2, 3, tensor.shape, generator=generator))
    return torch.randint(-2, 3, (n_tokens, 8), generator=generator).float(), sae


@pytest.mark.parametrize("room", [1, 50, 10**6])
@pytest.mark.parametrize("at_once", [1, 100, 2**22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_scores_go_by_text_and_position(room: int, at_once: int, dtype: torch.dtype) -> None:
    hidden, sae = whole_numbers(200, 20)
    sae = copy.deepcopy(sae).to(dtype)
    text = torch.arange(200) // 9
    position = torch.arange(200).remainder(9).int()
    scores = sae.encode(hidden).float()
    for order in (range(0, 23), reversed(range(0, 23))):
        heap = SpanHeap(20, 4)
        heap._room = room
        for number in order:
            part = text == number
            add_hidden(heap, sae, hidden[part], text[part], position[part], pre_acts_at_once=at_once)
        latent, texts, positions, score = heap.entries()
        for number in range(20):
            expected = []
            for one in range(23):
                column = scores[text == one, number].tolist()
                if max(column) > 0:
                    expected.append((-max(column), one, column.index(max(column))))
            of = latent == number
            found = zip((-score[of]).tolist(), texts[of].tolist(), positions[of].tolist(), strict=True)
            assert list(found) == sorted(expected)[:4]


def test_merging_twice_changes_nothing() -> None:
    hidden, sae = whole_numbers(60, 20)
    heap = SpanHeap(20, 4)
    add_hidden(heap, sae, hidden, torch.arange(60) // 6, torch.arange(60).remainder(6).int())
    before = [values.clone() for values in heap.entries()]
    heap.add(*(values.flip(0) for values in before))
    assert all(torch.equal(a, b) for a, b in zip(before, heap.entries(), strict=True))


def test_broken_weights_are_told(base: Any) -> None:
    sae = sae_for()
    with torch.no_grad():
        sae.W_enc[0, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        run(base, sae, texts())


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_n", 0),
        ("window", 2.5),
        ("max_length", 1),
        ("last_tokens", 0),
        ("rows_per_block", True),
        ("tokens_per_batch", 0),
        ("pre_acts_at_once", -1),
        ("blocks_per_save", 0),
        ("activation", "sigmoid"),
        ("min_score", -1.0),
        ("min_score", float("nan")),
        ("template", "no place"),
        ("template", "{text} {text}"),
    ],
)
def test_settings_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as error:
        SpanSettings(**{name: value})
    assert f"{name}={value!r}" in str(error.value)


def test_an_sae_of_another_width_is_refused(base: Any) -> None:
    with pytest.raises(ValueError, match="must read 32 numbers.* d_in=16;"):
        run(base, sae_for(d_in=16), texts())


def test_sequences_longer_than_the_model_takes_are_refused(base: Any) -> None:
    with pytest.raises(ValueError, match="at most 128 .* max_length=129"):
        run(base, sae_for(), texts(), max_length=129)


def test_a_slow_tokenizer_is_refused(base: Any) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="fast tokenizer.* Slow"):
        SpanCollector(base, Slow(), sae_for(), rows_of_list(["w1"]), SpanSettings(max_length=24)).run()


@pytest.mark.parametrize("changed", ["w1", None])
def test_a_text_that_changes_meanwhile_is_told(base: Any, changed: str | None) -> None:
    reads = []

    def iterate(start: int) -> Any:
        reads.append(start)
        if len(reads) == 1:
            return [{"text": "w1 w2 w3 w4"}]
        return [] if changed is None else [{"text": changed}]

    with pytest.raises(ValueError, match="has changed since"):
        SpanCollector(base, word_tokenizer(), sae_for(), TextSource(iterate), SpanSettings(max_length=24)).run()


def test_a_model_with_saes_is_read_without_them() -> None:
    model = tiny_model("llama")
    sae = model.saes[0]
    settings = SpanSettings(**SMALL)
    of_model = SpanCollector(model, word_tokenizer(), 0, rows_of_list(texts()), settings).run()
    of_base = SpanCollector(model.lm, word_tokenizer(), sae, rows_of_list(texts()), settings).run()
    assert as_dict(of_model) == as_dict(of_base) and of_model.span
    assert isinstance(of_model.by_feature()[int(of_model.feature[0])][0], TextSpan)
