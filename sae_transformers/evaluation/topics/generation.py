"""The same prompts continued under several ways to bring a topic in, side by side: quality and time."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from ...modeling import Steering
from ..generation.fluency import continuation_mask, continuation_perplexity
from ..journal import Journal, Watch
from .alignment import GenerationRow, generation_row, topic_similarity
from .settings import TopicGenerationSettings

UNSTEERED = "orig"


class MethodRow(GenerationRow):
    """seconds_per_token: of generation, all rows of a batch counted. extra_seconds_per_token: against unsteered.
    preparation_seconds: what it took before the first token, such as scores or a fine-tuning."""

    seconds_per_token: float
    extra_seconds_per_token: float
    preparation_seconds: float


class Generated(TypedDict):
    """ids: (rows, new) token ids. mask: (rows, new), those before the end. texts: their text."""

    ids: Tensor
    mask: Tensor
    texts: list[str]
    seconds: float


class TopicComparison:
    """Continues prompts and measures the continuations; the first call is without steering, what others compare with.

    Args:
        model: `SaeForCausalLM`; its base, unsteered, judges perplexity.
        tokenizer: of the base; prompts are padded on the left.
        prompts: non-empty texts.
        topic: (m, d), unit embeddings of the texts of the topic that similarity is measured to.
        embed: texts -> (n, d), unit embeddings.
        acceptability: texts -> (n,), NaN for those too short.
        settings: of which `seed` is that of each method's draws.
        journal: has the batches that were generated and what was judged, and gets the others. The prompts, the topic
            and what judges belong to what it is about.

    Raises:
        ValueError: an empty prompt, or prompts and new tokens beyond the context.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[str],
        topic: Tensor,
        embed: Callable[[Sequence[str]], Tensor],
        acceptability: Callable[[Sequence[str]], Tensor],
        settings: TopicGenerationSettings | None = None,
        journal: Journal | None = None,
    ) -> None:
        if not prompts or any(not prompt.strip() for prompt in prompts):
            raise ValueError(
                f"Expected prompts with a word each. Received: {len(prompts)} prompts, one or more empty."
            )
        self.model, self.tokenizer, self.prompts = model, tokenizer, list(prompts)
        self.topic, self.embed, self.acceptability = topic, embed, acceptability
        self.settings, self.watch = settings or TopicGenerationSettings(), Watch(journal=journal)
        self.eos = model.generation_config.eos_token_id
        self.rows: dict[str, MethodRow] = {}
        self.texts: dict[str, list[str]] = {}
        self._unsteered: Tensor | None = None
        self._check(self.prompts)

    def _check(self, prompts: Sequence[str]) -> None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(len(row) for row in self.tokenizer(list(prompts), verbose=False)["input_ids"])
        if limit and longest + self.settings.max_new_tokens > limit:
            raise ValueError(
                f"Prompts and new tokens must fit into the context of {limit}. Received: a prompt of {longest} "
                f"tokens and max_new_tokens={self.settings.max_new_tokens!r}."
            )

    def measure(
        self,
        name: str,
        steering: Any = False,
        *,
        prefix: str = "",
        generator: Any = None,
        preparation_seconds: float = 0.0,
    ) -> MethodRow:
        """Continue all prompts in one way, and put the row under its name.

        Args:
            name: `orig` first.
            steering: as `generate` takes it.
            prefix: stands before each prompt, for the generation alone.
            generator: generates in place of the model (a fine-tuned base); it gets no steering.
            preparation_seconds: for the row.
        """
        if (name == UNSTEERED) != (self._unsteered is None):
            raise ValueError(f"{UNSTEERED!r} must be measured first, and once. Received: name={name!r}.")
        return self.judge(name, self.generate(steering, prefix, generator), preparation_seconds)

    @torch.no_grad()
    def generate(self, steering: Any = False, prefix: str = "", generator: Any = None) -> Generated:
        """Continuations of all prompts, in their order; see `measure`."""
        prompts = [f"{prefix}{prompt}" for prompt in self.prompts]
        self._check(prompts)
        torch.manual_seed(self.settings.seed)
        options = {} if generator is not None else {"steering": steering}
        runner = self.model if generator is None else generator
        told = self._told(steering, generator)
        found, seconds = [], 0.0
        for batch in self._batches(prompts):
            new = self.watch.keep(
                {"continued": batch["input_ids"].tolist(), "draws of batch": len(found), **told},
                lambda batch=batch: self._continued(runner, batch, options),
            )
            self._draw_on(new)
            found.append(new["ids"])
            seconds += float(new["seconds"])
        return self.generated(torch.cat(found), seconds)

    def generated(self, ids: Tensor, seconds: float) -> Generated:
        """New tokens (rows, new) with their texts."""
        mask = continuation_mask(ids, self.eos)
        texts = [
            self.tokenizer.decode(row[kept], skip_special_tokens=True) for row, kept in zip(ids, mask, strict=True)
        ]
        return {"ids": ids, "mask": mask, "texts": texts, "seconds": seconds}

    def _told(self, steering: Any, generator: Any) -> dict[str, Any]:
        """What a continuation depends on beside its prompt, where it is kept."""
        if self.watch.journal is None:
            return {}
        plan = json.dumps(Steering.coerce(steering).to_dict() if steering else None)
        return {"steering": hashlib.sha256(plan.encode()).hexdigest(), "tuned": generator is not None}

    def _continued(self, runner: Any, batch: Any, options: dict[str, Any]) -> dict[str, Tensor]:
        """New tokens `ids` (rows, max_new_tokens), `seconds`, and where the random numbers go on."""
        length, begin = self.settings.max_new_tokens, time.perf_counter()
        rows = runner.generate(
            **batch,
            **options,
            **self.settings.sampling,
            max_new_tokens=length,
            min_new_tokens=1,
            pad_token_id=self._pad,
        )
        new = rows[:, batch["input_ids"].shape[1] :]
        ids = torch.nn.functional.pad(new, (0, length - new.shape[1]), value=self._end).cpu()
        seconds = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
        cuda = self.model.device.type == "cuda"
        on_device = torch.cuda.get_rng_state(self.model.device) if cuda else torch.empty(0, dtype=torch.uint8)
        return {"ids": ids, "seconds": seconds, "draws": torch.get_rng_state(), "draws on device": on_device}

    def _draw_on(self, made: Mapping[str, Tensor]) -> None:
        """Go on with the random numbers after a batch, whoever made it."""
        torch.set_rng_state(made["draws"])
        if len(made["draws on device"]):
            torch.cuda.set_rng_state(made["draws on device"], self.model.device)

    def judge(self, name: str, made: Generated, preparation_seconds: float = 0.0) -> MethodRow:
        """Measure continuations with the model without steering, and keep the row and the texts."""
        texts = made["texts"]
        found = self.watch.keep({"judged": made["ids"].tolist()}, lambda: self._judged(made))
        similarity, acceptability, perplexity = (found[part] for part in ("similarity", "acceptability", "perplexity"))
        if self._unsteered is None:
            self._unsteered = similarity
        measured = generation_row(texts, similarity, self._unsteered, acceptability, float(perplexity))
        per_token = made["seconds"] / int(made["mask"].sum())
        first = self.rows.get(UNSTEERED)
        extra = 0.0 if first is None else per_token - first["seconds_per_token"]
        row: MethodRow = {
            **measured,
            "seconds_per_token": per_token,
            "extra_seconds_per_token": extra,
            "preparation_seconds": preparation_seconds,
        }
        self.rows[name], self.texts[name] = row, texts
        return row

    def _judged(self, made: Generated) -> dict[str, Tensor]:
        texts = made["texts"]
        similarity = torch.full((len(texts),), math.nan, dtype=torch.float64)
        worded = [i for i, text in enumerate(texts) if text.strip()]
        if worded:
            similarity[worded] = topic_similarity(self.embed([texts[i] for i in worded]), self.topic)
        with self.model.steered(False):
            perplexity = torch.tensor(self._perplexity(made), dtype=torch.float64)
            acceptability = self.acceptability(texts)
        return {"similarity": similarity, "acceptability": acceptability, "perplexity": perplexity}

    def samples(self) -> list[dict[str, str]]:
        """A row a prompt: the prompt, and its continuation by each method."""
        return [
            {"prompt": prompt, **{name: texts[i] for name, texts in self.texts.items()}}
            for i, prompt in enumerate(self.prompts)
        ]

    @property
    def _end(self) -> int:
        if self.eos is None:
            return self._pad
        return self.eos if isinstance(self.eos, int) else self.eos[0]

    @property
    def _pad(self) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id

    def _batches(self, prompts: Sequence[str]) -> list[Any]:
        side, self.tokenizer.padding_side = self.tokenizer.padding_side, "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token_id = self.tokenizer.eos_token_id
        try:
            size = self.settings.batch_size
            rows = [prompts[i : i + size] for i in range(0, len(prompts), size)]
            found = [
                self.tokenizer(row, return_tensors="pt", padding=True, return_token_type_ids=False) for row in rows
            ]
        finally:
            self.tokenizer.padding_side = side
        return [batch.to(self.model.device) for batch in found]

    def _perplexity(self, made: Generated) -> float:
        """Of the continuations after the prompts alone, whatever stood before those."""
        total, count, start = 0.0, 0, 0
        for batch in self._batches(self.prompts):
            length, rows = batch["input_ids"].shape[1], len(batch["input_ids"])
            new, mask = (made[name][start : start + rows].to(self.model.device) for name in ("ids", "mask"))
            start += rows
            found = continuation_perplexity(
                self.model,
                torch.cat([batch["input_ids"], new], dim=1),
                torch.cat([batch["attention_mask"], mask.long()], dim=1),
                length,
            )
            total, count = total + math.log(found) * int(mask.sum()), count + int(mask.sum())
        return math.exp(total / count)
