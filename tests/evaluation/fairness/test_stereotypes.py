"""Preferences and last words against one-at-a-time computations; the benchmarks' files in small."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from sae_transformers import FeatureEdit, Steering
from sae_transformers.evaluation.fairness.stereotypes import (
    SentencePair,
    last_word_summary,
    preference,
    preference_change,
    read_crows_pairs,
    read_winobias,
    score_last_words,
    score_pairs,
)
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_base, tiny_model

F64 = torch.float64
DATA = Path(__file__).parents[4] / "shared" / "data"
here = pytest.mark.skipif(not (DATA / "gender_bias").is_dir(), reason="the shared data are not here")


def log_p(model: torch.nn.Module, text: str) -> torch.Tensor:
    """Of each word, given the beginning token and the words before."""
    ids = torch.tensor([[1, *word_tokenizer()(text)["input_ids"]]])
    with torch.no_grad():
        return model(ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


def test_pairs_equal_one_at_a_time() -> None:
    base = tiny_base(dtype=F64)
    pairs = [
        SentencePair("w1 w2 w3 w4 w5", "w1 w2 w7 w4 w5", (((6, 8),), ((6, 8),))),  # one word
        SentencePair("w1 w2 w3", "w9 w8 w2 w3"),  # the first word, and of other length
        SentencePair("w4 w5 w6", "w4 w5 w7", (((6, 8),), ((6, 8),))),  # the last word
    ]
    found = score_pairs(base, word_tokenizer(), pairs, tokens_at_once=12)
    sums = [[log_p(base, text) for text in (pair.more, pair.less)] for pair in pairs]
    for number, (more, less) in enumerate(sums):
        assert float(found.sentence[number]) == pytest.approx(float(more.sum() - less.sum()), abs=1e-5)
    shared = [
        sums[0][0][3:].sum() - sums[0][1][3:].sum(),
        sums[1][0][1:].sum() - sums[1][1][2:].sum(),
        torch.tensor(0.0),
    ]
    torch.testing.assert_close(found.shared, torch.stack([x.double() for x in shared]), atol=1e-5, rtol=0)
    assert float(found.marked[0]) == pytest.approx(float(sums[0][0][2] - sums[0][1][2]), abs=1e-5)
    assert math.isnan(float(found.marked[1]))
    assert float(found.marked[2]) == pytest.approx(float(found.sentence[2]), abs=1e-9)


def test_pairs_swap_sign_and_steering_moves_them() -> None:
    model = tiny_model(dtype=F64)
    pairs = [SentencePair("w1 w2 w3", "w1 w5 w3"), SentencePair("w8 w2", "w7 w2")]
    turned = [SentencePair(pair.less, pair.more) for pair in pairs]
    one, other = (score_pairs(model, word_tokenizer(), given, steering=False) for given in (pairs, turned))
    torch.testing.assert_close(one.sentence, -other.sentence)
    nothing = score_pairs(model, word_tokenizer(), pairs, steering=Steering([FeatureEdit(0, 3, "add", 0.0)]))
    torch.testing.assert_close(one.sentence, nothing.sentence)
    moved = score_pairs(model, word_tokenizer(), pairs, steering=Steering([FeatureEdit(0, 3, "add", 5.0)]))
    assert float((one.sentence - moved.sentence).abs().min()) > 1e-4


def test_what_pairs_say() -> None:
    scores = torch.tensor([2.0, -1.0, 0.0, 3.0, torch.nan], dtype=F64)
    found = preference(scores)
    assert found["share"]["value"] == (1 + 0 + 0.5 + 1) / 4 and found["gap"]["value"] == 1.0
    assert found["pairs"]["value"] == 4 and found["ties"]["value"] == 1
    assert found["gap"]["low"] < 1.0 < found["gap"]["high"]
    change = preference_change(scores, scores + 0.25)
    assert change == {"value": pytest.approx(0.25), "low": pytest.approx(0.25), "high": pytest.approx(0.25)}
    with pytest.raises(ValueError, match="Received: none"):
        preference(torch.tensor([torch.nan]))
    with pytest.raises(ValueError, match="same pairs"):
        preference_change(torch.tensor([torch.nan]), torch.tensor([1.0]))


def test_last_words_equal_one_at_a_time() -> None:
    base = tiny_base(dtype=F64)
    texts = ["w1 w2 w3 w4", "w9 w8 ", "w5 w6 w7"]
    found = score_last_words(base, word_tokenizer(), texts)
    expected = torch.stack([log_p(base, text)[-1] for text in texts])
    torch.testing.assert_close(found.log_p, expected, atol=1e-5, rtol=0)
    summary = last_word_summary(found)
    assert summary["perplexity"]["value"] == pytest.approx(math.exp(-float(expected.mean())), rel=1e-5)
    with torch.no_grad():
        ids = torch.tensor([[1, *word_tokenizer()("w1 w2 w3")["input_ids"]]])
        best = word_tokenizer().decode(base(ids).logits[0, -1, :94].argmax())
    right = score_last_words(base, word_tokenizer(), [f"w1 w2 w3 {best}"])
    assert bool(right.right[0]) == (int(base(ids).logits[0, -1].argmax()) < 94)
    for wrong in (["w1"], []):
        with pytest.raises(ValueError, match="two words"):
            score_last_words(base, word_tokenizer(), wrong)


def test_pairs_that_are_none() -> None:
    base = tiny_base()
    for pair in (SentencePair("w1 w2", "w1 w2"), SentencePair("w1", "w1 w2"), SentencePair("", "w1")):
        with pytest.raises(ValueError, match="must differ.*pair 0"):
            score_pairs(base, word_tokenizer(), [pair])
    with pytest.raises(ValueError, match="Received: none"):
        score_pairs(base, word_tokenizer(), [])
    with pytest.raises(ValueError, match="context of 128"):
        score_pairs(base, word_tokenizer(), [SentencePair("w1 " * 130, "w2 " * 130)])


def test_files_in_small(tmp_path: Path) -> None:
    (tmp_path / "pro.txt").write_text(
        "1 [The nurse] met the clerk because [she] did.\n2 The [doctor] saw [his] car .\n"
    )
    (tmp_path / "anti.txt").write_text(
        "1 [The nurse] met the clerk because [he] did.\n2 The [doctor] saw [her] car .\n"
    )
    pairs = read_winobias(tmp_path / "pro.txt", tmp_path / "anti.txt", "type 1")
    assert pairs[0].more == "The nurse met the clerk because she did." and pairs[0].kind == "type 1"
    for pair, words in zip(pairs, (("she", "he"), ("his", "her")), strict=True):
        for text, spans, word in zip((pair.more, pair.less), pair.marked, words, strict=True):
            assert [text[start:stop] for start, stop in spans] == [word]
    (tmp_path / "anti.txt").write_text("1 [The nurse] met [him].\n")
    with pytest.raises(ValueError, match="2 and 1"):
        read_winobias(tmp_path / "pro.txt", tmp_path / "anti.txt")
    (tmp_path / "anti.txt").write_text("1 [The nurse] met [him].\n2 nobody\n")
    with pytest.raises(ValueError, match="anti.txt"):
        read_winobias(tmp_path / "pro.txt", tmp_path / "anti.txt")
    csv = tmp_path / "crows.csv"
    csv.write_text(
        ',sent_more,sent_less,stereo_antistereo,bias_type\n0,"A, b.",C b.,stereo,age\n1,D.,E.,antistereo,gender\n'
    )
    assert [pair.more for pair in read_crows_pairs(csv)] == ["A, b.", "D."]
    assert [pair.less for pair in read_crows_pairs(csv, ["gender"])] == ["E."]
    with pytest.raises(ValueError, match=r"\['age', 'gender'\]"):
        read_crows_pairs(csv, ["race"])
    csv.write_text("a,b\n")
    with pytest.raises(ValueError, match="without .'sent_more'"):
        read_crows_pairs(csv)


@here
def test_the_benchmarks_files() -> None:
    folder = DATA / "gender_bias"
    for part in ("dev", "test"):
        for number in (1, 2):
            name = f"stereotyped_type{number}_{part}.txt"
            pairs = read_winobias(folder / "winobias" / f"pro_{name}", folder / "winobias" / f"anti_{name}")
            assert len(pairs) == 396 and all("[" not in pair.more + pair.less for pair in pairs)
            assert sum(pair.more != pair.less for pair in pairs) == 396
    pairs = read_crows_pairs(folder / "crows_pairs.csv")
    kinds = {kind: sum(pair.kind == kind for pair in pairs) for kind in ("gender", "race-color", "age")}
    assert len(pairs) == 1508 and kinds == {"gender": 262, "race-color": 516, "age": 87}
    lines = (DATA / "capability" / "lambada_test.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5153 and all(len(json.loads(line)["text"].split()) > 2 for line in lines)
