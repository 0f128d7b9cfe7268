"""The command line, on a tiny random model and made-up sentences: everything but the quality of the result."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from sae_transformers.cli import app
from sae_transformers.quickstart import run as quickstart_run
from sae_transformers.quickstart import settings as quickstart_settings
from sae_transformers.quickstart import steps
from sae_transformers.quickstart.settings import Size
from sae_transformers.quickstart.steps import Point
from tests.tiny import LAYERS, tiny_base

PLAIN = ["the", "film", "was", "a", "an", "plot", "actor", "scene", "story"]
ENDINGS = (["bad", "dull", "awful", "poor"], ["good", "great", "fine", "lovely"])  # label 0, label 1
TINY = Size(
    train_texts=60, test_texts=20, latents_per_dimension=2, steps=8, search_samples=1, report_samples=1, new_tokens=4,
    strengths=(0.1, 0.3),
)  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    vocabulary = {
        word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *PLAIN, *ENDINGS[0], *ENDINGS[1]])
    }
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    tiny_base().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chooser, path = random.Random(0), tmp_path_factory.mktemp("text") / "texts.csv"
    lines = ["text,label"]
    for number in range(100):
        words = chooser.choices(PLAIN, k=5) + chooser.choices(ENDINGS[number % 2], k=3)
        lines.append(f"{' '.join(words)},{number % 2}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(autouse=True)
def all_threads(command_line: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart_run, "use_all_cores", torch.get_num_threads)


def quickstart(*arguments: object):
    return CliRunner().invoke(app, ["quickstart", "--small", *map(str, arguments)])


@pytest.fixture
def tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart_settings, "SMALL", TINY)


@pytest.mark.slow  # .ci/run runs `quickstart --small` as well
def test_quickstart_from_texts_to_a_reloaded_model(
    model_folder: Path, dataset: Path, tmp_path: Path, tiny_size: None
) -> None:
    out = tmp_path / "out"
    result = quickstart("--model", model_folder, "--dataset", dataset, "--layer", 1, "--out", out)
    assert result.exit_code == 0, result.output
    record = json.loads((out / "quickstart.json").read_text())
    assert record["reload"]["same_tokens"] is True
    assert record["reload"]["class"].startswith("transformers_modules.")
    assert record["settings"]["sae"]["layer"] == 1 and record["settings"]["sae"]["d_sae"] == 64
    assert record["training"]["tokens"] > 0
    assert 0 <= record["detection_auroc"]["latent"] <= 1
    strengths = [row["strength"] for row in record["steering"]]
    assert strengths == sorted(strengths) and strengths[2] == 0
    # What is shown is what was recorded.
    assert f"{record['detection_auroc']['latent']:.3f}" in result.output
    assert f"{record['detection_auroc']['diffmean']:.3f}" in result.output
    for row in record["steering"]:
        assert f"{row['sentiment']:+.3f}" in result.output and f"{row['perplexity']:.1f}" in result.output
    assert "same tokens" in result.output
    assert {"config.json", "tokenizer.json", "modeling_sae_causal_lm.py"} <= {p.name for p in out.iterdir()}


@pytest.mark.slow
def test_a_reloaded_model_that_differs_is_an_error(
    model_folder: Path, dataset: Path, tmp_path: Path, tiny_size: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        quickstart_run.reload, "generate_in_fresh_interpreter", lambda *args, **options: ([[1, 2, 3]], "a.B")
    )
    result = quickstart("--model", model_folder, "--dataset", dataset, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "other tokens" in result.stderr
    assert json.loads((tmp_path / "out" / "quickstart.json").read_text())["reload"]["same_tokens"] is False


@pytest.mark.slow
def test_a_folder_that_does_not_load_is_an_error(
    model_folder: Path, dataset: Path, tmp_path: Path, tiny_size: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = quickstart_run.reload.generate_in_fresh_interpreter

    def damaged(folder: Path, *args, **options):
        shutil.rmtree(folder)
        return fresh(folder, *args, **options)

    monkeypatch.setattr(quickstart_run.reload, "generate_in_fresh_interpreter", damaged)
    result = quickstart("--model", model_folder, "--dataset", dataset, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "fresh interpreter failed" in result.stderr


def test_bad_input_ends_with_one_line_and_code_2_before_any_model_is_loaded(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "load_base", lambda *args: pytest.fail("began to work"))
    (tmp_path / "file").write_text("")
    (tmp_path / "columns.csv").write_text("sentence,label\nx,1\n")
    good = {"--model": model_folder, "--dataset": dataset, "--out": tmp_path / "out"}
    cases = [
        ({"--layer": LAYERS}, f"layer={LAYERS}"),
        ({"--layer": -1}, "layer=-1"),
        ({"--seed": -1}, "seed=-1"),
        ({"--out": tmp_path / "file"}, "cannot be written"),
        ({"--out": tmp_path / "file" / "below"}, "cannot be written"),
        ({"--dataset": tmp_path / "columns.csv"}, "columns 'sentence', 'label'"),
        ({"--dataset": tmp_path / "none.csv"}, "There is no file"),
        ({"--model": tmp_path}, "no config.json"),
    ]
    for changes, expected in cases:
        result = quickstart(*[part for pair in {**good, **changes}.items() for part in pair])
        assert result.exit_code == 2, (changes, result.output)
        assert expected in result.stderr, (changes, result.stderr)
        assert len(result.stderr.strip().splitlines()) == 1


def point(strength: float, sentiment: float, perplexity: float) -> Point:
    return Point(strength, sentiment, 0.0, perplexity, 0.0, ())


def test_the_search_takes_the_strongest_effect_within_the_limit() -> None:
    known = {
        0.0: point(0.0, 0.2, 10), 0.1: point(0.1, 0.5, 11), 0.2: point(0.2, 0.4, 12), 0.3: point(0.3, 0.9, 30),
        -0.1: point(-0.1, 0.1, 11), -0.2: point(-0.2, -0.3, 15), -0.3: point(-0.3, -0.4, 16),
    }  # fmt: skip
    best, tried = steps.search_strengths(lambda some: [known[s] for s in some], (0.1, 0.2, 0.3), perplexity_limit=1.6)
    assert (best[1].strength, best[-1].strength) == (0.1, -0.3)
    assert [p.strength for p in tried] == [0.0, 0.1, -0.1, 0.2, -0.2, 0.3, -0.3]
    assert list(steps.strengths_to_report(best)) == [-0.3, -0.15, 0.0, 0.05, 0.1]


def test_the_search_keeps_the_weakest_where_all_exceed_the_limit() -> None:
    best, tried = steps.search_strengths(
        lambda some: [point(s, s, 10 if s == 0 else 99) for s in some], (0.1, 0.2), 1.6
    )
    assert (best[1].strength, best[-1].strength, len(tried)) == (0.1, -0.1, 3)


def test_search_and_report_prompts_do_not_overlap() -> None:
    assert not set(quickstart_settings.SEARCH_PROMPTS) & set(quickstart_settings.REPORT_PROMPTS)


def test_help_names_every_option() -> None:
    result = CliRunner().invoke(app, ["quickstart", "--help"], env={"COLUMNS": "120", "TERM": "dumb"})
    assert result.exit_code == 0
    for option in ("--model", "--dataset", "--layer", "--out", "--small", "--seed"):
        assert option in result.output


def test_names_with_underscores_are_whole_in_the_help() -> None:
    """Help is Markdown, where a word between underscores is emphasised and loses them."""
    for verb, command in typer.main.get_command(app).commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        shown = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "400"}).output
        for option in command.params:
            names = re.findall(r"[^\s`(]*_[^\s`),;:]*", option.help or "")
            assert all(name.rstrip(".") in shown for name in names), f"{verb} {option.name}: {names}"


def test_defaults_in_words_are_in_the_help() -> None:
    """Typer took `[default: ...]` for markup and showed nothing."""
    result = CliRunner().invoke(app, ["quickstart", "--help"], env={"COLUMNS": "200"})
    assert "[default: SmolLM2-135M-Instruct]" in result.output
