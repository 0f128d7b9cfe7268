"""Which format a checkpoint has is never a matter of the order in which formats are asked."""

from pathlib import Path

import pytest

from sae_transformers.modeling.conversion import FORMATS, Checkpoint, sae_ids
from tests.modeling.conversion import golden
from tests.modeling.conversion.families import FAMILIES

FOLDERS = {
    "deepseek_r1": "DeepSeek-R1 (qresearch)", "gemma_scope": "Gemma Scope", "gemma_scope_2": "Gemma Scope 2",
    "goodfire": "Goodfire", "llama_scope": "Llama Scope", "llamascopium": "Llamascopium", "openai": "OpenAI",
    "qwen_scope": "Qwen Scope", "scar": "SCAR", "selfreg": "SelfReg",
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
