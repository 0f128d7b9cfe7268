"""lm-evaluation-harness on tiny models: equal to the bare base, to our own scores; steered as `generate` steers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sae_transformers import FeatureEdit, Steering
from sae_transformers.evaluation.capability.lm_eval import harness_model, run_tasks
from sae_transformers.evaluation.capability.tasks import (
    MmluSubject,
    MultipleChoice,
    read_lambada,
    read_mmlu,
    shipped_task,
    write_tasks,
)
from sae_transformers.evaluation.fairness.stereotypes import score_last_words
from sae_transformers.evaluation.generation.log_likelihood import token_scores
from sae_transformers.evaluation.suites import CapabilitySuite
from sae_transformers.evaluation.suites.settings import CapabilitySettings
from tests.tiny import tiny_base, tiny_model

WORDS = [f"w{i}" for i in range(80)]
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", "A", "B", "C", "D", "A.", "B.", "C.", "D.", "Answer:", *WORDS]
SHARED = Path(__file__).parents[4] / "shared" / "data" / "capability"
STRONG = Steering([FeatureEdit(feature=3, op="direction", value=6.0)])


def tokenizer(begins: bool = False) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    if begins:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def passages(count: int = 7, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(80, (n,), generator=generator)) for n in lengths]


def questions(count: int, seed: int) -> list[MultipleChoice]:
    return [MultipleChoice(text, ("w1", "w2", "w3", "w4"), i % 4) for i, text in enumerate(passages(count, seed))]


MMLU = {"some_words": MmluSubject(questions(5, 1), questions(2, 2)), "others": MmluSubject(questions(4, 3))}


@pytest.fixture(scope="module")
def offline() -> Any:
    """A machine without a network, as far as the Hub's client is concerned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, offline) -> tuple[str, list[str]]:
    folder = tmp_path_factory.mktemp("tasks")
    return str(folder), write_tasks(folder, passages(), {"some_words": MMLU["some_words"]}, shots=2)


def log_likelihoods(found: dict[str, Any]) -> dict[str, list[list[float]]]:
    return {
        name: [[one[0][0] for one in row["resps"]] for row in sorted(rows, key=lambda row: row["doc_id"])]
        for name, rows in found["samples"].items()
    }


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def test_the_suite_measures_the_base_the_model_and_the_steered_model(offline, model) -> None:
    generated = Steering(STRONG.edits, positions="generated")
    seen: list[int] = []
    suite = CapabilitySuite(
        passages(9), MMLU | {"others": MmluSubject(questions(6, 3), questions(2, 5))}, CapabilitySettings(2, 4, 3),
        {"strong": STRONG, "generated": generated},
    )  # fmt: skip
    found = suite(model, tokenizer(), report=seen.append)
    assert found.value("log_likelihood_difference", "none") == 0.0
    assert found.value("log_likelihood_difference", "strong") > 0.1  # pyright: ignore[reportOptionalOperand]
    for metric in ("lambada_accuracy", "lambada_perplexity", "mmlu_some_words_accuracy", "mmlu_accuracy"):
        assert found.value(metric, "none") == found.value(metric, "base")
        change = found.value(f"{metric}_change", "strong")
        assert change == pytest.approx(found.value(metric, "strong") - found.value(metric, "none"))  # pyright: ignore
    by_name = {(one.metric, one.method): one for one in found.measurements}
    whole = by_name["mmlu_accuracy", "none"]
    parts = [by_name[f"mmlu_{name}_accuracy", "none"] for name in MMLU]
    assert whole.n == 8 and whole.value == pytest.approx(sum(part.value * 4 for part in parts) / 8)  # pyright: ignore
    assert found.value("lambada_perplexity", "strong") != found.value("lambada_perplexity", "generated")
    one = by_name["lambada_perplexity", "strong"]
    assert one.low is not None and one.high is not None and one.low <= one.value <= one.high  # pyright: ignore
    assert found.settings["rows"] == {"local_lambada": 4, "local_mmlu_some_words": 4, "local_mmlu_others": 4}
    assert found.settings["steerings"]["generated"]["positions"] == "generated"
    assert json.loads(json.dumps(dict(found.settings))) == found.settings
    assert sum(seen) > 0 and max(seen) <= 3


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_without_steering_every_log_likelihood_is_the_bare_bases(architecture, tasks) -> None:
    folder, names = tasks
    wrapped, bare = tiny_model(architecture), tiny_base(architecture)  # of the same seed; nothing of ours is in `bare`
    found = [
        log_likelihoods(run_tasks(harness_model(lm, tokenizer(), batch_size=3), names, folder))
        for lm in (wrapped, bare)
    ]
    assert found[0] == found[1]


