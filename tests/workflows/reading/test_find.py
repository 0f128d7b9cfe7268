"""`find`: by words and by embeddings, of one SAE and of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sae_transformers import FeatureAnnotations, SaeForCausalLM, SparseAutoencoder, annotate, find
from sae_transformers.cli import app
from tests.create_training_data.tiny_embedder import save_tiny_embedder
from tests.create_training_data.words import word_texts
from tests.tiny import tiny_base, tiny_sae

ROWS = [
    {"feature": 3, "description": "remarks that mean the opposite", "score": 0.5},
    {"feature": 9, "description": "names of rivers", "frequency": 0.01},
]
NOTES = FeatureAnnotations.from_rows(ROWS)


def embed(texts: list[str]) -> np.ndarray:
    """Three numbers: how often a text says `river`, `sea` and something else."""
    return np.array([[text.count("river"), text.count("sea"), 1.0] for text in texts])


def model() -> Any:
    made = SaeForCausalLM.from_base(tiny_base(), saes=[tiny_sae(layer=1, k=4), tiny_sae(seed=2, layer=0, k=4)])
    annotate(made, ROWS)
    return made


def test_a_table_of_features_best_first() -> None:
    found = find(NOTES, "opposite remark")
    assert found.best == 3 and found.features == [3] and len(found) == 1 and found.by == "words"
    (row,) = found.table()
    assert row["description"] == ROWS[0]["description"] and row["score"] == 0.5 and "output_score" not in row
    assert list(found.to_frame().columns)[:3] == ["sae", "feature", "description"]
    assert found.to_dict()["features"] == found.rows() and "remarks that mean" in found._repr_html_()
    assert found.summary() == ["1 features for 'opposite remark', by words"]


def test_nothing_fits() -> None:
    found = find(NOTES, "mountain")
    assert len(found) == 0 and "0 features" in found._repr_html_()
    with pytest.raises(ValueError, match="No description fits.*query='mountain'"):
        _ = found.best


def test_of_a_model_all_saes_with_annotations_or_one() -> None:
    made = model()
    assert [(row["sae"], row["feature"]) for row in find(made, "river").rows()] == [(0, 9)]
    annotate(made, [{"feature": 1, "description": "river"}, {"feature": 2, "description": "sea"}], sae=1)
    assert {(row["sae"], row["feature"]) for row in find(made, "river").rows()} == {(1, 1), (0, 9)}
    assert [row["sae"] for row in find(made, "river", sae=1).rows()] == [1] and len(find(made, "river", 1)) == 1
    assert find(made.saes[1], "sea").best == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"by": "magic"}, "by='magic'"),
        ({"query": "  "}, "query='  '"),
        ({"k": 0}, "k=0"),
        ({"sae": 1}, "no annotations"),
    ],
)
def test_what_cannot_be_sought(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        find(model(), **{"query": "river", **options})


def test_embeddings_of_the_file_by_a_function() -> None:
    notes = NOTES.with_embeddings(embed(NOTES.descriptions["description"].to_pylist()), "")
    found = find(notes, "a river, a river", embedder=embed)
    assert found.by == "embeddings" and found.best == 9
    plain = find(notes, "river")
    assert plain.by == "words" and "give `embedder`" in plain.note and plain.note in plain.summary()
    with pytest.raises(ValueError, match=r"`embedder` must give \(1, d\) numbers"):
        find(notes, "river", embedder=lambda texts: np.zeros(3))


def test_embeddings_are_made_once_and_kept(tmp_path: Path) -> None:
    name = save_tiny_embedder(tmp_path)
    texts = [text for text in word_texts(40) if len(text.split()) > 2][:20]
    made, seen = model(), []
    made.saes[0].annotations = FeatureAnnotations.from_rows(
        [{"feature": n, "description": text} for n, text in enumerate(texts)]
    )
    found = find(made, texts[4], by="embeddings", embedder=name, progress=lambda *counts: seen.append(counts))
    assert found.best == 4 and found.by == "embeddings" and seen == [(20, 20)]
    made.saes[0].save_pretrained(tmp_path / "sae")
    back = SparseAutoencoder.from_pretrained(tmp_path / "sae")
    assert back.annotations.facts["embedder"] == name and back.annotations.width == 24
    again = find(back, texts[4], progress=lambda *counts: seen.append(counts))
    assert again.by == "embeddings" and again.best == 4 and len(seen) == 1
    found = CliRunner().invoke(app, ["find", str(tmp_path / "sae"), texts[4]])
    assert found.exit_code == 0 and "by embeddings" in found.output.replace("\n", " ")


def test_an_embedder_that_is_not_there_gives_words_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_transformers.create_training_data.sentence_embeddings.hub_answers", lambda: False)
    vectors = embed(NOTES.descriptions["description"].to_pylist())
    notes = NOTES.with_embeddings(vectors, "nobody/no-such-model")
    found = find(notes, "river")
    assert found.by == "words" and found.best == 9 and "nobody/no-such-model" in found.note
    with pytest.raises(OSError, match="no-such-model"):
        find(notes, "river", by="embeddings")
