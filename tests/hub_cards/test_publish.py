"""Publishing against the loopback Hub, in this process: refusals, one commit, repetition."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

from sae_transformers.hub_cards.card_file import is_ours, marked
from sae_transformers.hub_cards.facts import read_model
from sae_transformers.hub_cards.model_card import model_card
from sae_transformers.hub_cards.publish import (
    CannotPublish,
    Pushed,
    difference,
    has_first_card,
    kind_of,
    prepared,
    push,
)
from sae_transformers.hub_cards.verification import NotAsPushed, verify
from tests.hub_cards import folders
from tests.loopback_hub import TOKEN, LoopbackHub

REPO = "tester/m"
# How huggingface_hub 2.4 sends large files is deprecated in the HTTP library under it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with LoopbackHub(lfs_from=100) as server:
        yield server


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folders.model(tmp_path / "m")


def api(hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=hub.url, token=TOKEN)


def published(hub: LoopbackHub, folder: Path, options: dict[str, Any] | None = None, **given: Any) -> Pushed:
    with prepared(folder, REPO, **(options or {})) as publication:
        return push(publication, api=api(hub), **given)


def held(hub: LoopbackHub, kind: str = "models", revision: str = "main") -> dict[str, bytes]:
    files = dict(hub.repo(kind, REPO).resolve(revision).files)
    files.pop(".gitattributes", None)
    return files


def titles(hub: LoopbackHub, kind: str = "models") -> list[str]:
    return [commit.title for commit in hub.repo(kind, REPO).history("main")]


# -- refusals --------------------------------------------------------------------------------------------------------


def edit(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        folders.write_json(path, {**(json.loads(path.read_text()) if path.exists() else {}), **values})

    return change


def put(name: str, content: bytes | str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a token": (put("notes.txt", "hf_" + "aB3d" * 9), r"notes.txt: a Hugging Face token \(line 1\)"),
    "a file of secrets": (put(".env", "A=1"), "usually holds a secret"),
    "a pickle by name": (put("training.bin", ""), "a pickle by its name"),
    "a pickle by its bytes": (put("weights.dat", pickle.dumps([1])), "a pickle by its first bytes"),
    "a path in a README": (put("README.md", folders.CARD + "\n/home/me/model\n"), "README.md: the absolute path"),
    "a path in JSON": (edit("notes.json", out="/root/x/y"), r"'/root/x/y' \(out\)"),
    "a local base": (edit("config.json", base_model_name_or_path="/root/base"), r"folder of this machine.*`base`"),
    "a relative base": (edit("config.json", base_model_name_or_path="./base"), "folder of this machine"),
    "no base": (edit("config.json", base_model_name_or_path=None), "names no base"),
    "a checkpoint": (put("checkpoint-10/model.safetensors", ""), "checkpoint-10/model.safetensors.*`exclude`"),
    "a draft": (put("model.safetensors.part", ""), ": of a run"),
    "an optimizer": (put("optimizer.safetensors", ""), ": of a run"),
    "a trainer's state": (put("trainer_state.json", "{}"), ": of a run"),
    "training state": (put("sae_training_state.safetensors", ""), ": of a run"),
    "no code": (remove("modeling_sae_causal_lm.py"), "modeling_sae_causal_lm.py: missing"),
    "code that others need": (remove("steering.py"), "steering.py: missing"),
    "code without the class": (put("modeling_sae_causal_lm.py", "x = 1\n"), "has no class SaeForCausalLM"),
    "broken code": (put("steering.py", "def\n"), "steering.py: no Python"),
    "no auto_map": (edit("config.json", auto_map={}), "no auto_map"),
    "another architecture": (edit("config.json", architectures=["LlamaForCausalLM"]), "`architectures`"),
    "no weights": (remove("model.safetensors"), "model.safetensors: missing"),
    "weights cut short": (put("model.safetensors", b"\x10" + bytes(40)), "no safetensors file"),
    "a broken config": (put("config.json", "{"), "is no JSON"),
    "no config": (remove("config.json"), "config.json: missing"),
    "no card": (remove("README.md"), r"README.md: missing.*sae-transformers card"),
    "a card without metadata": (put("README.md", "# m\n"), "no metadata"),
    "a card with broken metadata": (put("README.md", "---\na: [\n---\n# m\n"), "metadata cannot be read"),
    "results in broken metadata": (put("README.md", "---\nmodel-index:\n- name: x\n---\n# m\n"), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_cannot_be_published_is_refused(model: Path, case: str) -> None:
    change, message = REFUSED[case]
    change(model)
    with pytest.raises(CannotPublish, match=message) as caught, prepared(model, REPO):
        pass
    assert "nothing was sent" in str(caught.value) and "aB3daB3d" not in str(caught.value)


def test_weights_that_are_cut_by_a_byte_and_missing_shards_are_found(model: Path) -> None:
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(CannotPublish, match="cut short"), prepared(model, REPO):
        pass
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    (model / "model-1.safetensors").write_bytes(whole)
    folders.write_json(
        model / "model.safetensors.index.json",
        {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}},
    )
    with pytest.raises(CannotPublish, match="model-2.safetensors: missing"), prepared(model, REPO):
        pass


def test_every_reason_is_told_at_once(model: Path) -> None:
    for case in ("a token", "a checkpoint", "no base"):
        REFUSED[case][0](model)
    with pytest.raises(CannotPublish) as caught, prepared(model, REPO):
        pass
    assert len(caught.value.reasons) == 3


def test_names_that_cannot_be_are_refused(model: Path, tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [{"repo_id": "m"}, {"kind": "modle"}, {"base": "/root/x"}]
    for options in wrong:
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"{name}={value!r}"), prepared(model, **{"repo_id": REPO, **options}):
            pass
    with pytest.raises(FileNotFoundError, match="is none"), prepared(tmp_path / "nothing", REPO):
        pass
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="nothing to publish"), prepared(tmp_path / "empty", REPO):
        pass
    (model / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="a link to a folder"), prepared(model, REPO):
        pass


def test_what_is_excluded_or_a_tools_own_is_left_out(hub: LoopbackHub, model: Path) -> None:
    for name in (
        "checkpoint-1/optimizer.pt",
        "__pycache__/a.pyc",
        ".git/config",
        ".DS_Store",
        "notes.json",
        ".gitignore",
    ):
        put(name, "/home/me/x")(model)
    published(hub, model, {"exclude": ["checkpoint-*", "notes.json"]})
    assert set(held(hub)) == {
        path.name for path in model.iterdir() if path.suffix in (".py", ".md", ".safetensors")
    } | {"config.json"}


def test_paths_can_be_allowed_and_secrets_cannot(hub: LoopbackHub, model: Path) -> None:
    put("notes.json", '"/home/me/x"')(model)
    assert published(hub, model, {"allow_paths": True}).new
    REFUSED["a token"][0](model)
    with pytest.raises(CannotPublish, match="token"), prepared(model, REPO, allow_paths=True):
        pass


# -- one commit ------------------------------------------------------------------------------------------------------


def test_a_push_is_one_commit_and_its_repetition_none(hub: LoopbackHub, model: Path, tmp_path: Path) -> None:
    (tmp_path / "dashboard" / "data").mkdir(parents=True)
    (tmp_path / "dashboard" / "index.html").write_text("<p>")
    (tmp_path / "dashboard" / "data" / "0.js").write_text("1")
    options = {"dashboard": tmp_path / "dashboard"}
    first = published(hub, model, options, private=True)
    expected = {path.name: path.read_bytes() for path in model.iterdir()}
    expected |= {"dashboard/index.html": b"<p>", "dashboard/data/0.js": b"1"}
    assert held(hub) == expected and first.new and first.commit == hub.repo("models", REPO).branches["main"]
    assert titles(hub) == ["Publish m", "initial commit"] and hub.repo("models", REPO).private
    assert any("PUT /lfs/" in request for request in hub.requests)
    hub.requests.clear()
    again = published(hub, model, options)
    assert again == Pushed(first.commit, first.url, False)
    assert not any(request.split()[0] in ("POST", "PUT") for request in hub.requests)
    assert TOKEN not in f"{first}{hub.requests}"


def test_only_what_changed_is_sent_and_what_is_gone_goes(hub: LoopbackHub, model: Path) -> None:
    put("extra.py", "x = 1\n")(model)
    put("notes.txt", "kept")(model)
    published(hub, model)
    (model / "extra.py").unlink()
    (model / "notes.txt").unlink()
    folders.safetensors(model / "model.safetensors", numbers=7)
    done = published(hub, model)
    assert (done.sent, done.deleted) == (["model.safetensors"], ["extra.py"])
    assert "notes.txt" in held(hub) and "extra.py" not in held(hub)
    assert held(hub)["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert len(titles(hub)) == 3


def test_a_single_file_is_a_dashboard_too_and_replaces_the_other(
    hub: LoopbackHub, model: Path, tmp_path: Path
) -> None:
    for name in ("a.html", "b.html"):
        (tmp_path / name).write_text(name)
        published(hub, model, {"dashboard": tmp_path / name})
    assert [name for name in held(hub) if name.startswith("dashboard/")] == ["dashboard/b.html"]
    published(hub, model)  # without one it stays
    assert "dashboard/b.html" in held(hub)


@pytest.mark.slow
def test_a_branch_and_a_pull_request(hub: LoopbackHub, model: Path) -> None:
    published(hub, model)
    main = held(hub)
    put("more.txt", "more")(model)
    on_branch = published(hub, model, revision="next")
    assert on_branch.new and held(hub) == main and held(hub, revision="next")["more.txt"] == b"more"
    request = published(hub, model, create_pr=True)
    assert request.new and request.url.endswith("/discussions/1") and held(hub) == main
    again = published(hub, model, create_pr=True)
    assert (again.new, again.commit) == (False, request.commit)
    assert len(hub.repo("models", REPO).requests) == 1
    assert published(hub, model).new and held(hub)["more.txt"] == b"more"


def test_someone_elses_commit_in_between_is_not_lost(hub: LoopbackHub, model: Path) -> None:
    published(hub, model)
    put("more.txt", "more")(model)

    def meddle(method: str, path: str) -> None:
        if "preupload" in path:
            hub.before = lambda method, path: None
            repo = hub.repo("models", REPO)
            repo.commit("main", {**repo.resolve("main").files, "theirs.txt": b"1"}, "theirs")

    hub.before = meddle
    with pytest.raises(OSError, match="changed by somebody else meanwhile"):
        published(hub, model)
    assert "more.txt" not in held(hub)
    published(hub, model)
    assert {"more.txt", "theirs.txt"} <= set(held(hub))


def test_another_model_is_not_replaced_by_a_slip_of_a_name(hub: LoopbackHub, model: Path) -> None:
    api(hub).create_repo(REPO)
    repo = hub.repo("models", REPO)
    theirs = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"1", "model-1.safetensors": b"2"}
    repo.commit("main", theirs, "theirs")
    with pytest.raises(ValueError, match=r"another model \(model_type='llama'\).*`force`"):
        published(hub, model)
    assert repo.resolve("main").files == theirs
    published(hub, model, force=True)
    assert set(held(hub)) == {path.name for path in model.iterdir()}


def test_private_does_not_hold_for_a_public_repository(hub: LoopbackHub, model: Path) -> None:
    published(hub, model)
    put("more.txt", "more")(model)
    with pytest.raises(ValueError, match="exists and is public"):
        published(hub, model, private=True)
    assert "more.txt" not in held(hub)


def test_a_base_of_this_machine_gets_its_name_on_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    local = str(tmp_path / "base")
    model = folders.model(tmp_path / "m", base_model_name_or_path=local, text_config={"_name_or_path": local})
    folders.write_json(model / "record.json", {"base": local, "é": "kept"})
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with prepared(model, REPO, base="org/base") as publication:
        assert set(publication.changed) == {"config.json", "record.json"} and publication.base_folder == local
        push(publication, api=api(hub))
    config = json.loads(held(hub)["config.json"])
    assert config["base_model_name_or_path"] == config["text_config"]["_name_or_path"] == "org/base"
    assert held(hub)["record.json"] == before["record.json"].replace(local.encode(), b"org/base")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before  # the folder stays as it is


def test_a_card_of_ours_calls_the_repository_by_its_id(hub: LoopbackHub, model: Path) -> None:
    (model / "README.md").write_text(model_card(read_model(model)))
    published(hub, model)
    card = held(hub)["README.md"].decode()
    assert "# tester/m\n" in card and 'from_pretrained("tester/m", trust' in card and is_ours(card)
    by_hand = (model / "README.md").read_text().replace("## Use", "## How")
    (model / "README.md").write_text(by_hand)
    published(hub, model)
    assert held(hub)["README.md"].decode() == by_hand


@pytest.mark.slow
def test_an_sae_a_data_set_and_a_space_are_published_too(hub: LoopbackHub, tmp_path: Path) -> None:
    sae = tmp_path / "sae"
    folders.write_json(sae / "config.json", folders.SAE)
    folders.safetensors(sae / "model.safetensors")
    put("README.md", folders.CARD)(sae)
    data = folders.spans(tmp_path / "spans")
    put("README.md", folders.CARD)(data)
    space = tmp_path / "space"
    put("README.md", "---\nsdk: gradio\n---\n# s\n")(space)
    put("app.py", "print()\n")(space)
    for folder, kind in ((sae, "model"), (data, "dataset"), (space, "space")):
        assert kind_of(folder) == kind
        done = published(hub, folder)
        assert done.new
        with prepared(folder, REPO) as publication:
            assert verify(publication, done.commit, api=api(hub)).files == len(held(hub, f"{kind}s"))
    states = folders.harvest(tmp_path / "states", model=str(tmp_path / "base"))
    put("README.md", folders.CARD)(states)
    with pytest.raises(CannotPublish, match="index.json: the absolute path"), prepared(states, "tester/states"):
        pass
    with prepared(states, "tester/states", base="org/base") as publication:
        assert json.loads(publication.files["index.json"].read_text())["model"] == "org/base"
    assert set(held(hub, "datasets")) == {"README.md", "spans.json", "spans.parquet"}  # the work folder stays here


def test_what_was_changed_on_the_hub_is_found(hub: LoopbackHub, model: Path) -> None:
    published(hub, model)
    repo = hub.repo("models", REPO)
    with prepared(model, REPO) as publication:
        commit = repo.commit("main", {**repo.resolve("main").files, "steering.py": b"other"}, "theirs")
        with pytest.raises(NotAsPushed, match="steering.py"):
            verify(publication, commit.id, api=api(hub))
        found = difference(api(hub), publication)
        assert (list(found.send), list(found.delete), found.head) == (["steering.py"], [], commit.id)


def test_no_token_and_no_hub_are_told(hub: LoopbackHub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with prepared(model, REPO) as publication:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", os.devnull)
        with pytest.raises(ValueError, match="no token"):
            push(publication, api=HfApi(endpoint=hub.url))
        monkeypatch.setattr("huggingface_hub.utils._http._DEFAULT_RETRY_ON_EXCEPTIONS", (), raising=False)
        with pytest.raises(OSError, match="The Hub did not answer for tester/m"):
            push(publication, api=HfApi(endpoint="http://127.0.0.1:9", token=TOKEN))


def test_a_mark_survives_a_push_and_a_pull(hub: LoopbackHub, model: Path) -> None:
    (model / "README.md").write_text(marked(folders.CARD))
    published(hub, model)
    assert is_ours(held(hub)["README.md"].decode())


def test_the_first_card_is_known_as_such(hub: LoopbackHub, model: Path) -> None:
    template = '# {title}\n\nfrom_pretrained("{repo}")\n'
    put("README.md", "---\ntags: []\n---\n# m\n")(model)
    with prepared(model, REPO) as publication:
        assert not has_first_card(publication, template)
    template = "---\ntags: []\n---\n" + template
    put("README.md", template.format(title="m", repo="m"))(model)
    with prepared(model, REPO, first_cards=[template]) as publication:
        assert has_first_card(publication, template)
        assert 'from_pretrained("tester/m")' in publication.files["README.md"].read_text()
