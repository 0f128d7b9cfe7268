"""What we write of features, the packages read: delphi by its own loader, Neuronpedia by its own client's classes.

Needs the interpreter SAE_TRANSFORMERS_PEERS and SAE_TRANSFORMERS_ANNOTATION_PEERS, a folder with eai-delphi and
neuronpedia beside it: `make test-parity` makes both.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sae_transformers.workflows.settings.dashboard import ExportSettings
from tests.create_training_data.words import word_tokenizer
from tests.workflows.export.world import Made, made

PEERS = os.environ.get("SAE_TRANSFORMERS_PEERS", "")
PACKAGES = os.environ.get("SAE_TRANSFORMERS_ANNOTATION_PEERS", "")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not (PEERS and PACKAGES), reason="no interpreter and no folder with the other packages"),
]


@pytest.fixture(scope="module")
def world() -> Made:
    return made()


def read(kind: str, folder: Path) -> dict[str, Any]:
    script = Path(__file__).with_name("read_annotations_with_peer.py")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [PEERS, "-W", "ignore", str(script), kind, str(folder)], env=kept | {"PYTHONPATH": PACKAGES},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_delphi_reads_explanations_activations_and_neighbours(world: Made, tmp_path: Path) -> None:
    world.found.export(tmp_path, ExportSettings("delphi"))
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    found, page = read("delphi", tmp_path), world.found.page
    scores = {f: max(span.score for span in spans) for f, spans in page.spans.items() if spans}
    assert {int(n): top for n, (top, _) in found["latents"].items()} == pytest.approx(scores, rel=2e-3)
    told = {int(n): text for n, text in found["explanations"].items() if text != "No explanation found"}
    assert told == {f: note.meaning for f, note in page.annotations.items() if f in scores}
    assert [tuple(pair) for pair in found["near"]["3"]] == list(page.neighbours[3])
    assert len(found["tokens"]) == len(world.spans.span)


def test_neuronpedias_client_reads_and_would_send_all_of_it(world: Made, tmp_path: Path) -> None:
    world.found.export(tmp_path, ExportSettings("neuronpedia"))
    (folder,) = tmp_path.glob("*/*")
    found = read("neuronpedia", folder)
    upload = found["upload"]
    assert (upload["modelId"], upload["source"]) == ("tiny-llama-it", folder.name) and len(upload["features"]) == 64
    assert sum(len(one["activations"]) for one in upload["features"]) == len(world.spans.span)
    assert [3, "remarks that mean the opposite"] in found["texts"] and len(found["texts"]) == 4
    assert [one["text"] for one in upload["features"][3]["explanations"]] == [
        "remarks that mean the opposite",
        "irony",
    ]
    assert len(upload["features"][3]["topLogits"]) == 10
