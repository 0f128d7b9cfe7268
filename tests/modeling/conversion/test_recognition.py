"""Which format a checkpoint has is never a matter of the order in which formats are asked, nor of its files' names
alone."""

import json
from pathlib import Path

import pytest
import torch

from sae_transformers import SparseAutoencoder
from sae_transformers.modeling.conversion import FORMATS, Checkpoint, sae_ids
from tests.modeling.conversion import golden
from tests.modeling.conversion.families import FAMILIES

FOLDERS = {
    "deepseek_r1": "DeepSeek-R1 (qresearch)", "gemma_scope": "Gemma Scope", "gemma_scope_2": "Gemma Scope 2",
    "circuit_tracer": "circuit-tracer", "goodfire": "Goodfire", "kissane": "Kissane (attention)",
    "llama_scope": "Llama Scope", "llamascopium": "Llamascopium", "openai": "OpenAI",
    "qwen_scope": "Qwen Scope", "scar": "SCAR", "selfreg": "SelfReg",
    "gemma_scope_2_layers": "Gemma Scope 2, several layers", "circuit_tracer_clt": "circuit-tracer, cross-layer",
}  # fmt: skip
GOLDEN = [
    (folder.name, variant)
    for folder in (sorted(golden.ROOT.iterdir()) if golden.ROOT.is_dir() else [])
    for variant in golden.variants(folder.name)
]


def formats_of(checkpoint: Checkpoint) -> list[str]:
    return [form.name for form in FORMATS if form.recognise(checkpoint)]


@golden.needs_golden
@pytest.mark.parametrize(("folder", "variant"), GOLDEN)
def test_exactly_one_format_knows_a_golden_checkpoint(folder: str, variant: str) -> None:
    checkpoint = Checkpoint(str(golden.ROOT / folder / variant))
    found = formats_of(checkpoint)
    if not found:  # the SAE is a file or a folder inside
        ids = list(sae_ids(checkpoint))
        assert len(ids) == 1
        found = formats_of(checkpoint.within(ids[0]))
    assert found == [FOLDERS.get(folder, folder)]


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_one_format_knows_a_small_checkpoint(tmp_path: Path, family: str) -> None:
    assert formats_of(Checkpoint(str(FAMILIES[family](tmp_path)))) == [FOLDERS.get(family, family)]


# A word of another library, for each format that has a config: its own words are read, see the tests of the format.
FOREIGN = {
    "saelens": "sae_type", "sparsify": "sae_type", "dictionary_learning": "sae_type", "gemma_scope_2": "activation",
    "gemma_scope_2_layers": "activation",
    "llama_scope": "architecture", "llamascopium": "activation_fn", "scar": "dict_class",
}  # fmt: skip


@pytest.mark.parametrize("family", FOREIGN)
def test_a_config_with_another_librarys_word_for_its_mathematics_is_refused(tmp_path: Path, family: str) -> None:
    path = FAMILIES[family](tmp_path)
    config = next(file for file in sorted(tmp_path.rglob("*.json")) if file.name != "lm_config.json")
    said = json.loads(config.read_text())
    SparseAutoencoder.from_pretrained(path)
    (said["trainer"] if family == "dictionary_learning" else said)[FOREIGN[family]] = "lista"
    config.write_text(json.dumps(said))
    with pytest.raises(ValueError, match=rf"{config.name}.*Received: {FOREIGN[family]}"):
        SparseAutoencoder.from_pretrained(path)


@pytest.mark.parametrize("name", ["cfg.json", "config.json"])
def test_a_config_beside_gemma_scopes_weights_is_another_librarys(tmp_path: Path, name: str) -> None:
    path = FAMILIES["gemma_scope"](tmp_path)
    (path / name).write_text(json.dumps({"architecture": "gated"}))
    with pytest.raises(ValueError, match=rf"{name}.*Received: architecture='gated'"):
        SparseAutoencoder.from_pretrained(path)


def test_a_pickles_own_config_with_another_librarys_word(tmp_path: Path) -> None:
    path = FAMILIES["selfreg"](tmp_path)
    found = torch.load(path, weights_only=True)
    found["config"]["activation"] = "jumprelu"
    torch.save(found, path)
    with pytest.raises(ValueError, match="Received: activation='jumprelu'"):
        SparseAutoencoder.from_pretrained(path)


def test_files_with_saelens_names_and_no_word_of_it(tmp_path: Path) -> None:
    """They were read as a standard SAE: relu."""
    path = FAMILIES["saelens"](tmp_path)
    (path / "cfg.json").write_text(json.dumps({"d_in": 12, "d_sae": 40, "k": 4}))
    with pytest.raises(ValueError, match="is no config of SAELens.* Received: d_in, d_sae, k"):
        SparseAutoencoder.from_pretrained(path)
