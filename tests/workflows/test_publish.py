"""`card`, `push` and `space` as functions."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi

from sae_transformers.hub_cards.publish import CannotPublish
from sae_transformers.workflows.publish import card, push
from sae_transformers.workflows.settings.publish import CardSettings, PushSettings, SpaceSettings
from sae_transformers.workflows.space import space
from tests.hub_cards import folders
from tests.hub_cards.test_model_card import results
from tests.hub_cards.test_publish import hub  # noqa: F401
from tests.loopback_hub import TOKEN, LoopbackHub
from tests.tiny import tiny_model


def test_a_card_is_written_from_values(tmp_path: Path) -> None:
    model = folders.model(tmp_path / "m", {**folders.SAE, "concepts": {"praise": 3}})
    with pytest.raises(ValueError, match="edited by hand"):
        card(model)
    found = card(model, CardSettings(force=True), results=results(), facts={"licence": "mit"}, repo_id="me/praise")
    assert found.unknown == ["training_data"] and found.path == model / "README.md"
    assert found.summary()[1] == "Said to be unknown: training_data; facts fill them in."
    assert found.text == found.path.read_text() and "auroc 0.912" in found.text and "# me/praise" in found.text
    assert found.to_dict()["unknown"] == ["training_data"] and found._repr_html_().startswith("<pre>---")
    (tmp_path / "copy").mkdir()
    assert found.save(tmp_path / "copy").read_text() == found.text


def test_what_cannot_be_a_card_or_a_push_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`kind` must be one of model, dataset, metric"):
        CardSettings(kind="space")
    with pytest.raises(ValueError, match="`local_base` must be a model's folder"):
        PushSettings(local_base=tmp_path)
    with pytest.raises(ValueError, match="`annotations` is for a model's card. Received: kind='metric'"):
        card(folders.model(tmp_path / "m"), CardSettings(kind="metric"), annotations="a.tsv")
    with pytest.raises(CannotPublish, match="`base`"):
        push(folders.model(tmp_path / "n", base_model_name_or_path="/root/base"), "me/m")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # see tests/hub_cards/test_publish
def test_a_push_says_what_it_does(hub: LoopbackHub, tmp_path: Path) -> None:  # noqa: F811
    model, api = folders.model(tmp_path / "m"), HfApi(endpoint=hub.url, token=TOKEN)
    lines: list[str] = []
    dry = push(model, "tester/m", PushSettings(dry_run=True), api=api, notice=lines.append)
    assert dry.folders[0].pushed is None and "  + config.json" in dry.summary() and lines[-1] in dry.summary()
    assert dry.to_dict()["folders"][0]["commit"] is None and ("models", "tester/m") not in hub.repos
    done = push(model, "tester/m", PushSettings(verify=False), api=api)
    assert "in one commit." in done.summary()[0] and "/tester/m/tree/" in done.summary()[1]
    assert done.to_dict()["folders"][0]["sent"] and not done.to_dict()["folders"][0]["verified"]
    again = push(model, "tester/m", PushSettings(verify=False), api=api)
    assert "no commit was made" in again.summary()[0]


def test_a_space_is_written(tmp_path: Path) -> None:
    model = tiny_model(concepts={"sea": 9})
    model.config.base_model_name_or_path = "tester/base"
    model.save_pretrained(tmp_path / "model")
    found = space(tmp_path / "model", tmp_path / "space", SpaceSettings(title="Mine"), features={"joy": (0, 17)})
    assert [file.name for file in found.files] == ["app.py", "requirements.txt", "README.md"]
    assert "'joy': (0, 17)" in found.files[0].read_text() and "title: Mine" in found.files[2].read_text()
    assert found.summary() == [" ".join(found.to_dict()["files"])]
