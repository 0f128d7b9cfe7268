"""A model's answers to questions with two contexts, each prompt asked once: finished work is kept in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from ....create_training_data.harvest.blocks import weights_digest
from ....create_training_data.harvest.store import Store
from ....create_training_data.knowledge_conflict import ConflictQuestion, conflict_prompt, demonstrations
from ....evaluation.generation.layer_contrast import LayerContrast
from ....evaluation.generation.short_answers import answer_log_likelihoods, short_answers
from ....evaluation.knowledge import Behaviours, answer_behaviours
from ....modeling import SaeForCausalLM, Steering
from ...results import Count
from ...settings.select_knowledge import SelectKnowledgeSettings

MaybeSteering = Steering | Literal[False]


@dataclass(frozen=True)
class AskedModel:
    """A model, the questions it is asked, and what it answered.

    Args:
        model: with the SAEs that are read and steered.
        identity: tells its answers from those of other models, in the names of files.
        questions: all of them; others name them by their row here.
        shown: rows to take demonstrations from.
        work: folder of finished work, from which a run that was stopped goes on; None keeps nothing.
        count: of the prompts that are done.
    """

    model: SaeForCausalLM
    tokenizer: PreTrainedTokenizerBase
    identity: str
    questions: Sequence[ConflictQuestion]
    shown: Sequence[int]
    settings: SelectKnowledgeSettings
    work: Store | None
    count: Count

    def with_model(self, model: SaeForCausalLM) -> AskedModel:
        """The same questions for another model."""
        return replace(self, model=model, identity=weights_digest(model))

    def demonstrations(self, seed: int) -> list[int]:
        """Rows of the demonstrations that this seed chooses, in order."""
        return demonstrations(self.questions, self.shown, self.settings.questions.shots, seed=seed)

    def prompts(
        self, rows: Sequence[int], seed: int, style: str = "org_org", *, closed: bool = False, instruction: str = ""
    ) -> list[str]:
        """Prompts of the questions, all with the same demonstrations; `closed` shows no context anywhere."""
        shown = [self.questions[i] for i in self.demonstrations(seed)]
        context = None if closed else "sub"
        return [
            conflict_prompt(self.questions[row], shown, style, context=context, instruction=instruction)
            for row in rows
        ]

    def behaviours(self, rows: Sequence[int], answers: Sequence[str]) -> Behaviours:
        """Whether each answer is the context's, and whether it is the remembered one."""
        asked = [self.questions[row] for row in rows]
        contexts = [one.sub_context for one in asked] if self.settings.scoring == "in_context" else None
        return answer_behaviours(
            answers, [one.sub_answer for one in asked], [one.org_answer for one in asked], contexts
        )

    def answers(self, prompts: list[str], **options: Any) -> list[str]:
        """Short answers; options are those of `short_answers`."""
        options["max_new_tokens"] = self.settings.max_new_tokens
        return self._kept("answers", short_answers, prompts, **options)

    def prefers_memory(self, rows: Sequence[int], prompts: list[str], steering: MaybeSteering = False) -> list[bool]:
        """Whether a remembered answer is likelier than the context's, per token, the first of each."""
        pairs = [[self.questions[row].org_answer[0], self.questions[row].sub_answer[0]] for row in rows]
        likely = self._kept("likelihoods", answer_log_likelihoods, prompts, pairs, steering=steering)
        return [memory > context for memory, context in likely]

    def _kept(
        self, what: str, action: Callable[..., Any], prompts: list[str], *rest: Any, **options: Any
    ) -> list[Any]:
        """What a long action gives, from the folder if it was done before."""
        start, name = self.count.done, work_name(what, self.identity, prompts, rest, options)
        content = None if self.work is None else self.work.read_json(name)
        if content is None:
            values = action(
                self.model,
                self.tokenizer,
                prompts,
                *rest,
                tokens_at_once=self.settings.tokens_per_batch,
                progress=lambda done, _: self.count.reached(start + done),
                **options,
            )
            content = {what: values if isinstance(values, list) else values.tolist()}
            if self.work is not None:
                self.work.write_json(name, content)
                content = self.work.read_json(name)
        self.count.reached(start + len(prompts))
        return content[what]


def work_name(
    what: str, identity: str, prompts: Sequence[str], rest: Sequence[Any], options: Mapping[str, Any]
) -> str:
    """The name of a file of finished work. Runs that were begun by other versions go on by it: it does not change."""
    steering = options.get("steering", False)
    described = {**options, "steering": steering and steering.to_json()}
    contrast = described.pop("contrast", None)
    if isinstance(contrast, LayerContrast):
        described["layer_contrast"] = contrast._asdict()
    elif contrast is not None:
        described |= {"contrast": contrast.prompts, "contrast_weight": contrast.weight}
    text = json.dumps([what, identity, prompts, rest, described], sort_keys=True)
    return f"{what}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def share(flags: Sequence[bool]) -> float:
    """The share that is true."""
    return sum(flags) / len(flags)
