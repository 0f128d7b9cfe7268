"""`ask_features` as a function: rows in, an answer for each out."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_transformers import AskFeaturesSettings, LLMSettings, SendSettings, ask_features
from sae_transformers.create_training_data.annotation.questions import annotation_rows
from tests.cli.test_ask_features import yes_to_even
from tests.create_training_data.fake_openai import FakeOpenAI

ROWS = annotation_rows([["w1", "w2"]] * 9)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_an_answer_for_each(tmp_path: Path) -> None:
    told: list[str] = []
    with FakeOpenAI(yes_to_even) as server:
        llm = LLMSettings(llm="m", llm_url=server.url, cache=tmp_path / "cache")
        dry = AskFeaturesSettings(features_per_request=4, max_rows=7, llm=llm, send=SendSettings(dry_run=True))
        estimated = ask_features(ROWS, "Even?", dry)
        assert not estimated.asked and not server.sent and estimated.answers == []
        settings = AskFeaturesSettings(features_per_request=4, max_rows=7, llm=llm)
        found = ask_features(ROWS, "Even?", settings, notice=told.append)
        assert len(server.sent) == 2 and told[0].startswith("m: ")
    assert found.counts() == {"yes": 4, "no": 3}
    assert found.features() == [0, 2, 4, 6] and found.features("no") == [1, 3, 5]
    assert found.failure() is None and found.summary()[1] == "yes: 4, no: 3"
    assert list(found.to_frame()) == ["feature", "answer", "reason", "failure"] and "<table>" in found._repr_html_()
    assert found.to_dict()["model"] == "m"
    assert found.save(tmp_path / "even.csv")[0].read_text().startswith("feature,answer,reason,failure")


def test_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"`answers` must be two or more .* Received: answers=\('yes',\)"):
        AskFeaturesSettings(answers=("yes",))
    with pytest.raises(ValueError, match="Received: features_per_request=0"):
        AskFeaturesSettings(features_per_request=0)
    with pytest.raises(ValueError, match="Which model"):
        ask_features(ROWS, "Even?")