def test_the_default_steering_is_the_one_that_is_measured(offline, model) -> None:
    model.steering = STRONG
    try:
        settings = CapabilitySettings(base=False)
        found = CapabilitySuite(passages(3), settings=settings)(model, tokenizer())
        named = CapabilitySuite(passages(3), settings=settings, steerings={"same": STRONG})(model, tokenizer())
    finally:
        model.steering = None
    assert found.value("lambada_perplexity", "default") == named.value("lambada_perplexity", "same")
    assert found.value("lambada_perplexity", "default") != found.value("lambada_perplexity", "none")
    assert {one.method for one in found.measurements} == {"none", "default"}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_our_scores_of_last_words_equal_lm_evals(architecture, tasks) -> None:
    folder, names = tasks
    base, words = tiny_base(architecture), tokenizer()
    theirs = run_tasks(harness_model(base, words, batch_size=3), names[:1], folder)
    rows = [words(text)["input_ids"] for text in passages()]
    ours = token_scores(base, rows, [len(row) - 1 for row in rows])  # pyright: ignore
    expected = torch.tensor(log_likelihoods(theirs)["local_lambada"], dtype=torch.float64)[:, 0]
    torch.testing.assert_close(torch.cat(ours.log_p), expected, rtol=1e-6, atol=1e-6)
    assert theirs["results"]["local_lambada"]["perplexity,none"] == pytest.approx(math.exp(-float(expected.mean())))


def test_our_lambada_equals_lm_evals_with_a_beginning_token(tasks) -> None:
    folder, names = tasks
    base = tiny_base()
    theirs = run_tasks(harness_model(base, tokenizer(begins=True), batch_size=3), names[:1], folder)
    ours = score_last_words(base, tokenizer(), passages())
    expected = torch.tensor(log_likelihoods(theirs)["local_lambada"], dtype=torch.float64)[:, 0]
    torch.testing.assert_close(ours.log_p, expected, rtol=1e-6, atol=1e-6)
    assert ours.right.double().mean() == theirs["results"]["local_lambada"]["acc,none"]


@pytest.mark.parametrize(
    ("positions", "steered"),  # of n tokens that are read, which are all prompt: the last word is one token
    [
        ("generated", lambda n: [n - 1]),
        ("last_prompt", lambda n: [n - 1]),
        ("prompt", range),
        ("all", range),
        ([(-2, None)], lambda n: range(max(n - 2, 0), n)),
        ([(1, 3)], lambda n: range(1, min(3, n))),
    ],
)
def test_steering_knows_where_the_context_ends(positions, steered, model, tasks) -> None:
    """Each row alone, with a mask of the positions that `generate` would steer, gives the same numbers."""
    folder, names = tasks
    steering, words = Steering(STRONG.edits, positions=positions), tokenizer()
    theirs = log_likelihoods(run_tasks(harness_model(model, words, steering=steering, batch_size=4), names, folder))
    everywhere = Steering(STRONG.edits)
    for text, (found,) in zip(passages(), theirs["local_lambada"], strict=True):
        ids = torch.tensor([words(text)["input_ids"]])[:, :-1]
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[0, list(steered(ids.shape[1]))] = True
        with torch.no_grad():
            logits = model(ids, steering=everywhere, steering_mask=mask).logits[0, -1]
        goal = words.convert_tokens_to_ids(text.split()[-1])
        assert found == pytest.approx(float(logits.log_softmax(-1)[goal]), abs=1e-5)


