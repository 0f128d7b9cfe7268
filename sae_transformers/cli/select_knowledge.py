"""What `select-knowledge` does: learn from a pool of questions, choose on others, measure on yet others."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from pathlib import Path
from typing import Any

from .select import BASELINES, INSTRUCTIONS, SIDES, last_states, loaded_model, save_steered

STYLE_OF = {"context": "sub_sub", "memory": "sub_org"}  # demonstrations that show the behaviour
FEW = 20  # prompts of a behaviour, under which `--grouping auto` asks which answer is likelier
VARIANTS = 4  # choices of demonstrations to learn from; they come from questions that are not asked
CAD_WEIGHT = {"context": 0.6, "memory": -0.8}  # SpARE, appendix C
COLUMNS = ("em_context", "em_memory", "neither", "em_context_to_memory", "em_memory_to_context", "prefers_memory")


def run(s: dict[str, Any], console: Any) -> None:
    """Run the verb with its settings."""
    from ..create_training_data.knowledge_conflict import read_conflicts, split_pool

    if s["scoring"] not in ("exact", "in_context"):
        raise ValueError(f"`scoring` must be exact or in_context. Received: scoring={s['scoring']!r}.")
    if s["grouping"] not in ("auto", "answers", "likelihood"):
        raise ValueError(f"`grouping` must be auto, answers or likelihood. Received: grouping={s['grouping']!r}.")
    if not 0 <= s["max_broken"] <= 1:
        raise ValueError(f"`max_broken` must be a share, 0 to 1. Received: max_broken={s['max_broken']!r}.")
    s["baselines"] = [name for name in s["baselines"].split(",") if name]
    if unknown := sorted(set(s["baselines"]) - set(BASELINES)):
        raise ValueError(f"`baselines` are {', '.join(BASELINES)}. Received: {unknown}.")
    if s["weighting"] not in ("mean", "loss"):
        raise ValueError(f"`weighting` must be mean or loss. Received: weighting={s['weighting']!r}.")
    grid = _numbers("proportion", s["proportion"]), _numbers("degree", s["degree"])
    seeds = [int(seed) for seed in s["seeds"].split(",")]
    found = read_conflicts(s["questions"])
    fitting = [one for one in found if max(len(one.org_context), len(one.sub_context)) <= s["max_context"]]
    console.print(f"{len(found):,} questions, {len(fitting):,} with contexts of at most {s['max_context']} characters")
    pool, rest = split_pool(fitting, n_groups=s["pool"], seed=s["split_seed"])
    pool = list({fitting[row].question: row for row in reversed(pool)}.values())[::-1]  # one row a question
    parts = _parts(fitting, rest, s)
    model, tokenizer, name = loaded_model(s)
    job = _Job(s, model, tokenizer, fitting, pool, console)
    start = time.perf_counter()
    job.fit()
    chosen, tried = job.choose(parts["dev"], *grid)
    steering = {side: job.steering(side, **chosen[side]) for side in SIDES}
    console.print(f"learnt and chosen in {time.perf_counter() - start:.0f} s")
    for side, setting in chosen.items():
        told = ", ".join(f"{name} {value}" for name, value in setting.items())
        console.print(f"to {side}: {told}; {len(steering[side].edits)} edits")
    facts = {"model": name, "sae": s["sae"], "test": len(parts["test"]), "max_context": s["max_context"]}
    rows: dict[str, list[dict[str, float]]] = {}
    for number, seed in enumerate(seeds, 1):
        for method, metrics in job.measure(parts["test"], seed, steering).items():
            rows.setdefault(method, []).append(metrics)
        results = {
            "methods": rows,
            "tried": tried,
            "chosen": chosen,
            "facts": {**job.facts, **facts, "seeds": seeds[:number]},
        }
        save_steered(
            s, model, tokenizer, job.features, steering, results
        )  # what is measured is not lost with a later seed
    _show(rows, len(parts["test"]), console)
    console.print(f"{s['out'] / 'results.json'}, steering in {Path(s['out'])}/towards-*.json", markup=False)


class _Job:
    """A model, its questions, and what was learnt from them.

    features: of each SAE its `FunctionalFeatures`. means: the mean last hidden state of both behaviours at each.
    """

    def __init__(self, s: dict[str, Any], model: Any, tokenizer: Any, questions: Any, pool: list[int], console: Any):
        from ..create_training_data.blocks import weights_digest
        from ..create_training_data.shards import Store

        self.s, self.model, self.tokenizer, self.questions = s, model, tokenizer, questions
        n_shown = VARIANTS * s["shots"]
        self.shown, self.asked, self.console = pool[:n_shown], pool[n_shown:], console
        self.facts: dict[str, Any] = {}
        self.features: list[Any] = []
        self.means: list[tuple[Any, Any]] = []
        self.done = Store(s["out"] / "work")
        self.identity = weights_digest(model) + ("" if s["activation"] == "own" else s["activation"])

    def prompts(self, rows: list[int], seed: int, style: str = "org_org", **options: Any) -> list[str]:
        """Prompts with the same demonstrations for all rows."""
        from ..create_training_data.knowledge_conflict import conflict_prompt, demonstrations

        shown = [self.questions[i] for i in demonstrations(self.questions, self.shown, self.s["shots"], seed=seed)]
        return [conflict_prompt(self.questions[row], shown, style, **options) for row in rows]

    def behaviours(self, rows: list[int], answers: list[str]) -> Any:
        from ..evaluation.knowledge_selection import answer_behaviours

        found = [self.questions[row] for row in rows]
        contexts = [one.sub_context for one in found] if self.s["scoring"] == "in_context" else None
        accepted = [one.sub_answer for one in found], [one.org_answer for one in found]
        return answer_behaviours(answers, *accepted, contexts)

    def answer(self, prompts: list[str], **options: Any) -> list[str]:
        from ..evaluation.short_answers import short_answers

        options["max_new_tokens"] = self.s["max_new_tokens"]
        return self._done_once("answers", short_answers, prompts, **options)

    def _done_once(self, what: str, action: Any, prompts: list[str], *rest: Any, **options: Any) -> list[Any]:
        """What a long action gives, from the folder if it was done before: a run that was stopped goes on."""
        steering = options.get("steering", False)
        told = {**options, "steering": steering and steering.to_json()}
        text = json.dumps([what, self.identity, prompts, rest, told], sort_keys=True)
        name = f"{what}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
        found = self.done.read_json(name)
        if found is None:
            found = action(
                self.model,
                self.tokenizer,
                prompts,
                *rest,
                tokens_at_once=self.s["tokens_at_once"],
                progress=True,
                **options,
            )
            self.done.write_json(name, {what: found if isinstance(found, list) else found.tolist()})
            found = self.done.read_json(name)
        return found[what]

    def fit(self) -> None:
        """Group the pool's prompts by what the model answers, and learn from both groups' last hidden states."""
        from ..create_training_data.knowledge_conflict import STYLES
        from ..latents.sparse_codes import encode_texts
        from ..training.functional_features import functional_features

        prompts, rows, answers = [], [], []
        for style, variant in itertools.product(STYLES, range(VARIANTS)):
            part = self.asked[variant::VARIANTS]
            asked = self.prompts(part, self.s["split_seed"] + variant, style)
            rows += part
            prompts += asked
            answers += self.answer(asked)
        groups = self._groups(rows, prompts, answers)
        texts = [[prompts[i] for i in group] for group in groups]
        weights = [self._weights(group, prompts, rows, side) for side, group in enumerate(groups)]
        hidden = [last_states(self.s, self.model, self.tokenizer, group) for group in texts]
        for number, sae in enumerate(self.model.saes):
            codes = [encode_texts(sae, states[number]) for states in hidden]
            given = {"weights_a": weights[0], "weights_b": weights[1], "dead": self.s["legacy"]}
            self.features.append(functional_features(*codes, **given, progress=True))
            self.means.append((hidden[0][number].mean(0), hidden[1][number].mean(0)))

    def _groups(self, rows: list[int], prompts: list[str], answers: list[str]) -> list[list[int]]:
        """Numbers of the prompts of each behaviour: by what was answered, or by which answer is likelier."""
        told = self.behaviours(rows, answers)
        pairs = list(zip(told.context, told.memory, strict=True))  # an answer that is both tells nothing
        groups = [[i for i, pair in enumerate(pairs) if pair == side] for side in ((True, False), (False, True))]
        counts = " and ".join(f"{len(group):,} from {side}" for side, group in zip(SIDES, groups, strict=True))
        self.console.print(f"of {len(prompts):,} prompts the model answers {counts}")
        self.facts["answered"] = dict(zip(SIDES, map(len, groups), strict=True))
        few = min(map(len, groups)) < FEW
        if self.s["grouping"] == "likelihood" or (self.s["grouping"] == "auto" and few):
            memory = self.prefers_memory(rows, prompts)
            groups = [[i for i, yes in enumerate(memory) if yes == side] for side in (False, True)]
            counts = " and ".join(f"{len(group):,} from {side}" for side, group in zip(SIDES, groups, strict=True))
            self.console.print(f"grouped by the answer that is likelier instead: {counts}")
        self.facts["learnt from"] = dict(zip(SIDES, map(len, groups), strict=True))
        if min(map(len, groups)) < 2:
            raise ValueError(
                f"Each behaviour needs two prompts or more to learn from. Received: {self.facts['learnt from']}. "
                f"Use a larger --pool, more --shots, --grouping likelihood or a model that knows more."
            )
        return groups

    def prefers_memory(self, rows: list[int], prompts: list[str], **options: Any) -> list[bool]:
        """Whether a remembered answer is likelier than the context's, of each its first, per token."""
        from ..evaluation.short_answers import answer_log_likelihoods

        pairs = [[self.questions[row].org_answer[0], self.questions[row].sub_answer[0]] for row in rows]
        likely = self._done_once("likelihoods", answer_log_likelihoods, prompts, pairs, **options)
        return [memory > context for memory, context in likely]

    def _weights(self, group: list[int], prompts: list[str], rows: list[int], side: int) -> Any:
        from ..evaluation.short_answers import text_losses
        from ..training.functional_features import loss_weights

        if self.s["weighting"] == "mean":
            return None
        losses = []
        for which in (("sub", "org"), ("org", "sub"))[side]:
            texts = [f"{prompts[i]} {self.questions[rows[i]].answers(which)[0]}\n\n" for i in group]
            losses.append(text_losses(self.model, self.tokenizer, texts, tokens_at_once=self.s["tokens_at_once"]))
        return loss_weights(*losses)

    def steering(self, side: str, *, proportion: float, degree: float, saes: tuple[int, ...]) -> Any:
        from ..training.functional_features import functional_steering, select_features

        given = {"proportion": proportion, "legacy": self.s["legacy"]}
        layers = [(n, self.features[n], *select_features(self.features[n], **given)) for n in saes]
        return functional_steering(layers, towards=SIDES.index(side), degree=degree)

    def choose(
        self, rows: list[int], proportions: list[float], degrees: list[float]
    ) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
        """Towards each side the setting that `best_setting` takes, and all that were tried."""
        from ..evaluation.knowledge_selection import knowledge_metrics

        known = {str(n): n for n in range(len(self.model.saes))}
        named = [one.split("+") for one in self.s["layers"].split(",") if one] or [list(known)]
        if unknown := {n for one in named for n in one} - set(known):
            raise ValueError(f"`layers` holds numbers of {len(known)} SAEs. Received: {sorted(unknown)}.")
        sets = [tuple(known[n] for n in one) for one in named]
        settings = [
            {"proportion": k, "degree": alpha, "saes": saes}
            for saes, alpha, k in itertools.product(sets, degrees, proportions)
        ]
        if len(settings) == 1:
            return dict.fromkeys(SIDES, settings[0]), []
        prompts = self.prompts(rows, self.s["split_seed"])
        plain = self.behaviours(rows, self.answer(prompts))
        most = knowledge_metrics(plain)["neither"] + self.s["max_broken"]
        tried: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for side, setting in itertools.product(SIDES, settings):
            steering = self.steering(side, **setting)
            metrics = knowledge_metrics(self.behaviours(rows, self.answer(prompts, steering=steering)), plain)
            metrics["prefers_memory"] = _share(self.prefers_memory(rows, prompts, steering=steering))
            tried[side].append(metrics)
        best = {side: best_setting(tried[side], side, most) for side in SIDES}
        for side in SIDES:
            if tried[side][best[side]]["neither"] > most:
                self.console.print(
                    f"to {side}: every setting leaves more dev questions without either answer than --max-broken "
                    f"{self.s['max_broken']} allows; the one that leaves the fewest is taken"
                )
        told = [{"towards": side, **a, **b} for side in SIDES for a, b in zip(settings, tried[side], strict=True)]
        return {side: settings[best[side]] for side in SIDES}, told

    def measure(self, rows: list[int], seed: int, steering: dict[str, Any]) -> dict[str, dict[str, float]]:
        """Metrics by method, with one choice of demonstrations."""
        from ..create_training_data.blocks import weights_digest
        from ..evaluation.knowledge_selection import knowledge_metrics

        prompts = self.prompts(rows, seed)
        plain = self.behaviours(rows, self.answer(prompts))
        found: dict[str, dict[str, float]] = {}

        def add(method: str, prompts: list[str], **options: Any) -> None:
            told = self.behaviours(rows, self.answer(prompts, **options))
            found[method] = {**knowledge_metrics(told, plain), "prefers_memory": float("nan")}

        for method, one in {"none": False, **{f"SpARE, to {side}": steering[side] for side in SIDES}}.items():
            add(method, prompts, steering=one)
            found[method]["prefers_memory"] = _share(self.prefers_memory(rows, prompts, steering=one))
        for side in SIDES:
            if "demonstrations" in self.s["baselines"]:
                add(f"demonstrations, to {side}", self.prompts(rows, seed, STYLE_OF[side]))
            if "instruction" in self.s["baselines"]:
                add(f"instruction, to {side}", self.prompts(rows, seed, instruction=INSTRUCTIONS[side]))
            if "cad" in self.s["baselines"]:
                closed = self.prompts(rows, seed, context=None)
                add(f"CAD, to {side}", prompts, contrast=closed, contrast_weight=CAD_WEIGHT[side])
        if "vectors" in self.s["baselines"]:
            bare = self.model, self.identity
            self.model, steered = self._vectors()
            self.identity = weights_digest(self.model)
            for name, one in steered.items():
                add(name, prompts, steering=one)
            self.model.unwrap()
            self.model, self.identity = bare
        return found

    def _vectors(self) -> tuple[Any, dict[str, Any]]:
        """A model with activation addition and task vectors at the first SAE's place, and the steering of each."""
        from ..modeling import FeatureEdit, SaeForCausalLM, Steering
        from ..training.state_vectors import constant_sae, direction_sae

        place, (context, memory) = self.model.saes[0].config, self.means[0]
        apart = context - memory
        saes = [direction_sae(apart[None], place), constant_sae(context, place), constant_sae(memory, place)]
        steering = {}
        for number, (side, sign) in enumerate(zip(SIDES, (1.0, -1.0), strict=True), 1):
            edits = [FeatureEdit(0, 0, "direction", sign * float(apart.norm()))]
            steering[f"activation addition, to {side}"] = Steering(edits, positions="last_prompt")
            steering[f"task vector, to {side}"] = Steering(reconstruct=(number,), positions="last_prompt")
        return SaeForCausalLM.from_base(self.model.lm, saes=saes), steering


