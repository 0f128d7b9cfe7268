"""SAELens' names: what the table says, and that a name cannot be read as something else than it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sae_transformers.modeling.conversion import FORMATS, convert
from sae_transformers.modeling.conversion.names import find_named, listing
from sae_transformers.modeling.conversion.names.releases import releases
from sae_transformers.modeling.conversion.names.saelens import (
    FILE,
    PREFIX,
    READERS,
    REFUSED,
    find_registered,
    saelens_releases,
    saes_of,
    search_registered,
    version,
)
from tests.modeling.conversion.families import FAMILIES

# How many ids SAELens 6.54.12 has for each of its conversion functions.
IDS = {
    "": 292, "connor_rob_hook_z": 12, "deepseek_r1": 1, "dictionary_learning_1": 838, "gemma_2": 2833,
    "gemma_2_transcoder": 26, "gemma_3": 8784, "goodfire": 2, "llama_scope": 192, "llama_scope_r1_distill": 96,
    "mntss_clt_layer_transcoder": 26, "mwhanna_transcoder": 208, "qwen_scope": 544, "temporal": 3,
}  # fmt: skip


def test_every_id_has_a_format_of_ours_or_a_reason() -> None:
    counts: dict[str, int] = {}
    for release in saelens_releases():
        names = [sae.sae_id for sae in saes_of(release)]
        assert len(names) == len(set(names)) > 0
        for sae in saes_of(release):
            counts[sae.reader] = counts.get(sae.reader, 0) + 1
            assert (sae.format is None) == (sae.refusal is not None)
            assert sae.repository.count("/") == 1 and sae.base.count("/") == 1 and sae.path
            assert not {"{", "}"} & set(sae.sae_id + sae.path + sae.neuronpedia)
    assert counts == IDS and len(saelens_releases()) == 170 and version() == "6.54.12"
    assert {*READERS, *REFUSED} == set(counts) and not set(READERS) & set(REFUSED)
    assert set(READERS.values()) <= {form.name for form in FORMATS}


def test_the_table_is_small() -> None:
    """Rules and not a line for each SAE; whoever reads a difference of it sees releases."""
    assert FILE.stat().st_size < 100_000 and len(FILE.read_text().splitlines()) == 171


@pytest.mark.parametrize(
    ("name", "place", "page"),
    [
        (
            "gemma-scope-2b-pt-res-canonical/layer_0/width_16k/canonical",
            "google/gemma-scope-2b-pt-res/layer_0/width_16k/average_l0_105",
            "gemma-2-2b/0-gemmascope-res-16k",
        ),
        ("gpt2-small-res-jb/blocks.11.hook_resid_post", "jbloom/GPT2-Small-SAEs-Reformatted/blocks.11.hook_resid_post",
         "gpt2-small/12-res-jb"),
        ("llama_scope_lxr_8x/l0r_8x", "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L0R-8x",
         "llama3.1-8b/0-llamascope-res-32k"),
        ("mwhanna-qwen3-4b-transcoders/layer_35", "mwhanna/qwen3-4b-transcoders/layer_35.safetensors",
         "qwen3-4b/35-transcoder-hp"),
        ("qwen-scope-3-8b-base-w64k-l50/layer7", "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50/layer7.sae.pt", ""),
    ],
)  # fmt: skip
def test_names(name: str, place: str, page: str) -> None:
    for one in (name, PREFIX + name):
        found = find_named(one)
        assert found is not None and found.place == place
        assert found.given["known_as"] == {"sae_lens": name, **({"neuronpedia_id": page} if page else {})}
        assert found.given["format"] in {form.name for form in FORMATS}


def test_names_that_are_in_both_lists() -> None:
    """Ours keep their meaning; SAELens' ids of the same release are taken as well, and lie in the same repository."""
    both = sorted(set(releases()) & set(saelens_releases()))
    assert len(both) > 10
    for release in both:
        theirs = next(saes_of(release))
        found = find_named(f"{release}/{theirs.sae_id}")
        assert found is not None and found.place == f"{theirs.repository}/{theirs.path}"
        assert releases()[release].repository == theirs.repository
    ours = find_named("gemma-scope-9b-pt-res/23/131k")
    assert ours is not None and ours.given == {"base_model": "google/gemma-2-9b"}


def test_a_name_that_is_none() -> None:
    assert find_named("google/gemma-2-2b") is None and find_registered("EleutherAI/sae-llama-3-8b-32x") is None
    with pytest.raises(ValueError, match="no release 'gpt2-small-res-jp'; near are gpt2-small-res-jb"):
        find_named("sae_lens:gpt2-small-res-jp/blocks.0.hook_resid_pre")
    with pytest.raises(ValueError, match="has 13 SAEs; near are blocks.2.hook_resid_pre, blocks"):
        find_named("sae_lens:gpt2-small-res-jb/blocks.12.hook_resid_pre")
    with pytest.raises(ValueError, match="release.*99|99.*it has"):  # a name of ours, and no id of SAELens'
        find_named("gemma-scope-9b-pt-res/99/131k")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("temporal-sae-gemma-2-2b", "attends to earlier tokens")],
)
def test_what_is_not_read_says_why(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{PREFIX}{name}.* is not read: .*{reason}"):
        find_named(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_another_format_are_refused(tmp_path: Path, family: str) -> None:
    """A registry that is wrong about a repository, or a repository that has changed."""
    path = FAMILIES[family](tmp_path)
    given: dict[str, Any] = {"known_as": {"sae_lens": "a/b"}}
    converted, name = convert(str(path), "", {}, given)
    assert converted.values["metadata"]["sae_lens"] == "a/b"
    assert convert(str(path), "", {}, {**given, "format": name})[1] == name
    message = f"must be of the format .*Received: files of the format {re.escape(name)}"
    with pytest.raises(ValueError, match=message):
        convert(str(path), "", {}, {**given, "format": "saelens" if name != "saelens" else "sparsify"})


def test_the_registrys_normalisation_overrides_the_file(tmp_path: Path) -> None:
    """Mistral's SAEs were trained on hidden states of one norm, which their config does not say."""
    found = find_named("mistral-7b-res-wg/blocks.8.hook_resid_pre")
    assert found is not None and found.given["normalize_activations"] == "constant_norm_rescale"
    path = FAMILIES["saelens"](tmp_path)
    plain, _ = convert(str(path), "", {}, {})
    scaled, _ = convert(str(path), "", {}, {"normalize_activations": "constant_norm_rescale"})
    assert plain.values.get("normalization", "none") == "none"
    assert scaled.values["normalization"] == "constant_norm"
    said = json.loads((path / "cfg.json").read_text())
    (path / "cfg.json").write_text(json.dumps({**said, "normalize_activations": "constant_norm_rescale"}))
    assert convert(str(path), "", {}, {})[0].values["normalization"] == "constant_norm"


def test_search() -> None:
    found = search_registered("gemma-2-2b 16k canonical")
    assert {sae.release for sae in found} >= {"gemma-scope-2b-pt-res-canonical", "gemma-scope-2b-pt-mlp-canonical"}
    assert all("16k" in sae.sae_id and "canonical" in sae.name for sae in found)
    assert search_registered("Temporal gemma")[0].refusal and search_registered("no such sae") == []
    lines = listing(["temporal"])
    assert lines[-1] == "3 SAEs of SAELens' registry (6.54.12)" and "not read: " in lines[-2]
    many = listing(["gemma-3-4b"])
    assert "not shown: add words" in many[-1] and len(many) < 60
    assert listing([])[-1].startswith("SAELens' names are taken too (170 releases")