def test_a_context_is_found_whatever_the_padding(model) -> None:
    harness = harness_model(model, tokenizer(), steering=Steering(STRONG.edits, positions="generated"), batch_size=2)
    requests = [(("", ""), [5, 6, 0], [7, 8]), (("", ""), [9], [10, 11])]
    found = harness._loglikelihood_tokens(requests, disable_tqdm=True)
    assert harness._context_length([5, 6, 0, 7, 0, 0]) == 3 and harness._context_length([9, 10, 0]) == 1
    words, continuation = torch.tensor([[5, 6, 0, 7, 8]]), torch.tensor([7, 8])
    mask = torch.tensor([[False, False, True, True]])
    with torch.no_grad():
        logits = model(words[:, :-1], steering=STRONG, steering_mask=mask).logits[0, 2:].log_softmax(-1)
    expected = float(logits.gather(-1, continuation[:, None]).sum())
    assert found[0][0] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match=r"contexts of \[2, 3\] tokens"):
        harness._loglikelihood_tokens([(("", ""), [5, 6], [7, 8]), (("", ""), [5, 6, 7], [8])], disable_tqdm=True)
    with pytest.raises(ValueError, match="contexts of"):
        harness._context_length([90, 91])


def test_generation_is_steered_too(model) -> None:
    words = tokenizer()
    ids = torch.tensor([words(passages()[0])["input_ids"]])
    n = ids.shape[1]
    found = {}
    for name, steering in {"none": False, "strong": STRONG}.items():
        harness = harness_model(model, words, steering=steering)
        found[name] = harness._model_generate(ids, n + 6, ["w99"], attention_mask=torch.ones_like(ids))
        expected = model.generate(ids, max_new_tokens=6, do_sample=False, steering=steering, pad_token_id=0)
        assert torch.equal(found[name], expected)
    assert not torch.equal(found["none"], found["strong"])


def test_the_tokenizer_that_was_given_stays_as_it_is(model) -> None:
    words = tokenizer()
    words.pad_token = None
    harness = harness_model(model, words)
    assert words.pad_token is None and harness.tokenizer.pad_token is not None


def test_tasks_have_the_form_of_lm_evals_own(tmp_path) -> None:
    import yaml

    (name,) = write_tasks(tmp_path, mmlu={"us_foreign_policy": MmluSubject(questions(1, 0))}, shots=0)
    written = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
    own = shipped_task("local_mmlu")
    for key in ("doc_to_text", "doc_to_choice", "doc_to_target", "metric_list", "output_type", "test_split"):
        assert written[key] == own[key]
    import lm_eval.tasks

    theirs = Path(next(iter(lm_eval.tasks.__path__))) / "mmlu/default/mmlu_us_foreign_policy.yaml"
    assert written["description"] == yaml.safe_load(theirs.read_text())["description"]
    row = json.loads((tmp_path / f"{name}_test.jsonl").read_text())
    assert row["choices"] == ["w1", "w2", "w3", "w4"] and row["answer"] == 0


