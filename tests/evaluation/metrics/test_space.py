"""A metric's folder: loaded by path it gives the same numbers; its card, rendered whole; pushed as a Space."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import evaluate
import pytest
import torch
import yaml
from huggingface_hub import HfApi

from sae_transformers.evaluation.metrics import METRICS, Fvu
from sae_transformers.evaluation.metrics.space import metric_card, write_metric
from tests.loopback_hub import LoopbackHub

SCRIPTS = Path(__file__).parents[2] / "scripts"
CARD = """---
title: Fraction of variance unexplained
tags:
- evaluate
- metric
description: "How much of the variance of hidden states an SAE's reconstruction leaves out."
sdk: gradio
app_file: app.py
pinned: false
---

# Metric card: Fraction of variance unexplained

How much of the variance of hidden states an SAE's reconstruction leaves out: sum |x - xh|^2 / sum |x - mean(x)|^2 \
over tokens. One minus it is the explained variance.

## How to use

```python
import evaluate

metric = evaluate.load("fvu")  # this folder, or the Space's id
metric.compute(predictions=[[1.0, 0.0], [0.0, 0.5]], references=[[1.0, 0.0], [0.0, 1.0]])
# {'fvu': 0.25, 'explained_variance': 0.75}
```

or, without loading a script:

```python
from sae_transformers.evaluation.metrics import Fvu

metric = Fvu()
```

`add_batch` gathers batch by batch, and `evaluate.combine` joins it with metrics of the same inputs.

### Inputs

- **predictions** (`list of float64`): what the SAE makes of each token's hidden state, d numbers a token.
- **references** (`list of float64`): the hidden states, d numbers a token.

### Output values

**fvu**, **explained_variance**: 0 is perfect, 1 as bad as the mean; it has no upper end. Lower is better.

## Limits

Tokens that the SAE was not made for, such as the first of a text, change it much: leave them out and say so.

## Source

Explained variance as SAELens and SAEBench name it; R^2 of several outputs, weighted by variance.
"""


@pytest.fixture(scope="module")
def metrics(tmp_path_factory) -> Any:
    """Every metric as a folder; `evaluate` copies scripts and writes what it gathers into others of the test."""
    root = tmp_path_factory.mktemp("metrics")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr("evaluate.config.HF_MODULES_CACHE", str(root / "modules"))
        patch.setattr("evaluate.config.HF_METRICS_CACHE", str(root / "gathered"))
        for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:  # of other tests' folders
            patch.delitem(sys.modules, name)
        yield {name: write_metric(name, root / "written") for name in METRICS}


@pytest.mark.parametrize("name", METRICS)
def test_a_folder_is_loaded_by_its_path(name, metrics) -> None:
    assert sorted(file.name for file in metrics[name].iterdir()) == sorted(
        ["README.md", "app.py", f"{name}.py", "requirements.txt"]
    )
    kind = METRICS[name]
    for path in (metrics[name], metrics[name] / f"{name}.py"):
        metric = evaluate.load(str(path))
        assert type(metric).__name__ == kind.__name__ and type(metric) is not kind
        assert type(metric).__module__.startswith("evaluate_modules.")
    assert metric.compute(**kind.facts.example) == pytest.approx(dict(kind.facts.answer))


def test_the_card_is_written_whole() -> None:
    assert metric_card(Fvu) == CARD


@pytest.mark.parametrize("name", METRICS)
def test_a_card_has_a_header_and_an_example_that_runs(name, metrics) -> None:
    _, header, text = (metrics[name] / "README.md").read_text().split("---\n", 2)
    said = yaml.safe_load(header)
    assert said["title"] == METRICS[name].facts.title and said["sdk"] == "gradio" and "metric" in said["tags"]
    assert METRICS[name].facts.description.startswith(said["description"].rstrip("."))
    example = text.split("```python\n")[1].split("```")[0].replace(f'load("{name}")', f'load("{metrics[name]}")')
    *lines, last = ast.parse(example).body
    scope: dict[str, Any] = {}
    exec(compile(ast.Module(lines, []), "card", "exec"), scope)
    found = eval(compile(ast.Expression(last.value), "card", "eval"), scope)  # pyright: ignore
    answer = ast.literal_eval(example.split("# ")[-1])
    assert {key: round(value, 4) for key, value in found.items()} == answer


def test_the_page_shows_the_metric_beside_it(metrics, monkeypatch) -> None:
    """gradio is the Space's, not ours; what the page gives to it is looked at here."""
    shown = []
    monkeypatch.setattr("evaluate.utils.launch_gradio_widget", shown.append)
    page = metrics["fvu"] / "app.py"
    exec(compile(page.read_text(), str(page), "exec"), {"__file__": str(page)})
    assert [type(one).__name__ for one in shown] == ["Fvu"]


