"""The verb `evaluate`, from files to results.json, on tiny models."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering
from sae_transformers.cli import app
from sae_transformers.evaluation.capability import answers as capability_answers
from sae_transformers.evaluation.results import Measurement, Results, read_results, write_results
from sae_transformers.evaluation.settings import BootstrapSettings
from sae_transformers.evaluation.suites import DetectionSuite, ReconstructionSuite
from sae_transformers.evaluation.suites.settings import DetectionSettings
from sae_transformers.latents.settings import ReadingSettings
from tests.create_training_data.words import WORDS, word_texts, word_tokenizer
from tests.loopback_hub import LoopbackHub
from tests.tiny import tiny_base, tiny_sae

SMALL = ("--max-length", 16, "--resamples", 20, "--seeds", "0", "--ks", "1,3")
MINE = "reconstruction,detection,fairness"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("evaluate"), random.Random(0)
    tokenizer = word_tokenizer()
    base = tiny_base(vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder / "base")  # the model has none, as attach leaves it
    base.save_pretrained(folder / "base")
    sae = tiny_sae(layer=1, site="resid_post", concepts={"sea": 9})
    sae.save_pretrained(folder / "sae")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    steering = Steering([FeatureEdit(0, 3, "direction", 5.0)])
    SaeForCausalLM.from_base(base, saes=[sae], steering=steering).save_pretrained(folder / "model")
    rows = []
    for i in range(40):
        some = draw.choices(WORDS[:4] if i % 2 else WORDS[4:8], k=4) + draw.choices(WORDS[20:], k=6)
        rows.append({"text": " ".join(some), "label": i % 2})
    for name, found in (
        ("labelled", rows),
        ("few", rows[:9]),
        ("ones", rows[1::2]),
        ("three", [*rows, {**rows[0], "label": 2}]),
    ):
        write_table(folder / f"{name}.csv", found)
    write_table(folder / "original.csv", [{"text": row["text"]} for row in rows[:8]])
    write_table(folder / "swapped.csv", [{"text": row["text"].replace("w1", "w30")} for row in rows[:8]])
    (folder / "texts.txt").write_text("\n\n".join(word_texts(8, shortest=4)), encoding="utf-8")
    (folder / "words.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in word_texts(4)), encoding="utf-8"
    )
    (folder / "prompts.txt").write_text("\n".join(word_texts(4)), encoding="utf-8")
    (folder / "steering.json").write_text(steering.to_json(), encoding="utf-8")
    (folder / "empty.txt").write_text("", encoding="utf-8")
    write_table(folder / "crows.csv", [
        {"sent_more": f"{a} w1 w9", "sent_less": f"{a} w2 w9", "bias_type": kind}
        for a, kind in zip(word_texts(4), ("gender", "gender", "age", "age"), strict=True)
    ])  # fmt: skip
    return folder


def write_table(path: Path, rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


@pytest.fixture(autouse=True)
def in_the_folder(command_line: None, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.chdir(folder)


def given(out: Path, *options: object, model: str = "model", data: bool = True) -> list[str]:
    files = ["--texts", "texts.txt", "--labelled", "labelled.csv", "--crows-pairs", "crows.csv"] if data else []
    return [str(one) for one in ("evaluate", model, "--out", out, *SMALL, *files, *options)]


def run(out: Path, *options: object, **more) -> Result:
    return CliRunner().invoke(app, given(out, *options, **more))


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A whole run of three suites."""
    out, here = tmp_path_factory.mktemp("out"), Path.cwd()
    os.chdir(folder)
    try:
        result = run(out, "--suite", MINE)
    finally:
        os.chdir(here)
    assert result.exit_code == 0, result.output
    return out, result


def measured(out: Path) -> dict[str, list]:
    return {name: list(suite.measurements) for name, suite in read_results(out / "results.json").suites.items()}


def assert_same_numbers(found: Sequence[Measurement], expected: Sequence[Measurement]) -> None:
    """Of two processes, whose memory is aligned differently: equal but for the rounding of float32."""
    no_numbers = {"value": None, "low": None, "high": None}
    assert [replace(one, **no_numbers) for one in found] == [replace(one, **no_numbers) for one in expected]
    for name in no_numbers:
        told, wanted = ([getattr(one, name) for one in side] for side in (found, expected))
        assert [number is None for number in told] == [number is None for number in wanted]
        known = [number for number in wanted if number is not None]
        assert [number for number in told if number is not None] == pytest.approx(known, rel=1e-5, abs=1e-6), name