def test_files_are_read(tmp_path) -> None:
    (tmp_path / "lambada.jsonl").write_text('{"text": "one two"}\n\n{"text": "three four"}\n')
    assert read_lambada(tmp_path / "lambada.jsonl") == ["one two", "three four"]
    for split, answer in (("test", "B"), ("dev", "D")):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"a_b_{split}.csv").write_text(f'"Which, of\nthese?",1,2,"3, or 4",5,{answer}\n')
    folder = read_mmlu(tmp_path)
    assert list(folder) == ["a_b"]
    assert folder["a_b"].test == [MultipleChoice("Which, of\nthese?", ("1", "2", "3, or 4", "5"), 1)]
    assert folder["a_b"].shots[0].answer == 3
    with zipfile.ZipFile(tmp_path / "mmlu.zip", "w") as archive:
        for file in tmp_path.rglob("*.csv"):
            archive.write(file, f"data/{file.relative_to(tmp_path)}")
    assert read_mmlu(tmp_path / "mmlu.zip", ["a_b"]) == folder


def test_bad_input(tmp_path, model) -> None:
    (tmp_path / "bad.jsonl").write_text('{"words": "x"}\n')
    with pytest.raises(ValueError, match="bad.jsonl:1: expected an object with a `text`"):
        read_lambada(tmp_path / "bad.jsonl")
    (tmp_path / "x_test.csv").write_text("question,1,2,3,4,E\n")
    with pytest.raises(ValueError, match="answer 'E'"):
        read_mmlu(tmp_path)
    with pytest.raises(ValueError, match=r"Received: \['physics'\]"):
        read_mmlu(tmp_path, ["physics"])
    with pytest.raises(ValueError, match="Received: neither"):
        write_tasks(tmp_path)
    with pytest.raises(ValueError, match="two words or more"):
        write_tasks(tmp_path, ["one"])
    with pytest.raises(ValueError, match="shots=-1"):
        write_tasks(tmp_path, ["one two"], shots=-1)
    with pytest.raises(ValueError, match="Received: 4 and 0"):
        write_tasks(tmp_path, mmlu={"others": MMLU["others"]})
    with pytest.raises(ValueError, match="'../x'"):
        write_tasks(tmp_path, mmlu={"../x": MMLU["others"]}, shots=0)
    with pytest.raises(ValueError, match="limit=0"):
        CapabilitySettings(limit=0)
    with pytest.raises(ValueError, match="Received: \\['base'\\]"):
        CapabilitySuite(passages(), steerings={"base": STRONG})(model, tokenizer())
    with pytest.raises(ValueError, match="numbered from 0. Received: sae=4"):
        edit = FeatureEdit(sae=4, feature=1, op="ablate")
        CapabilitySuite(passages(), steerings={"x": [edit]})(model, tokenizer())
    with pytest.raises(ValueError, match="needs a model with SAEs"):
        harness_model(model.lm, tokenizer(), steering=STRONG)


def test_without_lm_eval_the_message_says_what_to_install(monkeypatch, model) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'sae-transformers\[capability\]'"):
        CapabilitySuite(passages())(model, tokenizer())


@pytest.mark.slow
@pytest.mark.parametrize("steering", [None, STRONG])
def test_the_command_line_of_lm_eval_runs_a_saved_model(steering, tmp_path) -> None:
    """`lm_eval` on a folder, by remote code: what it says is what the loaded model says, with its default steering."""
    names = write_tasks(tmp_path / "tasks", passages(), {"some_words": MMLU["some_words"]}, shots=2)
    model = tiny_model()
    model.config.weights_scope = "full"
    model.steering = steering
    model.save_pretrained(tmp_path / "model")
    ours = run_tasks(harness_model(model, tokenizer(), batch_size=4), names, str(tmp_path / "tasks"))
    tokenizer().save_pretrained(tmp_path / "model")
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "4",
        "--model_args", f"pretrained={tmp_path / 'model'},trust_remote_code=True,dtype=float32",
        "--tasks", ",".join(names), "--include_path", str(tmp_path / "tasks"), "--log_samples",
        "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, rows in log_likelihoods(ours).items():
        (file,) = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        theirs = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
        found = torch.tensor([[float(one[0][0]) for one in row["resps"]] for row in theirs])
        torch.testing.assert_close(found, torch.tensor(rows), rtol=0, atol=1e-5)
