"""The loopback Hub, spoken to by the real `huggingface_hub` and `transformers` in another process."""

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.loopback_hub import LoopbackHub, blob_id


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        yield server


def run_client(hub: LoopbackHub, home: Path, script: str, *arguments: object) -> Any:
    """Run `script` as a client of `hub`; its last line of output is JSON."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    result = subprocess.run(command, env=hub.environment(home), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, f"{result.stderr}\n{chr(10).join(hub.requests)}"
    return json.loads(result.stdout.splitlines()[-1])


UPLOAD_AND_TAG = """
    import json, shutil, sys
    from pathlib import Path
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    folder, target = map(Path, sys.argv[1:])
    api = HfApi()
    user = api.whoami()["name"]
    repo = api.create_repo(f"{user}/things").repo_id
    assert api.create_repo(f"{user}/things", exist_ok=True).repo_id == repo
    first = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="first")
    api.create_tag(repo, tag="v1")
    (folder / "a.txt").write_bytes(b"second")
    shutil.rmtree(folder / "deep")
    second = api.upload_folder(repo_id=repo, folder_path=folder, delete_patterns="deep/*")

    # The tag keeps the first snapshot, main goes on.
    snapshot_download(repo, revision="v1", local_dir=target / "v1")
    snapshot_download(repo, local_dir=target / "main")
    cached = Path(snapshot_download(repo, revision=first.oid))

    def refused(error, call, *arguments, **keywords):
        try:
            call(*arguments, **keywords)
        except error:
            return True
        return False

    print(json.dumps({
        "first": first.oid, "second": second.oid, "cached": cached.name, "sha": api.model_info(repo).sha,
        "tags": {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags},
        "titles": [commit.title for commit in api.list_repo_commits(repo)],
        "folders": [e.path for e in api.list_repo_tree(repo, revision="v1") if not hasattr(e, "blob_id")],
        "paths_info": [e.blob_id for e in api.get_paths_info(repo, "a.txt")],
        "no_repo": refused(RepositoryNotFoundError, api.model_info, f"{user}/nothing"),
        "no_revision": refused(RevisionNotFoundError, api.model_info, repo, revision="v9"),
        "no_file": refused(EntryNotFoundError, api.hf_hub_download, repo, "nothing.txt"),
    }))
"""


def test_a_folder_and_a_tag_come_back_byte_for_byte(hub: LoopbackHub, tmp_path: Path) -> None:
    folder, target = tmp_path / "folder", tmp_path / "target"
    files = {
        "a.txt": b"first",
        "deep/er/b.bin": bytes(range(256)) * 5000,
        "empty": b"",
        "README.md": b"---\ntags: []\n---\n",
    }
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)

    told = run_client(hub, tmp_path / "home", UPLOAD_AND_TAG, folder, target)

    assert {path: (target / "v1" / path).read_bytes() for path in files} == files
    assert (target / "main" / "a.txt").read_bytes() == b"second"
    assert not (target / "main" / "deep").exists()
    assert re.fullmatch("[0-9a-f]{40}", told["first"])
    assert told["first"] != told["second"] == told["sha"]
    assert told["cached"] == told["first"] == told["tags"]["v1"]
    assert told["titles"][1:] == ["first", "initial commit"]
    assert told["folders"] == ["deep"]
    assert told["paths_info"] == [blob_id(b"second")]
    assert told["no_repo"] and told["no_revision"] and told["no_file"]
    assert not any("xet" in request or "lfs" in request for request in hub.requests)


PUSH_AND_LOAD = """
    import json
    import torch
    from huggingface_hub import HfApi
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    tokens = torch.arange(8)[None]
    before = model(tokens).logits
    model.push_to_hub("tester/tiny-llama")
    HfApi().create_tag("tester/tiny-llama", tag="v1")
    torch.nn.init.zeros_(model.lm_head.weight)
    model.push_to_hub("tester/tiny-llama")
    tagged = AutoModelForCausalLM.from_pretrained("tester/tiny-llama", revision="v1").eval()
    latest = AutoModelForCausalLM.from_pretrained("tester/tiny-llama").eval()
    print(json.dumps({
        "tagged_is_equal": torch.equal(tagged(tokens).logits, before),
        "latest_is_zero": bool((latest(tokens).logits == 0).all()),
    }))
"""


@pytest.mark.hub
def test_a_model_is_pushed_and_loaded_by_transformers(hub: LoopbackHub, tmp_path: Path) -> None:
    told = run_client(hub, tmp_path, PUSH_AND_LOAD)
    assert told == {"tagged_is_equal": True, "latest_is_zero": True}
    assert "model.safetensors" in hub.repo("models", "tester/tiny-llama").resolve("v1").files
