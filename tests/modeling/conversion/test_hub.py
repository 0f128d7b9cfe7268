"""Checkpoints of other libraries by Hub id: the SAE that is named, at its revision, and no file more than it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.loopback_hub import LoopbackHub

pytestmark = pytest.mark.hub

CHECKOUT = Path(__file__).parents[3]
SCRIPT = CHECKOUT / "tests" / "scripts" / "foreign_saes.py"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("foreign")
    with LoopbackHub() as hub:
        run = subprocess.run(
            [sys.executable, str(SCRIPT), str(folder)],
            env=hub.environment(folder / "home") | {"PYTHONPATH": str(CHECKOUT)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_an_sae_inside_a_repository_at_a_revision(answers):
    assert answers["revision"] == [True, True]
    assert answers["place"] == "model.layers.1.output"


def test_a_repository_of_several_lists_them(answers):
    ids = [f"resid_post/layer_{n}_width_16k_l0_small" for n in (1, 2)]
    assert answers["ids"] == ids
    assert answers["several"].startswith("SeveralSaes") and all(name in answers["several"] for name in ids)
    assert answers["wrong"].startswith("OSError") and ids[0] in answers["wrong"]


def test_only_what_the_sae_needs_is_fetched(answers):
    folder = "resid_post/layer_1_width_16k_l0_small"
    assert answers["fetched"] == [f"{folder}/config.json", f"{folder}/params.safetensors"]
    activation, files = answers["scar"]
    assert activation == "topk"
    assert "model-00002-of-00002.safetensors" in files and "model-00001-of-00002.safetensors" not in files


def test_the_cache_serves_without_a_network(answers):
    assert answers["offline"] is True
