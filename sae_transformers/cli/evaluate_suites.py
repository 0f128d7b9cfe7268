"""Of the verb `evaluate`: reads each suite's data, says what is missing, and calls the suite."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import parse_feature

if TYPE_CHECKING:
    from ..evaluation.journal import Journal
    from ..evaluation.results import DataFile, SuiteResult

Report = Callable[[int], object]


@dataclass(frozen=True)
class Prepared:
    """A suite that is ready to run.

    asked: every option that its numbers depend on, as JSON. data: what was read. run: (model, tokenizer, report,
    journal); the long suites use the journal.
    """

    asked: dict[str, Any]
    data: list[DataFile]
    run: Callable[[Any, Any, Report, Journal], SuiteResult]


NEEDS = {  # a suite -> options of which one must be given
    "reconstruction": ("texts",),
    "detection": ("labelled",),
    "steering": ("prompts",),
    "fairness": ("winobias", "crows_pairs", "lambada", "original"),
    "capability": ("lambada", "mmlu"),
    "speed": (),
}


def chosen_suites(s: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    """The suites that are asked for, or all whose data is given, in the order of `known`.

    Raises:
        ValueError: an unknown suite, or one whose data was not given.
    """
    if s["suite"] is None:
        return [name for name in known if not NEEDS[name] or any(s[option] is not None for option in NEEDS[name])]
    asked = [name.strip() for name in s["suite"].split(",") if name.strip()]
    if not asked or set(asked) - set(known):
        raise ValueError(f"--suite must be of {', '.join(known)}, comma-separated. Received: {s['suite']!r}.")
    for name in asked:
        if NEEDS[name] and all(s[option] is None for option in NEEDS[name]):
            options = " or ".join(f"--{option.replace('_', '-')}" for option in NEEDS[name])
            raise ValueError(f"The suite {name!r} needs {options}. Received: none.")
    return [name for name in known if name in asked]


def prepare(name: str, s: dict[str, Any]) -> Prepared:
    """Read a suite's data.

    Raises:
        ValueError: an option or a row of the data is not what it must be.
        OSError: a file is not there.
    """
    return PREPARE[name](s)


def _features(s: Mapping[str, Any]) -> list[tuple[int, int | str]] | None:
    return [parse_feature(text) for text in s["feature"]] if s["feature"] else None


def _numbers(s: Mapping[str, Any], name: str) -> list[int]:
    try:
        found = [int(part) for part in s[name].split(",")]
    except ValueError:
        found = []
    if not found:
        raise ValueError(f"--{name} must be whole numbers, comma-separated. Received: {s[name]!r}.")
    return found


def _asked(s: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: str(s[name]) if isinstance(s[name], Path) else s[name] for name in names}


def _file(source: str | Path, rows: Any, n: int) -> DataFile:
    """Name and hash of a file; of a folder, a glob or a Hub data set the hash of what was read."""
    from ..evaluation.results import DataFile, data_file

    if Path(source).is_file():
        return data_file(source, rows=n)
    told = json.dumps(rows, ensure_ascii=True).encode()
    return DataFile(Path(source).name if Path(source).exists() else str(source), hashlib.sha256(told).hexdigest(), n)


# -- the suites ------------------------------------------------------------------------------------------------------


def _reconstruction(s: dict[str, Any]) -> Prepared:
    from ..evaluation.suite_reconstruction import reconstruction_suite
    from ..latents.texts import open_text

    if s["max_texts"] < 2:
        raise ValueError(f"--max-texts must be 2 or more. Received: {s['max_texts']}.")
    source = open_text(s["texts"], column=s["text_column"], txt_rows=s["txt_rows"])
    texts: list[str] = []
    start = 0
    while len(texts) < s["max_texts"] and (rows := source.read(start, 1024).texts):
        start += len(rows)
        texts += [text for text in rows if text.strip()]
    texts = texts[: s["max_texts"]]
    if not texts:
        raise ValueError(f"--texts: there is no text in {s['texts']!r}.")
    same = {name: s[name] for name in ("max_length", "skip_first", "tokens_at_once", "resamples", "seed")}
    asked = {**same, **_asked(s, "max_texts", "text_column", "txt_rows")}
    return Prepared(
        asked, [_file(s["texts"], texts, len(texts))],
        lambda model, tokenizer, report, _: reconstruction_suite(model, tokenizer, texts, report=report, **same),
    )  # fmt: skip


def _detection(s: dict[str, Any]) -> Prepared:
    from ..evaluation.suite_detection import detection_suite

    texts, labels, files = _labelled(s)
    same = {name: s[name] for name in ("max_length", "skip_first", "tokens_at_once", "resamples", "seed", "choose_by")}
    same = {**same, "trees": s["trees"], "seeds": _numbers(s, "seeds"), "ks": _numbers(s, "ks")}
    features = _features(s)
    asked = {**same, **_asked(s, "feature", "max_labelled", "text_column", "label_column")}
    return Prepared(
        asked, files,
        lambda model, tokenizer, report, _: detection_suite(
            model, tokenizer, texts, labels, features=features, report=report, **same
        ),
    )  # fmt: skip


def _labelled(s: dict[str, Any]) -> tuple[list[str], list[int], list[DataFile]]:
    """At most `--max-labelled` texts of each label, drawn by the seed, in the order of the rows."""
    from ..create_training_data.labelled_text import load_labelled_text

    if s["max_labelled"] < 1:
        raise ValueError(f"--max-labelled must be 1 or more. Received: {s['max_labelled']}.")
    found = load_labelled_text(s["labelled"], text_column=s["text_column"], label_column=s["label_column"])
    draw, kept = random.Random(s["seed"]), []
    for value in (0, 1):
        members = [i for i, label in enumerate(found.labels) if label == value]
        kept += draw.sample(members, min(len(members), s["max_labelled"]))
    kept.sort()
    texts, labels = [found.texts[i] for i in kept], [found.labels[i] for i in kept]
    return texts, labels, [_file(s["labelled"], [found.texts, found.labels], len(found.texts))]


def _steering(s: dict[str, Any]) -> Prepared:
    from ..evaluation.steering_methods import STRENGTHS, latent_method
    from ..evaluation.suite_steering import steering_suite
    from ..latents.splits import label_halves
    from ..training.steering_baselines import steering_methods

    lines = s["prompts"].read_text(encoding="utf-8").splitlines()
    prompts = [line for line in lines if line.strip()]
    files, fitting, scoring = [_file(s["prompts"], prompts, len(prompts))], None, None
    if s["labelled"] is not None:  # one half makes DiffMean's direction, the other the scorer
        texts, labels, more = _labelled(s)
        files += more
        sides = label_halves(labels, s["seed"])
        fitting, scoring = (_sides(texts, labels, rows) for rows in sides)
    name = s["scorer"] or ("words" if scoring else "sentiment")
    scorer = _scorer(s, name, scoring)
    try:
        strengths = STRENGTHS if s["strengths"] is None else [float(one) for one in s["strengths"].split(",")]
    except ValueError as error:
        raise ValueError(f"--strengths must be numbers, comma-separated. Received: {s['strengths']!r}.") from error
    goals = [goal.strip() for goal in s["goals"].split(",")]
    features = _features(s)
    names = (
        "new_tokens", "temperature", "generation_seeds", "perplexity_limit", "repetition_limit", "chat", "samples",
        "rows_at_once", "resamples", "seed",
    )  # fmt: skip
    same = {name: s[name] for name in names}
    asked = {
        **same, "scorer": name, "strengths": list(strengths), "goals": goals, "tokens_at_once": s["tokens_at_once"],
        **_asked(s, "feature", "more", "less", "op", "max_length", "max_labelled", "text_column", "label_column"),
        **_asked(s, "judge_model", "judge_url"),
    }  # fmt: skip

    def run(model: Any, tokenizer: Any, report: Report, journal: Journal) -> SuiteResult:
        tried = features
        if tried is None:
            tried = [(i, name) for i, entry in enumerate(model.config.sae_configs) for name in entry.concepts]
        first = {"sae": tried[0][0], "feature": tried[0][1]} if tried else {}
        measured, methods, facts = steering_methods(
            model, tokenizer, prompts, steering=model.steering or None, labelled=fitting, more=s["more"],
            less=s["less"], op=s["op"], strengths=strengths, max_length=s["max_length"], **first,
        )  # fmt: skip
        for sae, latent in tried[1:]:
            unit = "absolute" if s["op"] in ("scale", "ablate") else "norm"
            method = latent_method(latent, strengths, sae=sae, op=s["op"], unit=unit)
            methods[f"latent {latent}" + (f" of SAE {sae}" if sae else "")] = method
        try:
            return steering_suite(
                measured, tokenizer, prompts, methods, scorer, scorer_name=name, goals=goals, facts=facts,
                tokens_at_once=s["tokens_at_once"], report=report, journal=journal, **same,
            )  # fmt: skip
        finally:
            if measured is not model:  # DiffMean's model holds the same base and SAEs: they come back
                measured.unwrap()
                model.rewrap()

    return Prepared(asked, files, run)


def _sides(texts: Sequence[str], labels: Sequence[int], rows: Sequence[int]) -> tuple[list[str], list[str]]:
    """Of some rows the texts with the concept and those without."""
    return [texts[i] for i in rows if labels[i]], [texts[i] for i in rows if not labels[i]]


def _scorer(s: Mapping[str, Any], name: str, labelled: Any) -> Any:
    from ..evaluation.scorers import get_scorer

    asking: Any = None
    if name.startswith("judge:"):
        from ..create_training_data.llm_client import LLMClient
        from ..create_training_data.llm_requests import ChatRequest
        from ..create_training_data.packages import cache_folder

        if s["judge_model"] is None:
            raise ValueError("--scorer judge:CONCEPT needs --judge-model, a model's name at the server.")
        client = LLMClient(
            s["judge_model"], s["judge_url"], s["api_key_env"], cache=s["cache"] or cache_folder() / "answers"
        )

        def ask(questions: Sequence[str]) -> list[str | None]:
            requests = [ChatRequest([{"role": "user", "content": text}], 64) for text in questions]
            return [answer.text for answer in client.complete_many(requests, False)]

        asking = ask
    return get_scorer(name, labelled=labelled, ask=asking, seed=s["seed"])


def _fairness(s: dict[str, Any]) -> Prepared:
    from ..evaluation.bias import read_crows_pairs, read_winobias
    from ..evaluation.results import data_file
    from ..evaluation.suite_fairness import fairness_suite
    from ..latents.texts import read_column

    pairs: dict[str, Any] = {}
    files: list[DataFile] = []
    if s["winobias"] is not None:
        for kind in (1, 2):
            paths = [s["winobias"] / f"{side}_stereotyped_type{kind}_test.txt" for side in ("pro", "anti")]
            pairs[f"WinoBias type {kind}"] = read_winobias(*paths)[: s["max_pairs"]]
            files += [data_file(path, split="test") for path in paths]
    if s["crows_pairs"] is not None:
        found = read_crows_pairs(s["crows_pairs"])
        pairs["CrowS-Pairs gender"] = [pair for pair in found if pair.kind == "gender"][: s["max_pairs"]]
        pairs["CrowS-Pairs other"] = [pair for pair in found if pair.kind != "gender"][: s["max_pairs"]]
        files.append(data_file(s["crows_pairs"], rows=len(found)))
    words: list[str] = []
    if s["lambada"] is not None:
        words = read_column(str(s["lambada"]), "text", keep_empty=True)
        files.append(_file(s["lambada"], words, len(words)))
        words = words[: s["limit"]]
    both = None
    if (s["original"] is None) != (s["swapped"] is None):
        given, other = ("original", "swapped") if s["swapped"] is None else ("swapped", "original")
        raise ValueError(f"--{given} needs --{other}, the same texts. Received: --{given} alone.")
    if s["original"] is not None:
        sides = [read_column(s[name], s["swapped_column"], keep_empty=True) for name in ("original", "swapped")]
        if len(sides[0]) != len(sides[1]):
            raise ValueError(
                f"--original and --swapped need as many rows. Received: {len(sides[0])}, {len(sides[1])}."
            )
        files += [_file(s[name], side, len(side)) for name, side in zip(("original", "swapped"), sides, strict=True)]
        both = (sides[0][: s["max_swapped"]], sides[1][: s["max_swapped"]])
    pairs = {name: some for name, some in pairs.items() if some}
    same = {name: s[name] for name in ("max_length", "skip_first", "tokens_at_once", "resamples", "seed")}
    features = _features(s)
    asked = {
        **same,
        **_asked(s, "feature", "max_pairs", "limit", "max_swapped", "swapped_column"),
        "pairs": list(pairs),
    }
    return Prepared(
        asked, files,
        lambda model, tokenizer, report, _: fairness_suite(
            model, tokenizer, pairs, words, both, features=features, report=report, **same
        ),
    )  # fmt: skip


def _capability(s: dict[str, Any]) -> Prepared:
    from ..evaluation.capability_tasks import read_lambada, read_mmlu, require_lm_eval
    from ..evaluation.results import data_file
    from ..evaluation.suite_capability import capability_suite

    require_lm_eval()
    files: list[DataFile] = []
    passages: list[str] = []
    questions = None
    if s["lambada"] is not None:
        try:
            passages = read_lambada(s["lambada"])
        except ValueError as error:
            raise ValueError(f"--lambada must be JSON lines. Received: {str(s['lambada'])!r}: {error}") from error
        files.append(data_file(s["lambada"], rows=len(passages)))
    if s["mmlu"] is not None:
        subjects = None if s["subjects"] is None else [name.strip() for name in s["subjects"].split(",")]
        questions = read_mmlu(s["mmlu"], subjects)
        told = {name: [one.test, one.shots] for name, one in questions.items()}
        files.append(_file(s["mmlu"], told, sum(len(one.test) for one in questions.values())))
    same = {name: s[name] for name in ("shots", "limit", "batch_size", "resamples", "seed")}
    return Prepared(
        {**same, **_asked(s, "subjects")}, files,
        lambda model, tokenizer, report, journal: capability_suite(
            model, tokenizer, lambada=passages, mmlu=questions, report=report, journal=journal, **same
        ),
    )  # fmt: skip


def _speed(s: dict[str, Any]) -> Prepared:
    import torch

    from ..evaluation.suite_speed import speed_suite

    same = {"prompt_tokens": s["prompt_tokens"], "new_tokens": s["generated_tokens"], "repeats": s["repeats"]}
    same = {**same, "seed": s["seed"]}
    return Prepared(
        {**same, "threads": torch.get_num_threads()}, [],
        lambda model, tokenizer, report, _: speed_suite(model, tokenizer, report=report, **same),
    )  # fmt: skip


PREPARE: dict[str, Callable[[dict[str, Any]], Prepared]] = {
    "reconstruction": _reconstruction, "detection": _detection, "steering": _steering, "fairness": _fairness,
    "capability": _capability, "speed": _speed,
}  # fmt: skip