def test_the_record_says_what_was_measured_on_what(done: tuple[Path, Result], folder: Path) -> None:
    record = read_results(done[0] / "results.json")
    assert list(record.suites) == MINE.split(",")
    assert record.model["saes"][0]["place"] == "layers.1.resid_post" and record.model["saes"][0]["d_sae"] == 64
    assert record.model["steering"]["edits"][0]["feature"] == 3 and record.model["base"].endswith("base")
    assert record.versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert record.created.endswith("+00:00")
    assert record.command == (
        f"sae-transformers evaluate model --suite {MINE} --max-length 16 --resamples 20 --texts texts.txt "
        "--labelled labelled.csv --seeds 0 --ks 1,3 --crows-pairs crows.csv"
    )
    names = {name: [one.name for one in suite.data] for name, suite in record.suites.items()}
    assert names == {"reconstruction": ["texts.txt"], "detection": ["labelled.csv"], "fairness": ["crows.csv"]}
    assert len(record.suites["detection"].data[0].sha256) == 64 and record.suites["detection"].data[0].rows == 40
    assert str(folder) not in json.dumps(record.to_dict()["suites"])


def test_numbers_are_those_of_the_suites(done: tuple[Path, Result], folder: Path) -> None:
    found, model = measured(done[0]), SaeForCausalLM.from_pretrained(folder / "model")
    texts = (folder / "texts.txt").read_text(encoding="utf-8").split("\n\n")
    suite = ReconstructionSuite(texts, ReadingSettings(16, tokens_per_batch=1024), BootstrapSettings(20))
    expected = suite(model, word_tokenizer())
    assert found["reconstruction"] == expected.measurements
    with (folder / "labelled.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels = [int(row["label"]) for row in rows]
    settings = DetectionSettings(
        (0,), (1, 3), reading=ReadingSettings(16, tokens_per_batch=1024), bootstrap=BootstrapSettings(20)
    )
    expected = DetectionSuite([row["text"] for row in rows], labels, None, settings)(model, word_tokenizer())
    assert found["detection"] == expected.measurements
    assert {m.method for m in found["fairness"]} == {"none", "steered"}


def test_the_table_shows_value_interval_n_and_baseline(done: tuple[Path, Result]) -> None:
    text, found = done[1].stdout, measured(done[0])
    for name in MINE.split(","):
        assert f"{name} (" in text
    one = next(m for m in found["fairness"] if m.metric == "stereotype_gap_nats" and m.method == "steered")
    base = next(m for m in found["fairness"] if m.metric == "stereotype_gap_nats" and m.method == "none")
    row = next(line for line in text.splitlines() if f"{one.value:.4g}" in line and "steered" in line)
    assert f"{one.low:.4g} to {one.high:.4g}" in row and f"{base.value:.4g}" in row and " 2 " in row
    assert "w1 " not in text  # numbers, no texts


def test_what_identifies_a_run_is_stored_as_before(tmp_path: Path) -> None:
    """Under the names that options had when records began to be kept, so that a run begun then goes on."""
    options = ("--labelled", "labelled.csv", "--prompts", "prompts.txt", "--new-tokens", 4, "--strengths", "0.2")
    login = ("--llm-url", "http://reader:pass-word@127.0.0.1:9/v1")  # nothing is asked there, and it is in no record
    result = run(tmp_path, "--suite", "steering", *options, *login, "--rows-at-once", 4, data=False)
    assert result.exit_code == 0, result.output
    assert "pass-word" not in (tmp_path / "results.json").read_text() + result.output
    assert "--new-tokens is now --max-new-tokens." in result.stderr
    suite = read_results(tmp_path / "results.json").suites["steering"]
    assert suite.settings["asked"] == {
        "new_tokens": 4, "temperature": 0.7, "generation_seeds": 1, "perplexity_limit": 1.6, "repetition_limit": None,
        "chat": False, "samples": 0, "rows_at_once": 4, "resamples": 20, "seed": 0, "scorer": "words",
        "strengths": [0.2], "goals": ["raise", "lower"], "tokens_at_once": 1024, "feature": None, "more": "",
        "less": "", "op": "direction", "max_length": 16, "max_labelled": 500, "text_column": "text",
        "label_column": "label", "judge_model": None,
        "judge_url": "http://127.0.0.1:9/v1",
    }  # fmt: skip
    assert suite.settings["command"].endswith("--generation-batch-size 4 --llm-url http://127.0.0.1:9/v1")
    named = {one.of.feature for one in suite.measurements if one.of is not None and one.method.startswith("latent")}
    assert named == {9}


def test_what_is_there_is_not_measured_again(done: tuple[Path, Result], tmp_path: Path) -> None:
    before = read_results(done[0] / "results.json")
    write_results(before, tmp_path / "results.json")
    first = run(tmp_path, "--suite", MINE)
    assert first.exit_code == 0 and first.stdout.count("already (--again measures it anew)") == 3
    assert read_results(tmp_path / "results.json") == before
    other = run(tmp_path, "--suite", "reconstruction", "--max-texts", 5, "--plots")
    assert other.exit_code == 0 and "already" not in other.stdout, other.output
    after = read_results(tmp_path / "results.json")
    assert (
        after.suites["detection"] == before.suites["detection"]
        and after.suites["reconstruction"].settings["texts"] == 5
    )
    assert len(after.command.splitlines()) == 2 and "--max-texts 5" in after.command.splitlines()[0]
    assert (tmp_path / "reconstruction.png").stat().st_size > 1000
    again = run(tmp_path, "--suite", "reconstruction", "--max-texts", 5, "--again")
    assert again.exit_code == 0 and "already" not in again.stdout
    same = read_results(tmp_path / "results.json").suites["reconstruction"]
    assert same.measurements == after.suites["reconstruction"].measurements


def test_changed_data_and_other_versions_are_measured_again(done: tuple[Path, Result], tmp_path: Path) -> None:
    before = read_results(done[0] / "results.json")
    only = replace(before, suites={name: before.suites[name] for name in ("reconstruction", "fairness")})
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(word_texts(8, shortest=4, seed=5)), encoding="utf-8")
    write_results(only, tmp_path / "results.json")
    changed = run(tmp_path, "--suite", "reconstruction", "--texts", texts)
    assert changed.exit_code == 0 and "already" not in changed.stdout, changed.output
    write_results(replace(only, versions={**only.versions, "torch": "1.0"}), tmp_path / "results.json")
    result = run(tmp_path, "--suite", "reconstruction")
    assert result.exit_code == 0 and "already" not in result.stdout, result.output
    after = read_results(tmp_path / "results.json")
    assert "1.0" in after.suites["fairness"].notes[-1] and "versions" in after.suites["fairness"].notes[-1]
    assert after.suites["reconstruction"].measurements == only.suites["reconstruction"].measurements
    assert after.versions == before.versions


