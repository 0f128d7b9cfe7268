"""`explain` and `judge` as functions: rows or files in, a result out."""

# ruff: noqa: F811 - fixtures of another file

from __future__ import annotations

from pathlib import Path

import pytest

from sae_transformers.create_training_data.annotation.tables import (
    AnnotationRow,
    read_annotations,
    write_annotations,
)
from sae_transformers.create_training_data.llm.client import LLMClient
from sae_transformers.workflows.reading.explain import explain
from sae_transformers.workflows.reading.judge import judge
from sae_transformers.workflows.settings.annotation import AnswerSettings, ExplainSettings, JudgeSettings
from sae_transformers.workflows.settings.llm import LLMSettings, SendSettings
from tests.create_training_data.annotation.test_steps import client, features, server  # noqa: F401
from tests.create_training_data.fake_openai import FakeOpenAI, last_user_text
from tests.create_training_data.words import word_tokenizer


def test_features_are_explained_and_judged(client: LLMClient, tmp_path: Path) -> None:
    lines: list[str] = []
    done: list[tuple[int, int]] = []
    found = explain(features(), client=client, progress=lambda *at: done.append(at), notice=lines.append)
    assert lines[0].startswith("m: 10 requests to send") and done[-1] == (4, 4) and done[4] == (5, 5)
    assert found.counts()["yes"] == 4 and "yes: 4" in found.summary()[1] and found.failure() is None
    files = found.save(tmp_path / "e.tsv")
    assert [file.name for file in files] == ["e.tsv", "e.parquet"] and read_annotations(files[0])[0].summary
    judged = judge(files[1], "toxicity", client=client)
    assert judged.unintended() == [8, 10] == judged.to_dict()["unintended"] and judged.strange() == 0
    assert list(judged.to_frame()["feature_id"]) == [row.feature_id for row in features()]
    assert "<table>" in judged._repr_html_() and judged.to_dict()["account"]["requests"] == 13


def test_nothing_is_asked_in_a_dry_run(server: FakeOpenAI, tmp_path: Path) -> None:
    table = write_annotations(features(), tmp_path / "features.tsv", ("FeatureID", "Words"))
    llm = LLMSettings(llm="m", llm_url=server.url, api_key_env="OPENAI_API_KEY", cache=tmp_path / "c")
    found = explain(tmp_path, ExplainSettings(max_rows=2, llm=llm, send=SendSettings(dry_run=True)))
    assert not found.asked and not server.sent and found.exchange.estimate.requests == 4
    assert found.rows == read_annotations(table)[:2]


def test_the_original_asks_about_the_ends_of_spans(client: LLMClient, server: FakeOpenAI, tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    rows = [AnnotationRow(1, f"Span 1: {' '.join(f'w{i}' for i in range(20))} about rivers")]
    found = explain(rows, ExplainSettings(verify=False, legacy=True, tokenizer=str(tmp_path)), client=client)
    asked = last_user_text(server.sent[0])
    assert "w12 w13" in asked and "w11" not in asked and found.rows[0].words.startswith("Span 1: w12")
    with pytest.raises(ValueError, match="give both or neither. Received: legacy=True, tokenizer=None"):
        ExplainSettings(legacy=True)


def test_what_cannot_be_asked_is_refused(client: LLMClient) -> None:
    with pytest.raises(ValueError, match=r"No feature has a summary; run explain first\."):
        judge(features(), "toxicity", client=client)
    with pytest.raises(ValueError, match="Received: task='nothing'"):
        judge(features(), "nothing", client=client)
    with pytest.raises(ValueError, match="`extra` must be a JSON object"):
        JudgeSettings(answers=AnswerSettings(extra="[1]"))
    with pytest.raises(ValueError, match="`max_rows` must be an integer of 1 or more"):
        ExplainSettings(max_rows=0)
