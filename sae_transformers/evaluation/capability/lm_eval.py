"""A loaded model inside lm-evaluation-harness: lm-eval's own `HFLM`, with steering."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...modeling.steered_tokens import steering_rows_for
from .tasks import require_lm_eval


def harness_model(
    model: Any,
    tokenizer: Any,
    *,
    steering: Any = None,
    batch_size: int = 8,
    report: Callable[[int], object] | None = None,
    **options: Any,
) -> Any:
    """The object that `lm_eval.simple_evaluate(model=...)` takes, around a loaded model.

        results = lm_eval.simple_evaluate(harness_model(model, tokenizer, steering=steering), tasks=["hellaswag"])

    Steering of the prompt, of its last token or of what is generated means the same as in `generate`: lm-eval's
    context is the prompt, its continuation what is generated.

    Args:
        model: a causal language model in eval mode, with SAEs or without.
        tokenizer: of it; a copy is used, for lm-eval gives it a padding token.
        steering: a `Steering`; False for none; None for the default of the model.
        batch_size: rows of a forward pass.
        report: called with the number of rows of each pass; lm-eval's own progress bars are off then.
        options: further arguments of `HFLM`, such as `max_length` or `add_bos_token`.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: steering that the model cannot do, or of a model without SAEs.
    """
    require_lm_eval()
    plan = None
    if hasattr(model, "saes"):
        chosen = model.steering if steering is None else steering
        plan = model.prepare_steering(chosen) if chosen else None
    elif steering:
        raise ValueError(f"Steering needs a model with SAEs. Received: a {type(model).__name__}.")
    with _without_notices():
        return _harness_class()(
            model,
            tokenizer=copy.deepcopy(tokenizer),
            backend="causal",
            batch_size=batch_size,
            plan=plan,
            report=report,
            **options,
        )


def run_tasks(lm: Any, tasks: Sequence[str], include_path: str, *, limit: int | None = None) -> dict[str, Any]:
    """Let lm-eval run tasks whose files are in a folder; nothing else is looked up.

    Args:
        lm: of `harness_model`.
        tasks: names.
        include_path: the folder of their files.
        limit: use the first so many rows of each.

    Returns:
        lm-eval's results: `results` by task, and `samples` by task with the answer to every row.
    """
    require_lm_eval()
    import lm_eval
    from lm_eval.tasks import TaskManager, get_task_dict

    manager: Any = TaskManager(include_path=include_path, include_defaults=False)
    found = manager.load(list(tasks)) if hasattr(manager, "load") else get_task_dict(list(tasks), manager)
    made = lm_eval.evaluate(lm, found, limit=limit, bootstrap_iters=0, log_samples=True)
    if made is None:
        raise RuntimeError("lm-eval gave no results: they are on another process.")
    return dict(made)


@contextmanager
def _without_notices() -> Iterator[None]:
    """Without lm-eval's notices that the model was loaded before, which is what is wanted here."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@cache
def _harness_class() -> Any:
    """Made at first use, so that lm-eval is imported only then."""
    from lm_eval.models.huggingface import HFLM

    base: Any = HFLM  # its decorator hides its type

    class SteeredHFLM(base):
        """HFLM that gives its model the steering of a plan, or none; what has no SAEs it calls as it is."""

        def __init__(self, model: Any, *, plan: Any, report: Any, **options: Any) -> None:
            super().__init__(model, **options)
            self.plan, self.report = plan, report
            self.needs_context = plan is not None and plan.from_prompt is not None and bool(plan.from_prompt.any())
            self.contexts: dict[tuple[int, ...], int] = {}  # tokens of a row -> how many are context

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self.report is not None)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            self.contexts = {}
            for _, context, continuation in requests if self.needs_context else ():
                row = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
                length = len(row) + 1 - len(continuation)
                if self.contexts.setdefault(row, length) != length:
                    raise ValueError(_ambiguous(self.contexts[row], length))
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)

        def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
            with torch.no_grad():
                logits = self.model(inps, **self._steering_options(inps)).logits
            if self.report:
                self.report(len(inps))
            return logits

        def _model_generate(self, context: Any, max_length: int, stop: Any, **generation: Any) -> Any:
            if hasattr(self.model, "saes"):
                generation["steering"] = False if self.plan is None else self.plan
            return super()._model_generate(context, max_length, stop, **generation)

        def _steering_options(self, inps: Tensor) -> dict[str, Any]:
            if not hasattr(self.model, "saes"):
                return {}
            if self.plan is None:
                return {"steering": False}
            if not self.needs_context:
                return {"steering": self.plan}
            rows = steering_rows_for(inps, None, 0, None, count=self.plan.count)
            ends = [self._context_length(row) for row in inps.tolist()]
            rows[:, 2] = torch.tensor(ends, device=rows.device)
            return {"steering": self.plan, "steering_rows": rows}

        def _context_length(self, row: list[int]) -> int:
            """How many tokens of a row are context; the row is padded with zeros on the right."""
            shortest = next((i for i in range(len(row), 0, -1) if row[i - 1] != 0), 0)
            cuts = (tuple(row[:length]) for length in range(shortest, len(row) + 1))
            found = {self.contexts[cut] for cut in cuts if cut in self.contexts}
            if len(found) != 1:
                raise ValueError(_ambiguous(*sorted(found)))
            return found.pop()

    return SteeredHFLM


def _ambiguous(*lengths: int) -> str:
    return (
        "Two requests of the same tokens must have contexts of the same length where steering depends on the prompt. "
        f"Received: contexts of {list(lengths)} tokens; use another steering, such as one of all positions."
    )
