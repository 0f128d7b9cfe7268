"""The folder of a Space: its files, its functions without Gradio, and the page itself where Gradio is installed."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering
from sae_transformers.evaluation.generation.continuations import likelihood
from sae_transformers.hub_cards.space import write_space
from tests.create_training_data.words import word_tokenizer
from tests.loopback_hub import LoopbackHub
from tests.tiny import tiny_base, tiny_sae

GRADIO = os.environ.get("SAE_TRANSFORMERS_GRADIO", "")
TEXT = "w1 w2 w3 w4 w5"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of two SAEs, whose named features are a concept of each."""
    folder = tmp_path_factory.mktemp("space") / "model"
    saes = [
        tiny_sae(
            seed=number + 1,
            layer=number,
            site="resid_post",
            concepts={"sea": 9 + number},
            feature_names={"3": "</a>'"},
        )
        for number in range(2)
    ]
    base = tiny_base(vocab_size=94)
    base.save_pretrained(folder.parent / "base")
    word_tokenizer().save_pretrained(folder)
    model: Any = SaeForCausalLM.from_base(base, saes=saes).eval()
    model.config.base_model_name_or_path = str(folder.parent / "base")
    model.config.weights_scope = "full"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def app(model_folder: Path) -> Iterator[Any]:
    """The page's functions, as a module of its own."""
    out = model_folder.parent / "written"
    write_space(str(model_folder), out, features={"first": 5, "second": (1, 7)}, title="A \"title\" with '''")
    spec = importlib.util.spec_from_file_location("space_app", out / "app.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    return SaeForCausalLM.from_pretrained(model_folder).eval()


def test_a_model_by_a_relative_path_is_found_from_the_folder_of_the_page(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder.parent)
    write_space("model", tmp_path / "page")
    assert f"MODEL = {str(model_folder)!r}\n" in (tmp_path / "page" / "app.py").read_text()
    assert "Features of model" in (tmp_path / "page" / "README.md").read_text()


def test_features_have_names(app: Any) -> None:
    assert app.FEATURES == {
        "sea": (0, 9), "</a>'": (0, 3), "sea (SAE 1)": (1, 10), "</a>' (SAE 1)": (1, 3),
        "first": (0, 5), "second": (1, 7),
    }  # fmt: skip
    assert app.SAES == [64, 64] and app.TITLE == "A \"title\" with '''" and app.REVISION is None
    assert app.parse_feature(" second ") == (1, 7) and app.parse_feature("17") == (0, 17)
    assert app.parse_feature("1: 17") == (1, 17)
    for wrong in ("joy", "64", "2:1", "-1", "1:", ""):
        with pytest.raises(ValueError, match=re.escape(f"Received: {wrong!r}")):
            app.parse_feature(wrong)


def test_detection_is_the_models_own(app: Any, model: Any) -> None:
    tokens, mean, largest = app.detect(TEXT, "second")
    ids = word_tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    expected = model(input_ids=ids, features={1: [7]}).sae_features[1][0, :, 0].detach()
    assert [token for token, _ in tokens] == TEXT.split()
    assert [value for _, value in tokens] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    assert mean == pytest.approx(float(expected[1:].mean()), rel=1e-4, abs=1e-5)
    assert largest == pytest.approx(float(expected[1:].max()), rel=1e-4, abs=1e-5)
    with pytest.raises(ValueError, match="empty"):
        app.detect("  ", "second")


def test_the_strongest_features(app: Any, model: Any) -> None:
    ids = word_tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    dense = model(input_ids=ids, output_features=True).sae_features[0].to_dense()[0, 1:].detach()
    best = dense.mean(0).topk(4)
    found = app.strongest(TEXT, count=4)
    names = {9: "sea", 3: "</a>'", 5: "first"}
    assert [name for name, _, _ in found] == [names.get(i, str(i)) for i in best.indices.tolist()]
    assert [value for _, value, _ in found] == pytest.approx(best.values.tolist(), rel=1e-4)
    assert [count for _, _, count in found] == [int((dense[:, i] != 0).sum()) for i in best.indices.tolist()]


def test_steering_is_the_models_own(app: Any, model: Any) -> None:
    before, plain, after, steered = app.steer(TEXT, "1:7", "direction", 3.0, new_tokens=6, temperature=0, chat=False)
    ids = word_tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    edit = Steering([FeatureEdit(1, 7, "direction", 3.0, "norm")])
    for text, perplexity, steering in ((before, plain, False), (after, steered, edit)):
        row = model.generate(ids, steering=steering, max_new_tokens=6, do_sample=False, pad_token_id=0)[
            0, ids.shape[1] :
        ]
        assert text == word_tokenizer().decode(row, skip_special_tokens=True)
        if len(text.split()) == 6:
            told = likelihood(model, word_tokenizer(), [TEXT], [text])
            assert perplexity == pytest.approx(told.perplexity, rel=1e-3)
    assert before != after
    same = app.steer(TEXT, "1:7", "scale", 1.0, new_tokens=6, temperature=1.0, seed=3, chat=False)
    assert same[0] == same[2] and same[1] == pytest.approx(same[3])  # the same random numbers on both sides
    assert app.edit_of("sea", "ablate", 1) == {"edits": [{"sae": 0, "feature": 9, "op": "ablate"}]}
    for op, strength in (("nothing", 1), ("scale", math.nan)):
        with pytest.raises(ValueError, match="Received"):
            app.steer(TEXT, "5", op, strength)


def test_what_the_page_shows(app: Any) -> None:
    shades, sentence, table = app.show_detection(TEXT, "second")
    assert shades[0][1] == 0 and max(abs(value) for _, value in shades) in (0.0, 1.0) and len(table) == 5
    assert "first token" in sentence
    assert app.show_strongest(TEXT) and len(app.show_steering(TEXT, "5", "ablate", 0, 3, 0, 0, True)) == 4


@pytest.mark.hub  # another interpreter, with the Hub's address
def test_a_published_model_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LoopbackHub() as hub:
        env = hub.environment(tmp_path / "home")
        script = (
            "import sys, tests.tiny as t\n"
            "from sae_transformers.hub_cards.space import write_space\n"
            "model = t.tiny_model(concepts={'sea': 9})\n"
            "model.config.base_model_name_or_path = 'tester/base'\n"
            "model.push_to_hub('tester/steered')\n"
            "write_space('tester/steered', sys.argv[1], licence='mit')\n"
        )
        env |= {"PYTHONPATH": str(Path(__file__).parents[2])}
        subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], env=env, check=True, capture_output=True)
        commit = hub.repo("models", "tester/steered").branches["main"]
    app = (tmp_path / "out" / "app.py").read_text()
    assert f"REVISION = {commit!r}" in app and "MODEL = 'tester/steered'" in app and "BASE = 'tester/base'" in app
    _, header, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(header)
    assert facts["sdk"] == "gradio" and facts["models"] == ["tester/steered"] and facts["app_file"] == "app.py"
    assert facts["license"] == "mit" and len(facts["short_description"]) <= 60 and commit in body
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "app.py", "requirements.txt"]


