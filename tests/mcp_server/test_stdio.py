"""The verb `mcp` as agents start it: a process of its own, asked by the official client on stdin and stdout."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import Client, StdioServerParameters
from typer.testing import CliRunner

from sae_transformers import FeatureAnnotations, SaeForCausalLM
from sae_transformers.cli import app
from sae_transformers.mcp_server import server as served
from tests.serving.running import served_model, served_tokenizer

EDITS = [{"feature": "sea", "op": "add", "value": 9.0}]
PROMPTS = ["w3 w4", "w5 w6 w7", "w8 w9", "w10 w11 w12"]
CALLS: dict[str, dict[str, Any]] = {
    "describe_model": {},
    "find_features": {"query": "water"},
    "top_features": {"text": "w3 w4 w5"},
    "read_features": {"text": "w3 w4 w5", "features": ["sea"]},
    "detect": {"texts": ["w3 w4 w5"], "feature": "water without an end"},
    "attribute": {"text": "w3 w4 w5", "target": ["w6"]},
    "steer": {"prompts": ["w3 w4"], "edits": EDITS, "max_new_tokens": 4},
    "evaluate_steering": {"prompts": PROMPTS, "edits": EDITS, "scorer": "refusal", "max_new_tokens": 4},
    "save_steering": {"name": "sea", "edits": EDITS},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mcp") / "my model"
    made: SaeForCausalLM = served_model()
    notes = [{"feature": 9, "description": "water without an end"}]
    made.saes[0].annotations = FeatureAnnotations.from_rows(notes, n_features=64)  # pyright: ignore
    made.config.weights_scope = "full"
    made.save_pretrained(path)
    served_tokenizer().save_pretrained(path)
    return path


def test_an_official_client_lists_and_calls_every_tool(folder: Path, tmp_path: Path) -> None:
    arguments = ["-m", "sae_transformers", "mcp", str(folder), "--allow-write", str(tmp_path / "kept")]
    path = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    environment = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}

    async def ask() -> tuple[list[str], dict[str, Any], Any]:
        process = StdioServerParameters(command=sys.executable, args=arguments, env=environment)
        async with Client(process) as client:
            assert client.server_info is not None and client.server_info.name == "sae-transformers"
            assert "describe_model" in (client.instructions or "")
            names = [tool.name for tool in (await client.list_tools()).tools]
            found = {name: await client.call_tool(name, given) for name, given in CALLS.items()}
            return names, found, await client.call_tool("detect", {"texts": ["w3"], "feature": "see"})

    with anyio.from_thread.start_blocking_portal() as portal:
        names, found, wrong = portal.call(ask)
    assert names == list(CALLS)
    for name, result in found.items():
        assert not result.is_error, (name, result.content)
        assert str(folder.parent) not in result.content[0].text
    assert found["describe_model"].structured_content["name"] == "my model"
    assert found["find_features"].structured_content["features"][0]["feature"] == 9
    assert found["detect"].structured_content["feature"] == 9
    assert found["attribute"].structured_content["target"] == "'w6'"
    assert found["attribute"].structured_content["pairs"][0]["effect"]
    texts = found["steer"].structured_content["texts"][0]
    assert texts["steered"] != texts["unsteered"]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["sea.json"]
    assert wrong.is_error and "it has 'sea'" in wrong.content[0].text


@pytest.mark.usefixtures("command_line")
def test_without_the_package_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, served.__name__)
    monkeypatch.setitem(sys.modules, "mcp.server", None)
    result = CliRunner().invoke(app, ["mcp", str(folder)])
    assert result.exit_code == 2
    assert "mcp needs the package mcp" in result.output and "pip install 'sae-transformers[mcp]'" in result.output


@pytest.mark.usefixtures("command_line")
def test_a_folder_without_a_model_is_told_on_stderr(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["mcp", str(tmp_path)])
    assert result.exit_code == 2 and result.stdout == ""
    assert "holds no config.json" in result.stderr