def test_a_record_of_another_model_is_kept(done: tuple[Path, Result], tmp_path: Path) -> None:
    before = read_results(done[0] / "results.json")
    write_results(before, tmp_path / "results.json")
    other = run(tmp_path, "--suite", "speed", "--sae", "sae", model="base")
    assert other.exit_code == 2 and "of another model" in other.stderr and "another steering" in other.stderr
    assert read_results(tmp_path / "results.json") == before
    small = ("--prompt-tokens", 8, "--generated-tokens", 2, "--repeats", 1)
    anew = run(tmp_path, "--suite", "speed", "--sae", "sae", *small, "--again", model="base")
    assert anew.exit_code == 0, anew.output
    after = read_results(tmp_path / "results.json")
    assert list(after.suites) == ["speed"] and after.model["name"] == "base" and after.model["steering"] is None
    assert "steered" not in {m.method for m in after.suites["speed"].measurements}


def test_a_base_with_saes_and_steering_equals_the_published_model(done: tuple[Path, Result], tmp_path: Path) -> None:
    options = ("--sae", "sae", "--steering", "steering.json", "--suite", "fairness,reconstruction")
    result = run(tmp_path, *options, model="base")
    assert result.exit_code == 0, result.output
    found, expected = measured(tmp_path), measured(done[0])
    assert found["fairness"] == expected["fairness"] and found["reconstruction"] == expected["reconstruction"]


def test_without_suite_all_whose_data_is_given(tmp_path: Path) -> None:
    small = ("--prompt-tokens", 8, "--generated-tokens", 2, "--repeats", 1)
    swaps = ("--original", "original.csv", "--swapped", "swapped.csv", "--feature", "5", "--feature", "0:sea")
    result = run(tmp_path, *swaps, *small, data=False)
    assert result.exit_code == 0, result.output
    record = read_results(tmp_path / "results.json")
    assert list(record.suites) == ["fairness", "speed"]
    methods = {m.method for m in record.suites["fairness"].measurements}
    assert methods == {"latent 5 of SAE 0", "sea of SAE 0", "random latent of SAE 0"}


