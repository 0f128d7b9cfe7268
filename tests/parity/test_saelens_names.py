"""SAELens' names mean the same here and there: both load small checkpoints, which lie where the published ones do on
a Hub of this machine, and both give one config and the same numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sae_transformers.modeling.conversion.format import place_of_hook
from sae_transformers.modeling.conversion.names.saelens import (
    PATHS,
    PREFIX,
    find_registered,
    saelens_releases,
    saes_of,
)
from tests.loopback_hub import LoopbackHub
from tests.modeling.conversion.families import FAMILIES, D, F

PEERS = os.environ.get("SAE_TRANSFORMERS_PEERS", "")
CHECKOUT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not PEERS, reason="SAE_TRANSFORMERS_PEERS names no interpreter with the other libraries"),
]

# Release, id, which of our small checkpoints is put there, and the hook that it is made to state.
NAMES = (
    ("gpt2-small-res-jb", "blocks.5.hook_resid_pre", "saelens", "blocks.5.hook_resid_pre"),
    ("gemma-2-2b-res-matryoshka-dc", "blocks.3.hook_resid_post", "saelens", "blocks.3.hook_resid_post"),
    ("pythia-70m-deduped-mlp-sm", "blocks.2.hook_mlp_out", "saelens", "blocks.2.hook_mlp_out"),
    ("mistral-7b-res-wg", "blocks.8.hook_resid_pre", "saelens", "blocks.8.hook_resid_pre"),
    (
        "sae_bench_pythia70m_sweep_topk_ctx128_0730",
        "blocks.3.hook_resid_post__trainer_0",
        "dictionary_learning",
        "blocks.3.hook_resid_post",
    ),
    (
        "llama-3.1-8b-instruct-andyrdt",
        "resid_post_layer_3_trainer_1",
        "dictionary_learning",
        "blocks.3.hook_resid_post",
    ),
    ("llama_scope_lxr_8x", "l3r_8x", "llama_scope", "blocks.3.hook_resid_post"),
    ("mwhanna-qwen3-4b-transcoders", "layer_1", "circuit_tracer", "blocks.1.mlp.hook_in"),
    ("mwhanna-qwen3-1.7b-transcoders-lowl0", "layer_7", "circuit_tracer", "blocks.7.mlp.hook_in"),
    ("gpt2-small-hook-z-kk", "blocks.7.hook_z", "kissane", "blocks.7.attn.hook_z"),
)
# SAELens leaves out the decoder's norm before Llama Scope's gate, see docs/checkpoints.md.
OTHER_NUMBERS = {"llama_scope_lxr_8x"}


def state(path: Path, family: str, hook: str) -> None:
    """Make a small checkpoint say where it reads."""
    if family == "kissane":
        path = next(path.parent.glob("*_cfg.json"))
    elif family == "circuit_tracer":  # says it by the file's name
        return
    else:
        path = next(file for file in path.rglob("*.json"))
    said = json.loads(path.read_text())
    if family == "dictionary_learning":
        layer = int(hook.split(".")[1])
        said["trainer"] |= {"layer": layer, "submodule_name": f"resid_post_layer_{layer}"}
    else:
        said |= {"saelens": {"hook_name": hook}, "llama_scope": {"hook_point_in": hook, "hook_point_out": hook}}.get(
            family, {"act_name": hook}
        )
        said.pop("metadata", None)
    path.write_text(json.dumps(said))


def uploads(
    folder: Path, number: int, release: str, sae_id: str, family: str, hook: str
) -> list[tuple[str, str, str]]:
    """Files of one SAE and where they lie on the Hub."""
    found = find_registered(f"{PREFIX}{release}/{sae_id}")
    assert found is not None
    root = folder / f"made-{number}"
    path = FAMILIES[family](root)
    state(path, family, hook)
    if path.is_dir():
        files = [
            (file, f"{found.path}/{file.relative_to(path).as_posix()}") for file in path.rglob("*") if file.is_file()
        ]
    else:
        files = [(path, found.path)]
        for beside in (file for file in path.parent.iterdir() if file != path):
            name = found.path.removesuffix(".pt") + "_cfg.json" if family == "kissane" else beside.name
            files.append((beside, name))
    if family == "circuit_tracer":
        weights = {name: value for name, value in load_file(path).items() if "threshold" not in name}  # as published
        save_file(weights, path)
        said = {"d_model": {"value": D}, "d_feature": {"value": F}, "batch_size": {"value": 8}}
        (root / "wandb-config.yaml").write_text(yaml.safe_dump(said))
        files.append((root / "wandb-config.yaml", "wandb-config.yaml"))
    return [(found.repository, str(file), inside) for file, inside in files]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    given = []
    for number, name in enumerate(NAMES):
        given += uploads(folder, number, *name)
        x = torch.randn(32, D, generator=torch.Generator().manual_seed(number))
        save_file({"x": x}, folder / f"{number}.x.safetensors")
    (folder / "uploads.json").write_text(json.dumps(given))
    (folder / "names.json").write_text(json.dumps([name[:2] for name in NAMES]))
    ours = str(CHECKOUT / "tests" / "scripts" / "load_by_names.py")
    theirs = str(Path(__file__).with_name("load_by_saelens_name.py"))
    with LoopbackHub() as hub:
        variables = hub.environment(folder / "home")
        for command, path in (
            ([sys.executable, ours, "."], str(CHECKOUT)),
            ([str(Path(PEERS).expanduser()), theirs, "names.json", "."], ""),
        ):
            run = subprocess.run(
                command, cwd=folder, env=variables | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
            )
            assert run.returncode == 0, run.stderr[-4000:]
    return folder


def test_the_table_is_the_installed_registry() -> None:
    code = (
        "import json; from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory as d;"
        "print(json.dumps({n: [r.repo_id, {k: str(v) for k, v in r.saes_map.items()}, r.neuronpedia_id] for n, r in"
        " d().items()}))"
    )
    run = subprocess.run([str(Path(PEERS).expanduser()), "-c", code], capture_output=True, text=True, check=True)
    theirs = json.loads(run.stdout.splitlines()[-1])
    assert set(theirs) == set(saelens_releases())
    for release, (repository, paths, pages) in theirs.items():
        ours = {sae.sae_id: sae for sae in saes_of(release)}
        patterns = {name: PATHS.get(sae.reader, "{}") for name, sae in ours.items()}
        assert {name: sae.path for name, sae in ours.items()} == {n: patterns[n].format(p) for n, p in paths.items()}
        assert {sae.repository for sae in ours.values()} == {repository}
        assert {name: sae.neuronpedia or None for name, sae in ours.items()} == pages


@pytest.mark.parametrize("number", range(len(NAMES)), ids=["/".join(name[:2]) for name in NAMES])
def test_config_and_numbers(loaded: Path, number: int) -> None:
    release, sae_id, _, hook = NAMES[number]
    ours, theirs = (json.loads((loaded / f"{number}{kind}.json").read_text()) for kind in (".ours", ""))
    assert (ours["d_in"], ours["d_sae"]) == (theirs["d_in"], theirs["d_sae"])
    assert ours["metadata"]["sae_lens"] == f"{release}/{sae_id}"
    assert theirs["hook_name"] == hook
    place: dict[str, Any] = place_of_hook(hook)
    assert (ours["layer"], ours["site"]) == (place["layer"], place["site"])
    if release in OTHER_NUMBERS:
        return
    assert ours["apply_b_dec_to_input"] == theirs["apply_b_dec_to_input"]
    mine, others = (load_file(loaded / f"{number}{kind}.safetensors") for kind in (".ours", ""))
    for name in ("features", "reconstruction"):
        torch.testing.assert_close(mine[name], others[name], rtol=1e-5, atol=1e-5)
