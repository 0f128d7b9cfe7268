"""The verbs `card` and `push`: output and exit status; pushes that are killed; models pushed and loaded back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sae_transformers import FeatureEdit, SaeForCausalLM, SaeForSequenceClassification, SparseAutoencoder, Steering
from sae_transformers.cli import app
from sae_transformers.evaluation.results import write_results
from tests.hub_cards import folders
from tests.hub_cards.test_model_card import results
from tests.loopback_hub import TOKEN, LoopbackHub
from tests.tiny import prompt, tiny_base, tiny_sae

REPO = "tester/m"


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(one) for one in arguments])


# -- card ------------------------------------------------------------------------------------------------------------


def test_card_writes_what_is_known(tmp_path: Path) -> None:
    model = folders.model(tmp_path / "m", {**folders.SAE, "concepts": {"praise": 3}})
    (model / "README.md").unlink()
    write_results(results(), tmp_path / "results.json")
    (tmp_path / "facts.yaml").write_text("licence: mit\ntraining_data: Films.\n")
    (tmp_path / "judged.tsv").write_text(folders.ANNOTATIONS)
    options = ["--results", tmp_path / "results.json", "--facts", tmp_path / "facts.yaml"]
    done = invoke("card", model, *options, "--annotations", tmp_path / "judged.tsv", "--repo-id", "me/praise")
    assert done.exit_code == 0, done.output
    assert done.output.split() == [str(model / "README.md")]
    card = (model / "README.md").read_text()
    assert "license: mit" in card and "# me/praise" in card and "auroc 0.912" in card and "Praise of" in card


def test_card_tells_what_it_does_not_know_and_keeps_what_was_edited(tmp_path: Path) -> None:
    model = folders.model(tmp_path / "m")
    done = invoke("card", model)
    assert (
        done.exit_code == 2 and "edited by hand" in done.output and (model / "README.md").read_text() == folders.CARD
    )
    done = invoke("card", model, "--force")
    assert done.exit_code == 0 and "unknown: licence, training_data, results" in done.output
    assert invoke("card", model, "--base", "org/other").exit_code == 0
    assert "base_model: org/other" in (model / "README.md").read_text()


def test_card_of_data_and_of_a_metric(tmp_path: Path) -> None:
    from tests.hub_cards.test_metric_card import folder as metric

    for folder, word in (
        (folders.harvest(tmp_path / "states"), "Hidden states"),
        (metric(tmp_path / "m"), "evaluate.load"),
    ):
        done = invoke("card", folder)
        assert done.exit_code == 0, done.output
        assert word in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "modle"], "--kind must be"),
        (["--results", "nothing.json"], "Expected the results.json"),
        (["--facts", "nothing.yaml"], "Expected a YAML or JSON file"),
        (["--repo-id", "mine"], "user/name"),
        (["--features", "-1"], "--features must be an integer of 0 or more"),
        (["--kind", "metric", "--results", "x.json"], "--results is for a model's card"),
        (["--kind", "dataset"], "Expected a folder that"),
    ],
)
def test_card_refuses_in_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    model = folders.model(tmp_path / "m")
    done = invoke("card", model, "--force", *options)
    assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output
    assert (model / "README.md").read_text() == folders.CARD


def test_push_refuses_before_it_looks_for_the_hub(tmp_path: Path) -> None:
    model = folders.model(tmp_path / "m", base_model_name_or_path="/root/base")
    done = invoke("push", model, REPO)
    assert done.exit_code == 2 and "nothing was sent" in done.output and "--base" in done.output
    done = invoke("push", folders.model(tmp_path / "n"), REPO, "--space", model)
    assert done.exit_code == 2 and "nothing was sent" in done.output
    done = invoke("push", tmp_path / "n", REPO, "--local-base", tmp_path)
    assert done.exit_code == 2 and "--local-base must be a model's folder" in done.output


# -- against the Hub -------------------------------------------------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub(lfs_from=400) as server:
        yield server


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "sae_transformers", *map(str, arguments)]


def run(hub: LoopbackHub, home: Path, *arguments: object, code: int = 0) -> str:
    environment = {**hub.environment(home), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command(*arguments), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr + "\n".join(hub.requests)
    assert TOKEN not in done.stdout + done.stderr and "Traceback" not in done.stderr
    return done.stdout + done.stderr


def held(hub: LoopbackHub, kind: str = "models") -> dict[str, bytes]:
    files = dict(hub.repo(kind, REPO).resolve("main").files)
    files.pop(".gitattributes")
    return files


def large_model(folder: Path) -> Path:
    """Of several files that go by LFS."""
    folders.model(folder)
    for number in range(4):
        folders.safetensors(folder / f"model-{number}.safetensors", numbers=1000 + number)
    return folder


# (how many requests of this form are let through before the kill; whether the repository has the commit then)
KILLS = {
    "when the repository is made": ("POST /api/repos/create", 0, False),
    "before any large file": ("POST /tester/m.git/info/lfs", 0, False),
    "after one large file": ("PUT /lfs/", 1, False),
    "after three large files": ("PUT /lfs/", 3, False),
    "at the commit": ("POST /api/models/tester/m/commit", 0, False),
    "after the commit": ("GET /api/models/tester/m/tree", 1, True),  # the second look at the tree: the verification's
}


@pytest.mark.hub
@pytest.mark.parametrize("case", KILLS)
@pytest.mark.parametrize("again", [False, True], ids=["new", "over an older one"])
def test_a_killed_push_leaves_it_as_before_or_complete(
    hub: LoopbackHub, tmp_path: Path, case: str, again: bool
) -> None:
    form, let_through, complete = KILLS[case]
    if again and case == "when the repository is made":
        pytest.skip("it is there")
    home, model = tmp_path / "home", large_model(tmp_path / "m")
    before = None
    if again:
        run(hub, home, "push", model, REPO, "--no-verify")
        before = held(hub)
        for path in model.glob("*.safetensors"):
            folders.safetensors(path, numbers=2000 + len(path.name))
        hub.objects.clear()
    seen, reached, go = [], threading.Event(), threading.Event()

    def stop(method: str, path: str) -> None:
        if f"{method} {path}".startswith(form):
            seen.append(path)
            if len(seen) > let_through and not reached.is_set():
                reached.set()
                go.wait(60)

    hub.before = stop
    options = [] if complete else ["--no-verify"]
    environment = {**hub.environment(home), "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command("push", model, REPO, *options), env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    while not reached.wait(0.05):  # however long its start takes
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    # What the server had received when the client died it may still finish: the commit alone, and whole.
    hub.before = lambda method, path: None
    go.set()
    expected = {path.name: path.read_bytes() for path in model.iterdir()}
    if ("models", REPO) in hub.repos:
        assert held(hub) in ([expected] if complete else [before or {}, expected])
    told = run(hub, home, "push", model, REPO, "--no-verify")
    assert held(hub) == expected
    commits = [commit.title for commit in hub.repo("models", REPO).history("main")]
    assert commits == ["Publish m"] * (1 + again) + ["initial commit"]
    assert ("no commit was made" in told) == complete or not complete
    assert "no commit was made" in run(hub, home, "push", model, REPO, "--no-verify")


@pytest.mark.hub
def test_a_model_a_classifier_and_an_sae_go_there_and_back(hub: LoopbackHub, tmp_path: Path) -> None:
    """The base is published, the models say where it is here; what comes back is loaded without this library."""
    home, base = tmp_path / "home", tmp_path / "base"
    tiny_base().save_pretrained(base)
    upload = "from huggingface_hub import HfApi; a = HfApi(); a.create_repo('org/base'); "
    upload += "a.upload_folder(repo_id='org/base', folder_path={!r})"
    subprocess.run([sys.executable, "-c", upload.format(str(base))], env=hub.environment(home), check=True)
    sae = tiny_sae(layer=1, concepts={"good": 3})
    model = SaeForCausalLM.from_base(str(base), saes=[sae], steering=Steering([FeatureEdit(0, "good", "add", 3.0)]))
    model.save_pretrained(tmp_path / "m")
    told = run(hub, home, "push", tmp_path / "m", REPO, code=2)
    assert "--base" in told and ("models", REPO) not in hub.repos
    told = run(hub, home, "push", tmp_path / "m", REPO, "--base", "org/base", "--dry-run")
    assert "+ model.safetensors" in told and ("models", REPO) not in hub.repos
    told = run(hub, home, "push", tmp_path / "m", REPO, "--base", "org/base")
    assert "loaded by its own code as SaeForCausalLM, 5 tensors and the outputs are equal" in told
    assert json.loads(held(hub)["config.json"])["base_model_name_or_path"] == "org/base"
    assert b'from_pretrained("tester/m"' in held(hub)["README.md"]

    # As anyone would: by id, with the base from the Hub, in a new process that has not this library's classes.
    hub.repos["models", "tester/classifier"] = hub.repos.pop(("models", REPO))
    script = """
