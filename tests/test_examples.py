"""The examples run from end to end, on a tiny model and made-up rows."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sae_transformers.training.heads.settings import METHODS
from tests.create_training_data.words import WORDS, word_tokenizer
from tests.tiny import tiny_base, tiny_sae

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str, folder: Path = EXAMPLES) -> Any:
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    if spec is None or spec.loader is None:
        pytest.fail(f"there is no example {name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [n for each in value for n in numbers(each)]
    return [float(value)] if isinstance(value, (int, float)) else []


PROGRAMS = [
    *sorted(EXAMPLES.glob("*.py")),
    *sorted((EXAMPLES.parent / "notebooks").glob("*.ipynb")),
]


def code(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
    return "\n".join(line for line in lines if not line.startswith(("%", "!")))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_examples_and_notebooks_import_from_the_root(path: Path) -> None:
    tree = ast.parse(code(path))
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    own = {name for name in modules if name.split(".")[0] == "sae_transformers"}
    assert own == {"sae_transformers"}


@pytest.mark.slow
def test_scar_toxicity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)

    def words(toxic: bool) -> str:
        usual = WORDS[:8] if toxic else WORDS[8:16]  # the concept is a choice of words
        return " ".join(draw.choice(usual) for _ in range(8))

    rows = []
    for i in range(80):
        score = 0.9 if i % 2 else 0.1
        prompt, continuation = ({"text": words(i % 2 == 1) + " ", "toxicity": score} for _ in range(2))
        rows.append({"prompt": prompt, "continuation": continuation})
    chat = [{"text": words(i % 2 == 1), "toxicity": str(i % 2)} for i in range(30)]
    tiny_base(vocab_size=len(word_tokenizer())).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    module = load("scar_toxicity")
    asked = [
        *("--rtp", write(tmp_path / "rtp.jsonl", rows), "--toxic-chat", write(tmp_path / "chat.jsonl", chat)),
        *("--model", str(tmp_path / "model"), "--layer", "1", "--dtype", "float32", "--k", "4", "--steps", "20"),
        *("--tokens-per-step", "64", "--prompts", "5", "--search-prompts", "3", "--new-tokens", "4"),
        *("--test-share", "0.4", "--out", str(tmp_path / "out")),
    ]
    monkeypatch.setattr(sys, "argv", ["scar_toxicity.py", *asked])
    module.main()
    text = (tmp_path / "out" / "results.json").read_text(encoding="utf-8")
    (run,) = json.loads(text)["runs"]
    assert all(map(math.isfinite, numbers(run)))
    assert run["counts"]["RealToxicityPrompts"]["texts"] == 32
    for site in ("mlp_out", "resid_post"):
        for name in ("conditioned latent", "difference of means", "linear probe"):
            assert run["detection_auroc"][f"{site}: {name}"]["ToxicChat"][0] > 0.9
    for found in run["steering"]:
        points = {point["name"]: point for point in found["points"]}
        assert len(points) == 1 + 7 + 6 + 4
        assert points["unsteered"]["first_divergent_token"] == 4
        assert points["unsteered"]["toxicity_change"] == 0
    assert "".join(WORDS[:2]) not in text and WORDS[0] + " " not in text  # numbers, no texts


def test_pretrain_sae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    for name in ("train", "held_out"):
        lines = (" ".join(draw.choice(WORDS) for _ in range(12)) for _ in range(150))
        (tmp_path / f"{name}.txt").write_text("\n\n".join(lines), encoding="utf-8")
    tiny_base(vocab_size=len(word_tokenizer())).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    asked = [
        *("--text", str(tmp_path / "train.txt"), "--held-out", str(tmp_path / "held_out.txt")),
        *("--model", str(tmp_path / "model"), "--layer", "1", "--d-sae", "64", "--k", "4", "--length", "16"),
        *("--epochs", "120", "--out", str(tmp_path / "out")),
    ]
    monkeypatch.setattr(sys, "argv", ["pretrain_sae.py", *asked])
    load("pretrain_sae").main()
    found = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert all(map(math.isfinite, numbers(found)))
    assert found["after"]["fvu"] < 0.75 * found["before"]["fvu"]
    assert found["after"]["ce_base"] == found["before"]["ce_base"]


def test_selfreg_toxicity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)

    def words(usual: list[str]) -> str:
        return " ".join([*draw.choices(usual, k=4), *draw.choices(WORDS[20:], k=3)])

    def chat(n: int) -> list[dict]:
        return [{"text": words(WORDS[:5] if i % 2 else WORDS[5:10]), "toxicity": str(i % 2)} for i in range(n)]

    comments = [words(WORDS[5:10]) for _ in range(30)]
    for name, group in (("original", WORDS[10]), ("swapped", WORDS[11])):
        lines = ["comment", *(f"{text} {group}" for text in comments), "w1 w2"]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tiny_base(vocab_size=len(word_tokenizer())).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    tiny_sae(layer=1, site="resid_post").save_pretrained(tmp_path / "sae")
    (tmp_path / "judged.tsv").write_text("FeatureID\tTask\tSummary\tWords\n7\tno|||No.\tA.\tSpan 1: a\n")
    asked = [
        *("--train", write(tmp_path / "train.jsonl", chat(80)), "--test", write(tmp_path / "test.jsonl", chat(40))),
        *("--original", str(tmp_path / "original.csv"), "--swapped", str(tmp_path / "swapped.csv")),
        *("--sae", str(tmp_path / "sae"), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")),
        *("--counts", "4", "--penalties", "0", "1", "--seeds", "1", "2", "--epochs", "1"),
        *("--judged", str(tmp_path / "judged.tsv")),
    ]
    monkeypatch.setattr(sys, "argv", ["selfreg_toxicity.py", *asked])
    load("selfreg_toxicity").main()
    text = (tmp_path / "out" / "results.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert list(found["methods"]) == list(METHODS) and len(found["sweep"]) == 7
    assert found["methods"]["selfreg"] == found["sweep"][found["facts"]["chosen"]]
    assert (found["facts"]["pairs_judged"], found["facts"]["pairs_measured"]) == (15, 15)
    assert found["methods"]["overfit"][0]["accuracy"] > 0.8
    assert all(len(rows) == 2 and all(map(math.isfinite, numbers(rows))) for rows in found["sweep"].values())
    assert any("1 named by the judge" in name for name in found["other_features"])
    assert WORDS[0] + " " not in text  # numbers, no texts


@pytest.mark.parametrize("pairs", ["files", "words"])
def test_selfreg_swaps(pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group's word goes with the label where heads learn, so that they lean on it; nothing else differs."""
    draw = random.Random(0)

    def row(label: int, group: str) -> dict[str, Any]:
        words = [*draw.choices(WORDS[:5] if label else WORDS[5:10], k=2), *draw.choices(WORDS[20:], k=2), group, group]
        return {"text": " ".join(words), "label": label}

    rows = [row(i % 2, WORDS[10 + i % 2]) for i in range(120)]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "original.jsonl", rows[:60])
    write(tmp_path / "swapped.jsonl", [{"text": one["text"].replace(WORDS[10], WORDS[12])} for one in rows[:60]])
    tiny_base(vocab_size=len(word_tokenizer())).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    tiny_sae(layer=1, site="resid_post").save_pretrained(tmp_path / "sae")
    train = str(tmp_path / "train.jsonl")
    given = ["--words", "set", train, "-", f"{WORDS[10]}:{WORDS[11]}"]
    if pairs == "files":
        files = [str(tmp_path / f"{side}.jsonl") for side in ("original", "swapped")]
        given = ["--pairs", "set", train, train, *files]
    asked = [
        *given,
        "--sae",
        str(tmp_path / "sae"),
        "--model",
        str(tmp_path / "model"),
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", ["selfreg_swaps.py", *asked, "--divisions", "2", "--epochs", "2"])
    module = load("selfreg_swaps")
    monkeypatch.setattr(module, "SEEDS", (1, 2))
    module.main()
    text = (tmp_path / "out" / "results.json").read_text(encoding="utf-8")
    found = json.loads(text)["set"]
    assert len(found["rows"]) == 2 and all(map(math.isfinite, numbers(found["rows"])))
    assert set(found["shown"]) == {"plain_delta", "selfreg", "random", "pairing", "projection", "leace", "rule"}
    for rows, way in zip(found["rows"], found["shown"]["rule"]["chosen"], strict=True):
        plain = {name: sum(row[name] for row in rows["plain"]) for name in ("validation", "validation_delta")}
        best = {name: sum(row[name] for row in rows[way]) for name in plain}
        assert way == "plain" or best["validation_delta"] < plain["validation_delta"]
        assert best["validation"] >= plain["validation"] - 2 * 0.01
    assert len(found["shown"]["leace"]["effect"]) == 4 and WORDS[0] + " " not in text
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--max-length", "5"])
    with pytest.raises(SystemExit, match="128 tokens, .* texts, not of .*, 5 tokens"):
        module.main()


def tiny_files(folder: Path) -> Path:
    """base, sae, train.csv, test.csv (text, label) and text.txt in a folder."""
    draw = random.Random(0)
    tiny_base(vocab_size=len(word_tokenizer())).save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    tiny_sae(layer=1).save_pretrained(folder / "sae")
    for name in ("train", "test"):
        rows = [f"{' '.join(draw.choices(WORDS[:9] if n % 2 else WORDS[9:20], k=6))},{n % 2}" for n in range(40)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    (folder / "text.txt").write_text("\n".join(" ".join(draw.choices(WORDS, k=8)) for _ in range(40)))
    return folder


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_finetune_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    folder = tiny_files(tmp_path)
    asked = ["--base", "base", "--sae", "sae", "--train", "train.csv", "--test", "test.csv", "--unintended", "3,9"]
    asked += ["--out", "out", "--learning-rate", "0.02", "--epochs", "4", "--penalty", "0.05"]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["finetune_classifier.py", *asked])
    load("finetune_classifier").main()
    shown = " ".join(capsys.readouterr().out.split())
    assert all(
        f"'{name}'" in shown for name in ("lm_loss", "unintended", "unintended_state", "eval_calibration_error")
    )
    model: Any = AutoModelForSequenceClassification.from_pretrained("out/model", trust_remote_code=True)
    rows = [line.rsplit(",", 1) for line in (folder / "test.csv").read_text().splitlines()[1:]]
    tokens = word_tokenizer()([text for text, _ in rows], padding=True, return_tensors="pt")
    right = model(**tokens).logits.argmax(-1) == torch.tensor([int(label) for _, label in rows])
    assert right.float().mean() > 0.8
    base = tiny_base(vocab_size=len(word_tokenizer())).state_dict()
    assert any(not torch.equal(base[name], value) for name, value in model.lm.state_dict().items() if "v_proj" in name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_finetune_language_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tiny_files(tmp_path)
    asked = ["--base", "base", "--sae", "sae", "--text", "text.txt", "--feature", "3", "--scale", "2", "--out", "out"]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        sys, "argv", ["finetune_language_model.py", *asked, "--learning-rate", "0.01", "--epochs", "3"]
    )
    load("finetune_language_model").main()
    assert "'reconstruction'" in capsys.readouterr().out
    model: Any = AutoModelForCausalLM.from_pretrained("out/model", trust_remote_code=True)
    assert model.steering.to_dict()["edits"] == [
        {"sae": 0, "feature": 3, "op": "scale", "value": 2.0, "unit": "absolute"}
    ]
    assert torch.equal(model.saes[0].W_enc, tiny_sae(layer=1).W_enc)
    ids = torch.tensor([word_tokenizer()("w1 w2 w3")["input_ids"]])
    assert not torch.equal(model(ids).logits, model(ids, steering=False).logits)
    assert not torch.equal(model(ids, steering=False).logits, tiny_base(vocab_size=len(word_tokenizer()))(ids).logits)


@pytest.mark.slow
def test_dashboard_screenshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("playwright")
    if not any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")):
        pytest.skip("no Chromium")
    asked = ["--out", str(tmp_path / "images"), "--features", "300", "--page", str(tmp_path / "page.html")]
    monkeypatch.setattr(sys, "argv", ["dashboard_screenshots.py", *asked])
    load("dashboard_screenshots", EXAMPLES.parent / "docs").main()
    brightness = {}
    for theme in ("light", "dark"):
        with image.open(tmp_path / "images" / f"dashboard-{theme}.png") as picture:
            assert picture.size == (1360, 900)
            brightness[theme] = np.asarray(picture.convert("L")).mean()
    assert brightness["light"] > 200 and brightness["dark"] < 80
    assert (tmp_path / "page.html").stat().st_size > 10_000
