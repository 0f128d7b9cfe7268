"""Names from data are shown by a first card, and mean nothing to YAML, Markdown, HTML or Python."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from sae_transformers.hub_cards.card_file import is_ours
from sae_transformers.modeling import SaeForCausalLM, SparseAutoencoderConfig
from sae_transformers.modeling.card_texts import base_line, hub_id, one_line
from sae_transformers.modeling.repository_files import CARD, model_card
from sae_transformers.modeling.sae_files import CARD as SAE_CARD
from sae_transformers.modeling.sae_files import first_facts
from tests.tiny import tiny_base, tiny_sae

EVIL = [
    "a|b", "line\nbreak", "---\nlicense: mit\n---", "<script>alert(1)</script>", "[link](https://evil.example)",
    "![x](https://evil.example/x.png)", "\x1b[31mred", "`code`", "*bold* __bold__ ~~gone~~", "# heading", "$x$",
    "\u202eright to left", "back\\slash\\|", "&lt;b&gt;", '"); print("', "{repo}", "| a | b |", "``` ",
]  # fmt: skip
ORDINARY = """---
library_name: transformers
tags:
- sparse-autoencoder
- steering
base_model: org/base_1
base_model_relation: adapter
---

# my_model

`org/base_1` with 1 sparse autoencoder(s) in its forward pass:

| SAE | reads | latents | activation | concepts |
|---|---|---|---|---|
| 0 | layers.1.resid_post | 64 | topk | good film, bad_film |

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("my_model", trust_remote_code=True)
```
"""


@pytest.fixture(scope="module")
def model() -> SaeForCausalLM:
    return SaeForCausalLM.from_base(tiny_base(), tiny_sae(layer=1))


def written(model: SaeForCausalLM, base: str | None, concepts: list[str], repo: str) -> str:
    model.config.base_model_name_or_path = base
    model.config.saes[0]["concepts"] = {name: number for number, name in enumerate(concepts)}
    return model_card(model, repo)


def cells(card: str) -> list[list[str]]:
    """What the rows of its one table show."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.split("---\n", 2)[2])
    assert not [one.type for one in tokens if one.type == "html_block"]
    rows: list[list[str]] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        if token.type == "inline":
            parts = token.children or []
            assert {part.type for part in parts} <= {"text", "code_inline", "softbreak"}, token.content
            if rows and len(rows[-1]) < 5:
                rows[-1].append("".join(part.content for part in parts))
    return rows


def test_ordinary_names_stand_as_they_are(model: SaeForCausalLM) -> None:
    assert written(model, "org/base_1", ["good film", "bad_film"], "my_model").startswith(ORDINARY)


@pytest.mark.parametrize("name", EVIL)
def test_a_name_is_shown_and_nothing_else(model: SaeForCausalLM, name: str) -> None:
    card = written(model, name, [name, "fine"], name)
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "library_name": "transformers",
        "tags": ["sparse-autoencoder", "steering"],
    }
    rows = cells(card)
    assert len(rows) == 2 and rows[1] == ["0", "layers.1.resid_post", "64", "topk", one_line(f"{name}, fine")]
    code = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)
    assert code is not None
    call = ast.parse(code[1]).body[-1]
    assert isinstance(call, ast.Assign) and isinstance(call.value, ast.Call)
    assert [ast.literal_eval(one) for one in call.value.args] == [one_line(name)]
    assert "\x1b" not in card and "\u202e" not in card
    assert is_ours(card, [CARD])


@pytest.mark.parametrize("name", EVIL)
def test_the_card_of_an_sae_too(name: str) -> None:
    config = SparseAutoencoderConfig(8, 16, activation="topk", k=2, hook=f"x.{name}", metadata={"base_model": name})
    card = SAE_CARD.format(repo="me/sae", **first_facts(config))
    assert set(yaml.safe_load(card.split("---\n")[1])) == {"library_name", "tags"}
    cells(card)
    assert "\x1b" not in card and "\u202e" not in card


@pytest.mark.parametrize("name", ["gpt2", "org/base", "123", "1e5", "true", "No", "org/123", "0x1f", "1_000"])
def test_a_hub_id_is_a_text_of_yaml(name: str) -> None:
    assert yaml.safe_load(base_line(hub_id(name))) == {"base_model": name}
    named = {"base_model": name, "base_model_relation": "adapter"}
    assert yaml.safe_load(base_line(hub_id(name), adapter=True)) == named


def test_what_is_no_hub_id_is_not_named() -> None:
    for name in (None, "", *EVIL, "/root/base", str(Path.cwd()), "a/b/c", "C:\\base", "a b"):
        assert hub_id(name) is None
    assert base_line(None) == base_line(None, adapter=True) == ""