import sys, torch, safetensors.torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("tester/classifier", trust_remote_code=True)
ids = safetensors.torch.load_file(sys.argv[1])["ids"]
logits = {"steered": model(ids).logits, "plain": model(ids, steering=False).logits}
safetensors.torch.save_file(logits, sys.argv[2])
"""
    from safetensors.torch import load_file, save_file

    save_file({"ids": prompt()}, tmp_path / "ids.safetensors")
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "ids.safetensors"), str(tmp_path / "out.safetensors")],
        env=hub.environment(home), check=True, cwd=tmp_path,
    )  # fmt: skip
    found = load_file(tmp_path / "out.safetensors")
    expected = model.eval()(prompt())
    assert (found["steered"] - expected.logits).abs().max() < 1e-5
    assert (found["plain"] - model(prompt(), steering=False).logits).abs().max() < 1e-5
    assert (found["plain"] - found["steered"]).abs().max() > 0.1

    head = SaeForSequenceClassification.from_base(str(base), saes=[sae], weights_scope="full")
    head.save_pretrained(tmp_path / "head")
    told = run(hub, home, "push", tmp_path / "head", REPO, "--base", "org/base")
    assert "outputs are equal" in told and "SaeForSequenceClassification" in told

    SparseAutoencoder(sae.config).save_pretrained(tmp_path / "sae")
    (tmp_path / "sae" / "README.md").unlink(missing_ok=True)
    run(hub, home, "card", tmp_path / "sae")
    assert "files are equal." in run(hub, home, "push", tmp_path / "sae", "tester/sae")


@pytest.mark.hub
def test_a_revision_that_answers_otherwise_is_told(hub: LoopbackHub, tmp_path: Path) -> None:
    """The local base is another one than the Hub's: every file is right, and yet the model is not the same."""
    home, base, other = tmp_path / "home", tmp_path / "base", tmp_path / "other"
    tiny_base().save_pretrained(base)
    tiny_base(architecture="gpt2").save_pretrained(other)
    SaeForCausalLM.from_base(str(base), saes=[tiny_sae(layer=1)]).save_pretrained(tmp_path / "m")
    told = run(hub, home, "push", tmp_path / "m", REPO, "--base", "org/base", "--local-base", other, code=1)
    assert "has every file, but does not load" in told
    told = run(hub, home, "push", tmp_path / "m", REPO, "--base", "org/base")
    assert "no commit was made" in told and "outputs are equal" in told