def test_the_steering_suite_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    """DiffMean makes a model of its own; what comes after it has the old one again."""
    options = ("--labelled", "labelled.csv", "--prompts", "prompts.txt", "--max-new-tokens", 4, "--strengths", "0.2")
    more = ("--crows-pairs", "crows.csv", "--goals", "raise", "--temperature", 0)
    result = run(tmp_path, "--suite", "steering,fairness", *options, *more, data=False)
    assert result.exit_code == 0, result.output
    alone = run(tmp_path / "alone", "--suite", "fairness", *more, data=False)
    assert alone.exit_code == 0, alone.output
    assert measured(tmp_path)["fairness"] == measured(tmp_path / "alone")["fairness"]
    methods = {m.method for m in measured(tmp_path)["steering"]}
    assert {"none", "latent sea (raise)", "diffmean (raise)", "steering (raise)"} <= methods


def test_capability_runs_on_local_files(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    result = run(tmp_path, "--suite", "capability", "--lambada", "words.jsonl", "--limit", 3, data=False)
    assert result.exit_code == 0, result.output
    found = read_results(tmp_path / "results.json").suites["capability"]
    assert found.value("log_likelihood_difference", "none") == 0.0 and found.data[0].name == "words.jsonl"


@pytest.mark.parametrize("suite", ["steering", "capability"])
def test_a_suite_that_is_stopped_goes_on(suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if suite == "capability":
        pytest.importorskip("lm_eval")
        options = ["--suite", suite, "--lambada", "words.jsonl", "--limit", 2]
        owner, name, after, fitted = capability_answers, "run_tasks", 2, 0  # of base, unsteered and steered
    else:
        options = ["--suite", suite, "--labelled", "labelled.csv", "--prompts", "prompts.txt", "--max-new-tokens", 4,
                   "--strengths", "0.2", "--generation-batch-size", 4]  # fmt: skip
        owner, name, after, fitted = SaeForCausalLM, "generate", 5, 1  # DiffMean
    original, calls = getattr(owner, name), []

    def counted(*given, **more):
        calls.append(1)
        if len(calls) == stop:
            raise RuntimeError("in place of a kill")
        return original(*given, **more)

    monkeypatch.setattr(owner, name, counted)
    stop = 0
    assert run(tmp_path / "whole", *options, data=False).exit_code == 0
    whole, stop = len(calls), len(calls) + after + 1
    assert run(tmp_path, *options, data=False).exit_code != 0
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [f"results.{suite}.partial.jsonl"]
    stop = 0
    result = run(tmp_path, *options, data=False)
    assert result.exit_code == 0 and f"{suite}: goes on after {after + fitted} parts of" in result.stdout
    assert len(calls) == 2 * whole + 1  # the one that failed, and no other, was done twice
    assert measured(tmp_path) == measured(tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["results.json"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--suite", "speed,taste"], "'speed,taste'"),
        (["--suite", "reconstruction"], "'reconstruction' needs --texts"),
        (["--suite", "detection"], "needs --labelled"),
        (["--suite", "steering"], "needs --prompts"),
        (["--suite", "fairness"], "--winobias or --crows-pairs or --lambada or --original"),
        (["--suite", "capability"], "--lambada or --mmlu"),
        (["--texts", "nothing.txt"], "nothing.txt"),
        (["--texts", "empty.txt"], "empty.txt"),
        (["--texts", "labelled.csv", "--text-column", "no"], "column 'no'"),
        (["--texts", "texts.txt", "--max-texts", "1"], "--max-texts must be an integer of 2 or more"),
        (["--texts", "texts.txt", "--txt-rows", "word"], "--txt-rows='word'"),
        (["--labelled", "ones.csv"], "Both labels must occur"),
        (["--labelled", "three.csv"], "label='2'"),
        (["--labelled", "few.csv"], "5 of label 0"),
        (["--labelled", "labelled.csv", "--seeds", "a"], "--seeds must be whole numbers"),
        (["--labelled", "labelled.csv", "--ks", "0"], "ks=[1, 3, 0]"),
        (["--labelled", "labelled.csv", "--choose-by", "luck"], "--choose-by='luck'"),
        (["--labelled", "labelled.csv", "--max-labelled", "0"], "--max-labelled must be an integer of 1 or more"),
        (["--labelled", "labelled.csv", "--feature", "joy"], "feature='joy'"),
        (["--labelled", "labelled.csv", "--feature", "64"], "feature=64"),
        (["--labelled", "labelled.csv", "--feature", "3:1"], "'3:1'"),
        (["--prompts", "nothing.txt"], "nothing.txt"),
        (["--prompts", "prompts.txt", "--scorer", "taste"], "'taste'"),
        (["--prompts", "prompts.txt", "--scorer", "judge:joy"], "--llm"),
        (["--prompts", "prompts.txt", "--strengths", "a"], "'a'"),
        (["--prompts", "prompts.txt", "--goals", "win"], "win"),
        (["--prompts", "prompts.txt", "--samples-per-prompt", "0"], "--samples-per-prompt=0"),
        (["--prompts", "prompts.txt", "--perplexity-ratio", "0"], "--perplexity-ratio=0"),
        (["--suite", "capability", "--lambada", "words.jsonl", "--limit", "0"], "limit=0"),
        (["--suite", "capability", "--mmlu", "nothing.zip"], "nothing.zip"),
        (["--suite", "speed", "--revision", "3", "--steering", "nothing.json"], "nothing.json"),
        (["--winobias", "nothing"], "nothing"),
        (["--crows-pairs", "labelled.csv"], "CrowS-Pairs has columns"),
        (["--lambada", "labelled.csv", "--suite", "capability"], "labelled.csv"),
        (["--original", "original.csv"], "--original needs --swapped"),
        (["--original", "original.csv", "--swapped", "labelled.csv"], "8, 40"),
        (["--suite", "speed", "--repeats", "0"], "repeats=0"),
        (["--suite", "speed", "--prompt-tokens", "128"], "--prompt-tokens=128"),
        (["--suite", "speed", "--max-length", "129"], "from 2 to 128"),
        (["--suite", "speed", "--steering", "words.jsonl"], "--steering must be the JSON"),
        (["--suite", "speed", "--model-dtype", "int8"], "--model-dtype='int8'"),
        (["--suite", "speed", "--base", "nothing"], "'nothing'"),
        (["--suite", "speed", "--sae", "sae", "--base", "base"], "others go into its base"),
        (["--texts", "texts.txt", "--resamples", "0"], "resamples=0"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path: Path, options: list[str], told: str) -> None:
    result = run(tmp_path / "out", *options, data=False)
    assert result.exit_code == 2, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ") and any(part in last for part in told.split("|")), last
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(("model", "told"), [("base", "has no SAE: give one with --sae"), ("nowhere", "'nowhere'")])
def test_models_without_saes_are_refused(tmp_path: Path, model: str, told: str) -> None:
    result = run(tmp_path, "--suite", "speed", model=model, data=False)
    assert result.exit_code == 2 and told in result.stderr


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}", encoding="utf-8")
    result = run(tmp_path, "--suite", "speed", data=False)
    assert result.exit_code == 2 and "sae_transformers.evaluation/1" in result.stderr
    assert (tmp_path / "results.json").read_text(encoding="utf-8") == "{}"


@pytest.mark.slow
def test_killed_and_run_again_gives_the_same(done: tuple[Path, Result], folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sae_transformers", *given(tmp_path, "--suite", MINE)]
    process = subprocess.Popen(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not (tmp_path / "results.json").exists() and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it wrote anything"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    partly = read_results(tmp_path / "results.json")
    assert list(partly.suites) == ["reconstruction"]
    result = run(tmp_path, "--suite", MINE)
    assert result.exit_code == 0 and result.stdout.count("already") == 1, result.output
    found, expected = measured(tmp_path), measured(done[0])
    assert found.keys() == expected.keys()
    for suite in found:
        assert_same_numbers(found[suite], expected[suite])
    whole: Results = read_results(tmp_path / "results.json")
    assert whole.suites["reconstruction"] == partly.suites["reconstruction"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json"]


PUSH = """
import sys
from huggingface_hub import HfApi
for name in ("base", "published"):
    HfApi().create_repo(f"tester/{name}")
    HfApi().upload_folder(repo_id=f"tester/{name}", folder_path=f"{sys.argv[1]}/{name}")
"""


@pytest.mark.hub
def test_a_model_on_the_hub_whose_base_is_there_too(done: tuple[Path, Result], folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    shutil.copytree(folder / "model", folder / "published")
    changed = json.dumps({**config, "base_model_name_or_path": "tester/base", "base_model_revision": None})
    (folder / "published" / "config.json").write_text(changed, encoding="utf-8")
    with LoopbackHub() as hub:
        env = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(Path(__file__).parents[2])}
        subprocess.run([sys.executable, "-c", PUSH, str(folder)], env=env, check=True, capture_output=True)
        options = given(tmp_path / "out", "--suite", "fairness", "--revision", "main", model="tester/published")
        command = [sys.executable, "-m", "sae_transformers", *options]
        told = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-2000:]
    record = read_results(tmp_path / "out" / "results.json")
    assert_same_numbers(measured(tmp_path / "out")["fairness"], measured(done[0])["fairness"])
    assert (record.model["name"], record.model["base"]) == ("tester/published", "tester/base")
    assert record.command.startswith("sae-transformers evaluate tester/published --suite fairness --revision main")
