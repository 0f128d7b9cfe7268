"""A metric as a folder: what `evaluate.load` takes, and what a Space of the Hub holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...modeling.output_files import write_whole
from . import METRICS, SaeMetric
from .script import Script, self_contained

DOCSTRING = """{title}. Made by sae-transformers of its own sources, and needs nothing of it: {needs}."""
CLOSING = "del SaeMetric  # `evaluate.load` takes the first metric of a file"
SCRIPT = '''"""{title}."""

from sae_transformers.evaluation.metrics import {kind}

__all__ = ["{kind}"]
'''
APP = '''"""The page of this metric's Space."""

from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load(str(Path(__file__).with_name("{name}.py"))))
'''
CARD = """---
title: {title}
tags:
- evaluate
- metric
description: {short}
sdk: gradio
app_file: app.py
pinned: false
---

# Metric card: {title}

{description}

## How to use

```python
import evaluate

metric = evaluate.load("{name}")  # this folder, or the Space's id
metric.compute({call})
# {answer}
```

or, without loading a script:

```python
from sae_transformers.evaluation.metrics import {kind}

metric = {kind}()
```

`add_batch` gathers batch by batch, and `evaluate.combine` joins it with metrics of the same inputs.

### Inputs

{inputs}

### Output values

{outputs}: {values}

## Limits

{limits}

## Source

{source}
"""


def write_metric(metric: str | type[SaeMetric], folder: str | Path, *, package: str | None = None) -> Path:
    """Write a metric's script, card, page and requirements.

    The script needs `evaluate` and what the metric computes with, such as torch, and not this library.

        evaluate.load(str(write_metric("fvu", "metrics")))

    Args:
        metric: a class of `evaluation.metrics`, or its name.
        folder: where the metric's own folder, of its name, is made or written over.
        package: a release of this library that the script imports in place of that, and the Space installs, such as
            `sae-transformers==1.0` or an address of the source.

    Returns:
        The metric's own folder.

    Raises:
        ValueError: there is no metric of this name, or one's sources cannot be joined in a file.
    """
    if isinstance(metric, str) and metric not in METRICS:
        raise ValueError(f"`metric` must be one of {', '.join(METRICS)}. Received: metric={metric!r}.")
    kind = METRICS[metric] if isinstance(metric, str) else metric
    words = {"name": kind.facts.name, "title": kind.facts.title, "kind": kind.__name__}
    place = Path(folder) / kind.facts.name
    place.mkdir(parents=True, exist_ok=True)
    script = metric_script(kind) if package is None else Script(SCRIPT.format(**words), (package, "evaluate"))
    files = {
        f"{kind.facts.name}.py": script.source,
        "app.py": APP.format(**words),
        "requirements.txt": "".join(f"{one}\n" for one in script.packages),
        "README.md": metric_card(kind),
    }
    for name, text in files.items():
        write_whole(place / name, text)
    return place


def metric_script(kind: type[SaeMetric]) -> Script:
    """The file that `evaluate.load` takes, and what it needs.

    Raises:
        ValueError: the metric's sources cannot be joined in a file.
    """
    needs = self_contained(kind, "").packages
    told = DOCSTRING.format(title=kind.facts.title, needs=", ".join(needs))
    return self_contained(kind, told, CLOSING)


def metric_card(kind: type[SaeMetric]) -> str:
    """The card of a metric, with the header that a Space needs."""
    facts = kind.facts
    options = dict(facts.options)
    lines = [f"- **{name}** (`{_type(facts.features[name])}`): {what}" for name, what in facts.inputs.items()]
    lines += [f"- **{name}**, of `compute`: {what}" for name, what in options.items()]
    return CARD.format(
        name=facts.name,
        title=facts.title,
        kind=kind.__name__,
        short=json.dumps(facts.description.split(": ")[0].rstrip(".") + "."),
        description=facts.description,
        call=", ".join(f"{name}={value!r}" for name, value in facts.example.items()),
        answer={name: round(value, 4) for name, value in facts.answer.items()},
        inputs="\n".join(lines),
        outputs=", ".join(f"**{name}**" for name in facts.answer),
        values=facts.values,
        limits=facts.limits,
        source=facts.source,
    )


def _type(feature: Any) -> str:
    inner = getattr(feature, "feature", None)
    return feature.dtype if inner is None else f"list of {inner.dtype}"