def test_a_folder_is_pushed_as_a_space(metrics, tmp_path) -> None:
    with LoopbackHub() as hub:
        api = HfApi(endpoint=hub.url, token="hf_test")
        api.create_repo("me/fvu", repo_type="space", space_sdk="gradio")
        api.upload_folder(repo_id="me/fvu", repo_type="space", folder_path=str(metrics["fvu"]))
        for file in metrics["fvu"].iterdir():
            came = api.hf_hub_download("me/fvu", file.name, repo_type="space", cache_dir=tmp_path)
            assert Path(came).read_bytes() == file.read_bytes()


def test_requirements_name_the_package(tmp_path) -> None:
    folder = write_metric(Fvu, tmp_path, package="sae-transformers==1.2")
    assert (folder / "requirements.txt").read_text() == "sae-transformers==1.2\nevaluate\n"
    assert "from sae_transformers.evaluation.metrics import Fvu" in (folder / "fvu.py").read_text()
    assert write_metric("fvu", tmp_path) == folder  # written over
    assert (folder / "requirements.txt").read_text() == "datasets\nevaluate\ntorch\n"


@pytest.mark.parametrize("name", METRICS)
def test_a_script_imports_nothing_of_the_library_and_what_it_uses_alone(name, metrics) -> None:
    source = (metrics[name] / f"{name}.py").read_text()
    imported = {word for node in ast.walk(ast.parse(source)) for word in modules_of(node)}
    assert "sae_transformers" not in imported and "evaluate" in imported
    needed = (metrics[name] / "requirements.txt").read_text().split()
    assert set(needed) == imported - set(sys.stdlib_module_names)


def modules_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [(node.module or ".").split(".")[0]]
    return [one.name.split(".")[0] for one in node.names] if isinstance(node, ast.Import) else []


@pytest.mark.slow
def test_metrics_are_loaded_and_right_where_the_library_is_not_installed(tmp_path) -> None:
    """In a process in which it cannot be imported; numbers of random inputs are those of the library."""
    generator = torch.Generator().manual_seed(0)
    states, made = torch.randn(2, 30, 6, generator=generator, dtype=torch.float64).tolist()
    logits, swapped = torch.randn(2, 30, generator=generator, dtype=torch.float64).tolist()
    more = {
        "fvu": {"predictions": made, "references": states},
        "normalized_mse": {"predictions": made, "references": states},
        "swap_sensitivity": {"predictions": swapped, "references": logits},
    }
    asked = {name: more.get(name, dict(kind.facts.example)) for name, kind in METRICS.items()}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    for name in METRICS:
        write_metric(name, tmp_path)
    script = """
        import json, sys
        import blocked_library
        import evaluate
        folder = sys.argv[1]
        asked = json.load(open(f"{folder}/asked.json"))
        print(json.dumps({name: evaluate.load(f"{folder}/{name}").compute(**given) for name, given in asked.items()}))
    """
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    for name, kind in METRICS.items():
        assert found[name] == pytest.approx(kind.measure(**asked[name]), rel=1e-12), name


def test_an_unknown_metric_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="metric='fuv'"):
        write_metric("fuv", tmp_path)