@pytest.mark.slow
def test_the_quickstarts_model_is_published(hub: LoopbackHub, tmp_path: Path) -> None:
    """As docs/publish.md has it, with the real small model where it is on this machine."""
    from sae_transformers.create_training_data.packages import cache_folder

    base = cache_folder() / "SmolLM2-135M-Instruct-from-Q4_1"
    if not base.is_dir():
        pytest.skip("`sae-transformers quickstart` fetches the model; it was not run here")
    out, home, name = tmp_path / "quickstart", tmp_path / "home", "HuggingFaceTB/SmolLM2-135M-Instruct"
    subprocess.run(command("quickstart", "--small", "--model", base, "--out", out), check=True, capture_output=True)
    (tmp_path / "facts.yaml").write_text("licence: apache-2.0\n")
    run(hub, home, "card", out, "--facts", tmp_path / "facts.yaml", "--base", name)
    told = run(hub, home, "push", out, REPO, code=2)
    assert told.count(str(base)) == 4 and "--base" in told and not hub.repos
    told = run(hub, home, "push", out, REPO, "--base", name)
    assert "quickstart.json, as it is sent" in told and "and the outputs are equal" in told
    assert str(base) not in "".join(content.decode("latin-1") for content in held(hub).values())
    assert set(held(hub)) == {path.name for path in out.iterdir()}
    assert "no commit was made" in run(hub, home, "push", out, REPO, "--base", name, "--no-verify")
