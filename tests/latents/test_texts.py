import csv
import gzip
import json
from pathlib import Path

import datasets
import fsspec
import pytest
import torch

from sae_transformers.create_training_data.packing import tokenize
from sae_transformers.latents.texts import TextSource, open_text, rows_of_list
from tests.create_training_data.words import word_tokenizer

ROWS = [{"text": f"w{i} w{i}", "label": i % 2, "inner": {"text": f"w{i + 1}"}} for i in range(7)]


def write_rows(folder: Path, kind: str) -> Path:
    path = folder / f"rows{kind}"
    if kind == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows({"text": r["text"], "label": r["label"]} for r in ROWS)
    elif kind == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == ".jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    else:
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    return path


def all_rows(source: TextSource, size: int = 3) -> list[str]:
    return [text for _, rows in source.blocks(size, range(100)) for text in rows.texts]


@pytest.mark.parametrize("kind", [".csv", ".json", ".jsonl", ".jsonl.gz", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    path = str(write_rows(tmp_path, kind))
    source = open_text(path, labels=["label"])
    rows = source.read(0, 100)
    assert rows.texts == [r["text"] for r in ROWS]
    assert rows.labels.tolist() == [[float(r["label"])] for r in ROWS]
    assert source.n_rows == 7
    if kind != ".csv":
        assert all_rows(open_text(path, column="inner.text")) == [r["inner"]["text"] for r in ROWS]


@pytest.mark.parametrize("length", [7, None])
def test_blocks_can_be_read_in_any_order(length: int | None) -> None:
    def source() -> TextSource:
        return TextSource(lambda start: iter(ROWS[start:]), length=length)

    wanted = [r["text"] for r in ROWS]
    one = source()
    for start, count in ((3, 2), (0, 2), (6, 2), (2, 4), (9, 2), (0, 7)):
        assert one.read(start, count).texts == wanted[start : start + count]
    assert [n for n, _ in source().blocks(2, [1, 3, 5])] == [1, 3]
    behind = source()
    assert behind.read(20, 5).texts == [] and behind.n_rows == 7  # the end is known, though no row was given
    for count, expected in ((4, 4), (7, 7), (50, 7)):
        first = source().first(count)
        assert all_rows(first) == wanted[:expected] and first.n_rows == expected
        assert first.facts["max_rows"] == count


def test_rows_of_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\ufeffone\ntwo\n \n\nthree\n", encoding="utf-8")
    assert all_rows(open_text(str(path))) == ["one\ntwo", "three"]
    assert all_rows(open_text(str(path), txt_rows="line")) == ["one", "two", " ", "", "three"]
    assert all_rows(open_text(str(path), txt_rows="file")) == ["one\ntwo\n \n\nthree\n"]
    with pytest.raises(ValueError, match="paragraph, line, file. Received: txt_rows='page'"):
        open_text(str(path), txt_rows="page")
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"UTF-8. Received: a.txt"):
        open_text(str(path)).read(0, 1)


def test_folders_globs_and_urls(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", "notes.md"):
        (tmp_path / name).write_text(f"from {name}")
    assert all_rows(open_text(str(tmp_path))) == ["from a.txt", "from b.txt", "from sub/c.txt"]
    assert all_rows(open_text(f"{tmp_path}/*.txt")) == ["from a.txt", "from b.txt"]
    assert open_text(f"{tmp_path}/*.txt").facts["files"] == {"a.txt": 10, "b.txt": 10}
    with fsspec.open("memory://texts/a.txt", "w") as file:
        file.write("there")  # pyright: ignore[reportAttributeAccessIssue]
    assert all_rows(open_text("memory://texts/a.txt")) == ["there"]
    for wrong in (f"{tmp_path}/none.txt", f"{tmp_path}/*.csv", "memory://texts/none.txt"):
        with pytest.raises(FileNotFoundError, match="There is no file"):
            open_text(wrong)
    with pytest.raises(ValueError, match=r"\.parquet. Received: 'notes.md'"):
        open_text(str(tmp_path / "notes.md"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset(streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, subset: str | None, *, split: str, revision: str | None, streaming: bool):
        if name != "some/data":
            raise RuntimeError("nothing\nthere")
        found = datasets.Dataset.from_list(ROWS)
        return found.to_iterable_dataset() if streaming else found

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_text("some/data", labels=["label"], streaming=streaming)
    assert source.read(4, 2).texts == ["w4 w4", "w5 w5"] and source.read(1, 1).labels.item() == 1
    assert all_rows(source) == [r["text"] for r in ROWS]
    with pytest.raises(OSError, match="'other/data' is no file, .* Hub data set: nothing$"):
        open_text("other/data")


def test_labels_are_0_1_or_unknown() -> None:
    values = [0, 1, True, False, "1", "true", None, "", -100, "-100", float("nan")]
    rows = rows_of_list(["w"] * len(values), {"a": values, "b": [1] * len(values)}).read(0, 20)
    assert rows.labels[:, 0].tolist() == [0, 1, 1, 0, 1, 1, -100, -100, -100, -100, -100]
    assert rows.labels[:, 1].eq(1).all()
    for wrong in (2, 0.5, "maybe"):
        with pytest.raises(ValueError, match=rf"Labels must be 0 or 1 .* Received: a={wrong!r} in row 1\."):
            rows_of_list(["w", "w"], {"a": [0, wrong]}).read(0, 2)
    with pytest.raises(ValueError, match="needs 2 values. Received: 1 for 'a'"):
        rows_of_list(["w", "w"], {"a": [0]})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"body": "x"}], r"needs the column 'text'. Received: columns 'body' in row 0"),
        ([{"text": "x"}, {"text": 5}], r"must be a string.*text=5 in row 1"),
    ],
)
def test_a_broken_row_is_named(rows: list[dict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextSource(lambda start: iter(rows[start:])).read(0, 5)
    with pytest.raises(ValueError, match="1 or more, or None for all. Received: max_rows=0"):
        TextSource(lambda start: iter(rows)).first(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', "Line 2 of a.json is no JSON object"),
        ('{"text": "a"}\n\n3\n', "Entry 3 of a.json is no JSON object. Received: '3'"),
        ('[{"text": "a"},', "a.json is no list of JSON objects"),
        ('[{"text": "a"}, 3]', "Entry 1 of a.json is no JSON object. Received: '3'"),
    ],
)
def test_broken_json_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_text(str(tmp_path / "a.json")).read(0, 9)


# -- tokens ----------------------------------------------------------------------------------------------------------


def lists(tensors: list[torch.Tensor]) -> list[list[int]]:
    return [t.tolist() for t in tensors]


def test_one_text_a_sequence() -> None:
    found = tokenize(word_tokenizer(), ["w0 w1 w2", " ", "w3"], first_row=10, max_length=2, pack=False)
    assert lists(found.ids) == [[4, 5], [7]]
    assert lists(found.source) == [[10, 10], [12]]  # row 11 is empty and keeps its number
    begun = tokenize(word_tokenizer(begins=True), ["w0 w1 w2", ""], first_row=0, max_length=3, pack=False)
    assert lists(begun.ids) == [[1, 4, 5]]


def test_packed_texts() -> None:
    texts = ["w0 w1 w2", "", "w3", "w4 w5"]
    found = tokenize(word_tokenizer(), texts, first_row=5, max_length=3, pack=True)
    assert lists(found.ids) == [[4, 5, 6], [2, 7, 2], [8, 9]]  # 2 is the end token
    assert lists(found.source) == [[5, 5, 5], [5, 7, 7], [8, 8]]
    begun = tokenize(word_tokenizer(begins=True), texts, first_row=5, max_length=4, pack=True)
    assert lists(begun.ids) == [[1, 4, 5, 6], [1, 2, 7, 2], [1, 8, 9]]
    assert lists(begun.source) == [[5, 5, 5, 5], [5, 5, 7, 7], [8, 8, 8]]
    assert tokenize(word_tokenizer(), ["", " "], first_row=0, max_length=3, pack=True).ids == []
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token_id=None; give `pack=False`"):
        tokenize(tokenizer, ["w0"], first_row=0, max_length=3, pack=True)