@pytest.mark.parametrize(
    ("config", "options", "told"),
    [
        ({"model_type": "llama"}, {}, "model_type='llama'"),
        ([1], {}, "'list'"),
        (None, {"features": {"joy": 64}}, "'joy' at 0:64"),
        (None, {"features": {"joy": (2, 1)}}, "'joy' at 2:1"),
        (None, {"revision": "main"}, "revision='main'"),
        ({"architectures": ["SaeForSequenceClassification"]}, {}, "SaeForSequenceClassification"),
    ],
)
def test_mistakes(tmp_path: Path, model_folder: Path, config: Any, options: dict, told: str) -> None:
    folder = model_folder
    if config is not None:
        folder = tmp_path / "model"
        folder.mkdir()
        given = json.loads((model_folder / "config.json").read_text())
        config = {**given, **config} if isinstance(config, dict) and "architectures" in config else config
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(told)):
        write_space(str(folder), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parity
@pytest.mark.skipif(
    not GRADIO, reason="SAE_TRANSFORMERS_GRADIO names no interpreter with Gradio, torch and transformers"
)
def test_the_page_answers(app: Any, model_folder: Path, tmp_path: Path) -> None:
    """SAE_TRANSFORMERS_GRADIO=~/gradio/bin/python pytest -m parity tests/hub_cards/test_space.py"""
    python, port = str(Path(GRADIO).expanduser()), 7861
    env = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    env["HF_HOME"] = str(tmp_path)
    with (tmp_path / "log").open("w+") as log:
        server = subprocess.Popen(
            [python, app.__file__], env=env, stdout=log, stderr=log, start_new_session=True, cwd=tmp_path
        )
        try:
            asks = (
                "import json, sys\nfrom gradio_client import Client\n"
                f"client = Client('http://127.0.0.1:{port}', verbose=False)\n"
                f"detected = client.predict({TEXT!r}, 'second', api_name='/detect')\n"
                f"strongest = client.predict({TEXT!r}, api_name='/strongest')\n"
                f"steered = client.predict({TEXT!r}, '1:7', 'direction', 2.0, 6, 0, 0, False, api_name='/steer')\n"
                "wrong = ''\n"
                "try:\n    client.predict('', '1:7', 'direction', 2.0, 6, 0, 0, False, api_name='/steer')\n"
                "except Exception as error:\n    wrong = str(error)\n"
                "print(json.dumps([detected, strongest, steered, wrong]))\n"
            )
            for _ in range(120):
                time.sleep(1)
                log.seek(0)
                told = log.read()
                assert server.poll() is None, told[-2000:]
                if "Running on" in told:
                    break
            done = subprocess.run([python, "-c", asks], env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
            detected, strongest, steered, wrong = json.loads(done.stdout.splitlines()[-1])
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)
    assert [row[1] for row in detected[2]["data"]] == TEXT.split()
    assert [row[0] for row in strongest["data"]] == [row[0] for row in app.show_strongest(TEXT)]
    expected = app.steer(TEXT, "1:7", "direction", 2.0, 6, 0, 0, False)
    assert (steered[0], steered[2]) == (expected[0], expected[2]) and "Perplexity" in steered[1]
    assert "A prompt is needed" in wrong
