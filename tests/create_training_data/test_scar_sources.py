import json
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from sae_transformers.create_training_data.scar_sources import (
    aegis,
    combine_concepts,
    concept_dataset,
    load_concept,
    read_rows,
    real_toxicity_prompts,
    scored,
    shakespeare,
    toxic_chat,
    unlabelled,
)

TOXICITY = Path(__file__).parents[3] / "shared" / "data" / "toxicity"


def rtp_row(prompt: float | None, continuation: float | None) -> dict:
    return {"prompt": {"text": "a b", "toxicity": prompt}, "continuation": {"text": " c d", "toxicity": continuation}}


@pytest.mark.parametrize(
    ("prompt", "continuation", "label"),
    [(0.6, 0.3, 0), (None, 0.5, 1), (None, None, 0), (0.5, None, 1), (0.4999, None, 0), (0.6, 0.4, 1), (0, 1, 1)],
)
def test_fact_17_mean_toxicity(prompt: float | None, continuation: float | None, label: int) -> None:
    assert list(real_toxicity_prompts([rtp_row(prompt, continuation)])) == [("a b c d", label)]


@pytest.mark.parametrize(("score", "label"), [(0.5, 1), (0.4999, 0), (None, 0)])
def test_fact_17_prompt_only(score: float | None, label: int) -> None:
    row = {"prompt": {"text": "a b", "toxicity": score}}  # no continuation is asked for
    assert list(real_toxicity_prompts([row], prompt_only=True)) == [("a b", label)]


@pytest.mark.parametrize(
    ("annotations", "label"),
    [
        (["Violence", "Safe", "Hate"], 1),
        (["Violence", "Safe"], 0),
        (["Safe"], 0),
        (["Needs Caution"], 1),
        (["Safe", "Safe", "Safe", "Violence", "Violence"], 0),
    ],
)
def test_fact_18_strict_majority(annotations: list[str], label: int) -> None:
    # Columns beyond num_annotations do not count, whatever they hold.
    row = {"text": "t", "num_annotations": len(annotations), **{f"labels_{i}": "None" for i in range(5)}}
    row |= {f"labels_{i}": value for i, value in enumerate(annotations)}
    assert list(aegis([row])) == [("t", label)]


def test_toxic_chat_takes_the_message_of_the_hub_or_the_text_of_a_file() -> None:
    rows = [{"user_input": "u", "text": "no", "toxicity": 1}, {"text": "t", "toxicity": "0"}]
    assert list(toxic_chat(rows)) == [("u", 1), ("t", 0)]


def test_shakespeare_is_present_in_the_original() -> None:
    assert list(shakespeare(["thou art\n"], ["you are\n"])) == [("you are", 0), ("thou art", 1)]


def test_unlabelled_rows_are_those_that_scar_draws() -> None:
    rows = Dataset.from_dict({"text": [f"row {i}" if i % 3 else "" for i in range(90)]})
    drawn = rows.filter(lambda row: row["text"] != "").shuffle(42).select(range(20))  # as its code says
    assert list(unlabelled(rows, n_rows=20)) == [(text, -100) for text in drawn["text"]]  # pyright: ignore
    assert len(list(unlabelled(rows))) == 60
    assert list(unlabelled(rows, seed=1)) != list(unlabelled(rows))


@pytest.mark.parametrize(
    ("rule", "row", "received"),
    [
        (real_toxicity_prompts, {"text": "t"}, "Row 1 has no 'prompt'.*columns 'text'"),
        (real_toxicity_prompts, {"prompt": "t", "continuation": "u"}, "'prompt' must be a Mapping.*str in row 1"),
        (real_toxicity_prompts, rtp_row(0.1, 1.5), "toxicity=1.5 in row 1"),
        (real_toxicity_prompts, rtp_row(float("nan"), 0.5), "toxicity=nan"),
        (aegis, {"text": "t", "num_annotations": 2, "labels_0": "Safe"}, "no 'labels_1'"),
        (aegis, {"text": "t", "num_annotations": 0}, "num_annotations=0 in row 1"),
        (aegis, {"text": "t", "num_annotations": "many"}, "num_annotations='many'"),
        (toxic_chat, {"text": "t", "toxicity": 2}, "toxicity=2"),
        (toxic_chat, {"text": "t", "toxicity": 0.5}, "toxicity=0.5"),
        (toxic_chat, {"text": None, "toxicity": 1}, "'text' must be a str.*NoneType"),
        (unlabelled, {"sentence": "t"}, "no 'text'"),
    ],
)
def test_a_bad_row_is_named(rule, row: dict, received: str) -> None:
    with pytest.raises(ValueError, match=received):
        list(rule([row]))


