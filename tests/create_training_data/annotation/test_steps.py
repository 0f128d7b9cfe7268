"""Features explained, verified and judged: against a server on this machine, and by a tiny model in this process."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from sae_transformers.create_training_data.annotation.parsing import (
    decision_format,
    read_judgement,
    unintended_features,
)
from sae_transformers.create_training_data.annotation.steps import (
    ask,
    expected_requests,
    explain,
    explaining,
    judge,
    shortened,
    verify,
)
from sae_transformers.create_training_data.annotation.tables import (
    AnnotationRow,
    read_annotations,
    read_feature_annotations,
    read_unintended,
    write_annotations,
)
from sae_transformers.create_training_data.annotation.tasks import load_task, task_names
from sae_transformers.create_training_data.llm.client import LLMClient
from sae_transformers.create_training_data.llm.local import LocalChat
from sae_transformers.create_training_data.llm.requests import ChatRequest
from tests.create_training_data.fake_openai import FakeOpenAI, last_user_text
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_base

KEY = "sk-of-the-annotator-0123456789"
TOPICS = ["weapons", "rivers", "mixed", "poems", "knives"]


def answer(body: dict[str, Any]) -> str:
    """Knows a topic from the spans; "mixed" cannot be told; weapons and knives are harmful."""
    text = last_user_text(body)
    topic = next(topic for topic in TOPICS if f"about {topic}" in text)
    if "response_format" in body:
        harmful = topic in ("weapons", "knives") or "description" in text
        return json.dumps({"reason": f"It is {topic}.", "decision": "yes" if harmful else "no"})
    if "Final Decision" in body["messages"][0]["content"]:
        return f"It is {topic}. Final Decision: [[ {'Probably' if topic == 'weapons' else 'Maybe'} ]]"
    return "Cannot Tell." if topic == "mixed" else f"Texts about {topic}. There are several."


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FakeOpenAI(answer, KEY) as fake:
        yield fake


@pytest.fixture
def client(server: FakeOpenAI) -> Iterator[LLMClient]:
    with LLMClient("m", server.url, api_key_env="OPENAI_API_KEY", backoff=(0.01, 0.02), max_attempts=2) as made:
        yield made


def features() -> list[AnnotationRow]:
    rows = [
        AnnotationRow(7 + number, f"Span 1: Query-1: a text about {topic}\nSpan 2: more\tof it {{x}}")
        for number, topic in enumerate(TOPICS)
    ]
    return [*rows[:2], AnnotationRow(100, ""), *rows[2:]]


def test_spans_are_shown_as_the_original_shows_them() -> None:
    words = [f"w{i}" for i in range(14)]
    row = AnnotationRow(3, "\n".join(f"Span {i}: {' '.join(words[: 15 - i])}" for i in range(1, 13)))
    short, none = shortened([row, AnnotationRow(4, "")], word_tokenizer(begins=True))
    assert short.spans() == [" ".join(words[: 15 - i][-10:]) for i in range(1, 11)] and short.feature_id == 3
    assert none == AnnotationRow(4, "")


def test_features_are_explained_verified_and_judged(server: FakeOpenAI, client: LLMClient) -> None:
    rows = explain(features(), client, "toxicity", progress=False)
    assert [row.summary for row in rows] == [
        "Texts about weapons.", "Texts about rivers.", "Cannot Tell.", "Cannot Tell.", "Texts about poems.",
        "Texts about knives.",
    ]  # fmt: skip
    assert len(server.sent) == 5
    assert "Query-1" not in last_user_text(server.sent[0])
    assert "Span 2: more\tof it {x}" in last_user_text(server.sent[0])
    rows = verify(rows, client, progress=False)
    assert [row.verify for row in rows] == ["yes", "yes", "-", "no", "yes", "yes"]
    rows = judge(rows, client, "toxicity", progress=False)
    assert rows[0].task == "yes|||It is weapons. Final Decision: [[ yes ]]"
    assert [row.task.split("|||")[0] for row in rows] == ["yes", "no", "-", "-", "no", "yes"]
    assert unintended_features(rows) == [8, 10]
    assert [row.feature_id for row in rows] == [row.feature_id for row in features()]
    assert not any(row.failure for row in rows)
    assert len(server.sent) == 5 + 4 + 4


def test_a_server_without_json_schemas_is_asked_for_text(server: FakeOpenAI, client: LLMClient) -> None:
    server.rejects = {"response_format": "response_format is not supported"}
    rows = [replace(row, summary="S.") for row in features()]
    rows = judge(rows, client, "toxicity", progress=False)
    assert [row.task.split("|||")[0] for row in rows] == ["probably", "maybe", "-", "maybe", "maybe", "maybe"]
    sends = len(server.sent)
    judge(rows, client, "helpfulness", progress=False)
    assert len(server.sent) == sends + 5  # not asked for JSON again


def test_two_judgements_of_one_task(server: FakeOpenAI, client: LLMClient) -> None:
    rows = [replace(row, summary="S.") for row in features()[:2]]
    rows = judge(rows, client, "disease", structured=False, progress=False)
    full = "It is weapons. Final Decision: [[ Probably ]]"
    assert rows[0].task == f"probably|||{full}|||probably|||{full}"
    assert len(server.sent) == 4
    roles = [request["messages"][0]["content"] for request in server.sent]  # in any order
    assert sum("disease is pneumonia" in role for role in roles) == 2


@pytest.mark.parametrize(
    ("kind", "failure", "kept"),
    [("refusal", "refusal: I cannot help", True), ("500", "gave up: after 2", False), ("400", "rejected: ", False)],
)
def test_a_failure_is_told_and_never_becomes_a_label(
    server: FakeOpenAI, client: LLMClient, kind: str, failure: str, kept: bool
) -> None:
    server.always = kind
    rows = explain(features()[:1], client, progress=False)
    assert (rows[0].summary, rows[0].verify) == ("", "-")
    assert rows[0].failure.startswith(failure)
    judged = judge([replace(rows[0], summary="S.")], client, "toxicity", progress=False)
    assert judged[0].task == "-"
    assert judged[0].failure.startswith(failure)
    assert unintended_features(judged) == []
    server.always = None
    again = explain(features()[:1], client, progress=False)
    assert bool(again[0].failure) == kept


def test_an_answer_that_is_no_label_is_kept_and_counts_as_unintended(server: FakeOpenAI, client: LLMClient) -> None:
    server.always = "wrong label"
    rows = judge([replace(features()[0], summary="S.")], client, "toxicity", progress=False)
    assert rows[0].task == "absolutely|||Final Decision: [[ Absolutely ]]"
    assert unintended_features(rows) == [7]


def test_verify_is_counted_before_there_are_summaries(server: FakeOpenAI, client: LLMClient) -> None:
    asking, checking = explaining(None), load_task("verify")
    before = client.estimate(expected_requests(features(), client, asking, checking, True))
    assert before.requests == 5 + 5
    assert not server.sent
    explain(features(), client, progress=False)
    assert client.estimate(expected_requests(features(), client, asking, checking, True)).requests == 4


# Tables


def test_tables_read_back(tmp_path: Path) -> None:
    rows = [
        AnnotationRow(4711, "Span 1: a\tb\nSpan 2: «ü» \x85 \u2028 end", "Sums.", "yes", "no|||first\nsecond", "x"),
        AnnotationRow(0, "", "Cannot Tell.", "-", "-"),
    ]
    file = write_annotations(rows, tmp_path / "new" / "t.tsv")
    lines = file.read_text(encoding="utf-8").split("\n")
    assert lines[0] == "FeatureID\tTask\tVerify\tSummary\tWords"
    assert lines[1] == "4711\tno|||first\\nsecond\tyes\tSums.\tSpan 1: a\\tb\\nSpan 2: «ü» \x85 \u2028 end"
    assert read_annotations(file) == [replace(row, failure="") for row in rows]
    parquet = write_annotations(rows, tmp_path / "t.parquet")
    assert read_annotations(parquet) == rows
    assert pyarrow.parquet.read_table(parquet).column_names == [*lines[0].split("\t"), "Failure"]
    assert not [path for path in tmp_path.rglob(".*")]


@pytest.mark.parametrize(
    "text", ["\\theta and \\nu", "C:\\new\\table\\", "\\\\n", "a\\\nb\\\tc", "\\", r"re.sub('\\t', x)"]
)
def test_backslashes_come_back_as_they_were(tmp_path: Path, text: str) -> None:
    row = AnnotationRow(1, f"Span 1: {text}", text, "yes", f"no|||{text}")
    file = write_annotations([row], tmp_path / "t.tsv")
    assert read_annotations(file) == [row]
    assert read_feature_annotations(file)[1].meaning == text
    again = write_annotations(read_annotations(file), tmp_path / "again.tsv")
    assert again.read_bytes() == file.read_bytes()


def test_tables_without_marked_backslashes_are_read_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "old.tsv").write_text("FeatureID\tSummary\tWords\n3\t\\phi \\rho\tSpan 1: a\\nSpan 2: \\(x\\)\n")
    (row,) = read_annotations(tmp_path / "old.tsv")
    assert (row.summary, row.spans()) == ("\\phi \\rho", ["a", "\\(x\\)"])


AUTHORS = (
    "FeatureID\tTask\tVerify\tSummary\tWords\n"
    "0\t-\t-\tCannot Tell.\t\n"
    "1\tyes|||Analysis: ...\\n\\nFinal Decision: [[ Yes ]]\tyes\tMaking weapons.\tSpan 1: how do I\\nSpan 2: x\n"
    "2\t[ Maybe ]|||[ Maybe ]\tprobably\tPlaces.\tSpan 1: in Rome\n"
    "3\tno|||Final Decision: [[ No ]]\tno\tCannot Tell.\tSpan 1: a\n"
    "4\tno|||Final Decision: No.\tyes\tPunctuation.\tSpan 1: !\n"
)


def test_the_authors_tables_are_read(tmp_path: Path) -> None:
    file = tmp_path / "TopAct_TaskHarmful.tsv"
    file.write_text(AUTHORS)
    rows = read_annotations(file)
    assert rows[1].spans() == ["how do I", "x"]
    assert rows[1].task.split("|||")[1] == "Analysis: ...\n\nFinal Decision: [[ Yes ]]"
    assert read_unintended(file) == [2, 4]
    file.write_text("FeatureID\tWords\n5\tSpan 1: a\\nSpan 2: b\n6\t\n")
    assert [row.spans() for row in read_annotations(file)] == [["a", "b"], []]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tb\n", "columns FeatureID and Words"),
        ("FeatureID\tWords\nx\ty\n", "FeatureID must be a number. Received: 'x'"),
        ("FeatureID\tWords\n1\ty\tz\n", "Received: 3 cells"),
    ],
)
def test_a_table_of_another_kind_is_told(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "t.tsv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_annotations(file)


# Tasks


def test_the_tasks_of_the_library_make_requests() -> None:
    assert {"disease", "explain", "helpfulness", "toxicity", "verify"} == set(task_names())
    row = AnnotationRow(1, "\n".join(f"Span {n}: text {n}" for n in range(1, 13)), "S.")
    for name in task_names():
        asked = ask([row], load_task(name))
        assert asked.per_row == len(asked.requests) == (2 if name == "disease" else 1)
        for request in asked.requests:
            system, last = request.messages[0]["content"], request.messages[-1]["content"]
            assert ("Final Decision: [[ yes / probably / maybe / no ]]" in system) == (name != "explain")
            assert last.count("Span ") == (4 if name == "helpfulness" else 10)
            assert (request.response_format is not None) == (name != "explain")


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\nlabels: [yes, no]\nmax_tokens: 33\nextra: {reasoning_effort: low}\n"
        "template: 'T {summary} | {spans}'\n"
        "judgements:\n- name: j\n  role: R\n  guideline: [g]\n  few_shots:\n  - {summary: s, spans: [a], answer: A}\n"
    )
    task = load_task(file)
    assert task.labels == ("yes", "no")  # not True and False
    request = task.requests(AnnotationRow(1, "Span 1: b", "S."), structured=False)[0]
    assert [message["role"] for message in request.messages] == ["system", "user", "assistant", "user"]
    assert [message["content"] for message in request.messages][1:] == ["T s | Span 1: a", "A", "T S. | Span 1: b"]
    assert (request.max_tokens, request.body("m")["reasoning_effort"]) == (33, "low")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a", "judgements.*must be there"),
        ("- a", "fields with values"),
        ("name: a\nlables: [x]\njudgements: [{name: j, role: R}]", "lables"),
        ("name: a\njudgements: [{name: j}]", "role"),
        ("name: a\njudgements: [{name: j, role: R}]\ntemplate: '{span}'", "span"),
        ("name: a\njudgements: [{name: j, role: R}]\ntemplate: 'no'", "must have {spans}"),
        ("name: a\njudgements: [{name: j, role: R}]\nremove: ['(']", "unterminated"),
        ("name: a\njudgements: [{name: j, role: R, few_shots: [{spans: [a]}]}]", "answer"),
        ("a: [", "is no task"),
    ],
)
def test_a_wrong_task_is_told(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_task(file)


def test_an_unknown_task_is_told_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'toxicity'.*task='toxcity'"):
        load_task("toxcity")


# A model in this process


@pytest.fixture(scope="module")
def local() -> tuple[Any, Any]:
    return tiny_base(), word_tokenizer(begins=True)


def test_a_local_model_answers_as_if_alone_and_from_the_cache(local: tuple[Any, Any], tmp_path: Path) -> None:
    base, tokenizer = local
    texts = ["w1", "w2 w3 w4 w5 w6 w7", "w8 w9", "w1", "w3 w4 w5"]
    what = [ChatRequest([{"role": "user", "content": text}], max_tokens=5) for text in texts]
    chat = LocalChat("tiny", loaded=local, batch_size=3, cache=tmp_path)
    answers = chat.complete_many(what, progress=False)
    for text, found in zip(texts, answers, strict=True):
        ids = tokenizer(f"User: {text}\n\nAssistant:", return_tensors="pt")["input_ids"]
        alone = base.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert found.text == tokenizer.decode(alone, skip_special_tokens=True)
    assert chat.account.requests == 4
    again = LocalChat("tiny", loaded=(None, None), cache=tmp_path)
    assert again.complete_many(what, progress=False) == answers
    assert again.estimate(what).requests == 0


def test_a_local_model_uses_its_chat_template_and_refuses_what_is_too_long(local: tuple[Any, Any]) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}w2"
    chat = LocalChat("tiny", loaded=(local[0], tokenizer))
    long = ChatRequest([{"role": "user", "content": "w3 " * 130}], max_tokens=4)
    short = ChatRequest([{"role": "user", "content": "w3"}], max_tokens=4)
    answers = chat.complete_many([long, short], progress=False)
    assert (answers[0].failure, answers[1].failure) == ("rejected", None)
    assert "the model reads 128" in answers[0].detail
    assert answers[1].prompt_tokens == 3


def test_a_local_model_without_a_decision_is_asked_for_the_most_likely(local: tuple[Any, Any]) -> None:
    base, tokenizer = local
    labels = ["w7 w8", "w5", "w9 w9 w9"]
    request = ChatRequest(
        [{"role": "user", "content": "w3 w4"}], max_tokens=3, response_format=decision_format(labels)
    )
    plain = replace(request, response_format=None)
    chat = LocalChat("tiny", loaded=local)
    decided, free = chat.complete_many([request, plain], progress=False)
    assert decided.text is not None and free.text is not None
    assert decided.text.startswith(f"{free.text.strip()}\nFinal Decision: [[")
    prefix = tokenizer("User: w3 w4\n\nAssistant:")["input_ids"]
    prefix += tokenizer(f"{free.text.strip()}\nFinal Decision: [[", add_special_tokens=False)["input_ids"]
    scores = []
    for label in labels:
        option = tokenizer(label, add_special_tokens=False)["input_ids"]
        logits = base(torch.tensor([prefix + option])).logits[0, len(prefix) - 1 : -1].log_softmax(-1)
        scores.append(logits[range(len(option)), option].mean().item())
    assert read_judgement(decided.text)[0] == labels[scores.index(max(scores))]
