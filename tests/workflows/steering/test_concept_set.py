"""`concept_set` from Python: texts in memory and on disk, nothing sent before the estimate."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_transformers import ConceptRecipe, ConceptSetSettings, LLMSettings, concept_set
from sae_transformers.create_training_data.concept_sets import read_concept_sets
from sae_transformers.create_training_data.llm.client import LLMClient
from tests.cli.test_concept_set import answer
from tests.create_training_data.fake_openai import FakeOpenAI

RECIPE = ConceptRecipe(positives=4, negatives=5, test=2, hard_negatives=2, steering=3, words=9)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def settings(server: FakeOpenAI, cache: Path, **more: bool) -> ConceptSetSettings:
    return ConceptSetSettings(RECIPE, LLMSettings(llm="m", llm_url=server.url, cache=cache), **more)


def test_texts_of_each_concept(tmp_path: Path) -> None:
    lines: list[str] = []
    reports: list[tuple[int, int]] = []
    with FakeOpenAI(answer) as server:
        sent_before: list[int] = []

        def notice(line: str) -> None:
            lines.append(line)
            sent_before.append(len(server.sent))

        result = concept_set(
            ["the sea", "loops"],
            settings(server, tmp_path / "cache"),
            progress=lambda done, total: reports.append((done, total)),
            notice=notice,
        )
        assert sent_before == [0] and lines[0].startswith("m: ")
        sent = len(server.sent)
        assert result.exchange.estimate.requests == sent
        again = concept_set(["the sea", "loops"], settings(server, tmp_path / "cache"))
        assert len(server.sent) == sent and again.sets == result.sets and again.exchange.estimate.answered == sent
    assert reports[-1][0] == reports[-1][1]
    frame = result.to_frame()
    assert list(frame.columns) == ["concept", "part", "category", "instruction", "text"]
    assert len(frame) == 2 * (4 + 5 + 2 + 2 + 2)
    assert result.to_dict()["failures"] == {} and "the sea" in result._repr_html_()
    assert result.summary()[1].startswith("the sea: {'train': {'negative': 5, 'positive': 4}")
    assert len(result.save(tmp_path / "sets")) == 3
    assert read_concept_sets(tmp_path / "sets")[1].concept == "loops"


def test_a_dry_run_asks_nothing_and_missing_answers_are_not_written(tmp_path: Path) -> None:
    asked = [f"say something about {n}" for n in range(12)]
    with FakeOpenAI(answer) as server:
        dry = concept_set(["the sea"], settings(server, tmp_path / "cache", dry_run=True))
        assert not dry.asked and not dry.sets and not server.sent and dry.exchange.estimate.requests == 17
        with pytest.raises(ValueError, match="nothing is asked"):
            dry.save(tmp_path / "sets")
        client = LLMClient("m", server.url, cache=None, concurrency=1)
        server.next("400")
        result = concept_set(["the sea"], ConceptSetSettings(RECIPE), instructions=asked, client=client)
        client.close()
    assert result.failures == {"rejected": 1} and "1 rejected" in (result.failure() or "")
    with pytest.raises(ValueError, match="Some answers are missing: 1 rejected"):
        result.save(tmp_path / "sets")
    assert not (tmp_path / "sets").exists()


def test_what_the_model_declines_to_write_is_left_out_with_a_note(tmp_path: Path) -> None:
    """It stays in the cache as answered, so that asking again would give the same for ever."""
    asked = [f"say something about {n}" for n in range(12)]
    with FakeOpenAI(answer) as server:
        client = LLMClient("m", server.url, cache=tmp_path / "cache", concurrency=1)
        server.next("refusal")
        result = concept_set(["the sea"], ConceptSetSettings(RECIPE), instructions=asked, client=client)
        again = concept_set(["the sea"], ConceptSetSettings(RECIPE), instructions=asked, client=client)
        client.close()
    assert result.failures == again.failures == result.left_out and sum(result.left_out.values()) == 1
    assert result.failure() is None and "are left out: 1 refusal." in result.summary()[-1]
    result.save(tmp_path / "sets")
    whole = sum(len(texts) for one in result.sets for part in (one.train, one.test) for texts in part.values())
    assert len(read_concept_sets(tmp_path / "sets")) == 1 and whole > 0


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Which model"):
        concept_set(["the sea"])
    with pytest.raises(FileNotFoundError):
        concept_set(tmp_path / "nothing.txt")
    with FakeOpenAI(answer) as server:
        with pytest.raises(ValueError, match="each once"):
            concept_set(["the sea", "the sea"], settings(server, tmp_path))
        with pytest.raises(ValueError, match="needs 10 different instructions. Received: 0"):
            concept_set(["the sea"], settings(server, tmp_path), instructions=[])