@pytest.mark.parametrize("n_rows", [0, 4])
def test_unlabelled_refuses_more_rows_than_there_are(n_rows: int) -> None:
    with pytest.raises(ValueError, match=rf"\[1, 3\].*n_rows={n_rows}"):
        list(unlabelled([{"text": "t"}] * 3, n_rows=n_rows))


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_scores_of_any_table() -> None:
    rows = [{"t": {"x": "a"}, "s": score} for score in (0.5, "0.49", 1, 0, None, "", -100)]
    assert [label for _, label in scored(rows, "t.x", "s")] == [1, 0, 1, 0, -100, -100, -100]
    assert [label for _, label in scored(rows[:2], "t.x", "s", threshold=0.4)] == [1, 1]
    assert list(scored([{"a.b": "text", "s": 1}], "a.b", "s")) == [("text", 1)]
    with pytest.raises(ValueError, match="A label must be a number. Received: s='high' in row 2"):
        list(scored([rows[0], {"t": {"x": "a"}, "s": "high"}], "t.x", "s"))
    with pytest.raises(ValueError, match="needs the column 't.y'. Received: columns 't', 's' in row 1"):
        list(scored(rows, "t.y", "s"))
    with pytest.raises(ValueError, match="'t' must be a str"):
        list(scored(rows, "t", "s"))


def test_files_become_a_data_set(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [rtp_row(0.9, 0.9), rtp_row(0.1, 0.2)])
    second = write(tmp_path / "b.jsonl", [rtp_row(None, 0.7)])
    data = load_concept("real_toxicity_prompts", [first, second])
    assert data.to_dict() == {"text": ["a b c d"] * 3, "toxicity": [1, 0, 1]}
    alone = load_concept("real_toxicity_prompts_prompt_only", first, concept="rude")
    assert alone.to_dict() == {"text": ["a b"] * 2, "rude": [1, 0]}


def test_csv_and_parquet_give_the_same(tmp_path: Path) -> None:
    rows = {"text": ["x, y", "z", " "], "toxicity": [1, 0, 0]}
    Dataset.from_dict(rows).to_csv(tmp_path / "a.csv")
    Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        data = load_concept("toxic_chat", str(tmp_path / name))
        assert data.to_dict() == {"text": ["x, y", "z"], "toxicity": [1, 0]}  # the empty one is left out


def test_the_hub_is_asked_for_the_published_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, split: str, **options: object) -> list[dict]:
        asked.append((*args, split))
        return [{"text": "t"}]

    asked: list[tuple] = []
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_concept("wikitext", n_rows=1).to_dict() == {"text": ["t"], "toxicity": [-100]}
    assert asked == [("Salesforce/wikitext", "wikitext-103-raw-v1", "train")]


def test_what_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("no such data set\nand more")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(OSError, match="'nowhere/at-all'.*no such data set$"):
        read_rows("nowhere/at-all")
    with pytest.raises(FileNotFoundError, match="'absent.jsonl'"):
        read_rows("absent.jsonl")
    with pytest.raises(ValueError, match="name='rtp'"):
        load_concept("rtp")
    with pytest.raises(ValueError, match="'toxicity'.*no rows"):
        load_concept("toxic_chat", write(tmp_path / "a.jsonl", []))
    with pytest.raises(ValueError, match="concept='text'"):
        concept_dataset([("t", 1)], "text")


def test_combined_concepts_do_not_know_each_others_labels() -> None:
    one, two = concept_dataset([("a", 1), ("b", 0)], "toxicity"), concept_dataset([("c", 1)], "shakespeare")
    merged = combine_concepts([one, two])
    assert merged.column_names == ["text", "toxicity", "shakespeare"]
    rows = {(row["text"], row["toxicity"], row["shakespeare"]) for row in merged}  # pyright: ignore
    assert rows == {("a", 1, -100), ("b", 0, -100), ("c", -100, 1)}
    assert merged["text"] == combine_concepts([one, two])["text"]
    with pytest.raises(ValueError, match=r"parts=\[\]"):
        combine_concepts([])


@pytest.mark.skipif(not TOXICITY.is_dir(), reason="the shared toxicity data are not here")
def test_the_real_files_have_the_counts_that_were_published() -> None:
    def counts(name: str, *files: str) -> tuple[int, int]:
        data = load_concept(name, [str(TOXICITY / file) for file in files])
        return len(data), sum(data["toxicity"])

    assert counts("toxic_chat", "toxicchat_test.jsonl") == (2853, 362)
    assert counts("real_toxicity_prompts", "real_toxicity_prompts_challenging.jsonl") == (1196, 962)
    assert counts("real_toxicity_prompts", "real_toxicity_prompts_nontoxic.jsonl") == (1200, 140)
    assert counts("real_toxicity_prompts_prompt_only", "real_toxicity_prompts_nontoxic.jsonl") == (1200, 0)