def best_setting(tried: list[dict[str, float]], side: str, most: float) -> int:
    """Which of the settings, weakest first, steers best to a side.

    Of those that leave at most a share `most` of the questions without either answer, the one with the most answers of
    that side; of equal ones the one that makes them the likelier, and then the first. If all leave more, the one that
    leaves the fewest: to break answers is not to choose between them.
    """
    allowed = [n for n, metrics in enumerate(tried) if metrics["neither"] <= most]
    if not allowed:
        return min(range(len(tried)), key=lambda n: tried[n]["neither"])

    def reached(n: int) -> tuple[float, float]:
        memory = tried[n]["prefers_memory"]
        return tried[n][f"em_{side}"], memory if side == "memory" else 1 - memory

    return max(allowed, key=reached)


def _parts(questions: Any, rest: list[int], s: dict[str, Any]) -> dict[str, list[int]]:
    """Rows of dev and test, one of each question, none of the pool's."""
    import numpy as np

    from ..create_training_data.knowledge_conflict import question_groups

    outside = set(rest)
    firsts = [rows[0] for rows in question_groups(questions) if rows[0] in outside]
    order = np.random.RandomState(s["split_seed"]).permutation(len(firsts))
    if len(firsts) < s["dev"] + s["test"] or s["test"] < 1:
        raise ValueError(
            f"Outside the pool there are {len(firsts)} questions. Received: dev={s['dev']!r}, test={s['test']!r}."
        )
    chosen = [firsts[i] for i in order]
    return {"dev": chosen[: s["dev"]], "test": chosen[s["dev"] : s["dev"] + s["test"]]}


def _share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"`{name}` must be numbers, separated by commas. Received: {name}={text!r}.") from None


def _show(rows: dict[str, list[dict[str, float]]], n: int, console: Any) -> None:
    from rich.table import Table

    from ..evaluation.classification import summary

    seeds = len(next(iter(rows.values())))
    table = Table("", *COLUMNS, title=f"{n} questions, {seeds} choices of demonstrations: mean ± 95 % interval")
    for method, found in rows.items():
        told = summary(found)
        cells = []
        for name in COLUMNS:
            one = told[name]
            half = f" ± {one.high - one.mean:.3f}" if seeds > 1 else ""
            cells.append(f"{one.mean:.3f}{half}")
        table.add_row(method, *cells)
    console.print(table)
