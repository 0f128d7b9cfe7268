"""What a base does without us: the identities that hold for it, measured. One that fails cannot be asked of us."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.architectures.tiny_inputs import tiny_inputs

TOLERANCE = 1e-4
NEW_TOKENS = 4


@dataclasses.dataclass
class BaseFacts:
    """Each field is "" where the identity holds, else what was seen instead.

    Args:
        finite: logits of a forward pass have no infinity and no NaN.
        repeatable: two forward passes give the same logits, bit by bit.
        causal: words that follow do not change the logits of those before, to 1e-4.
        generates: `generate` adds four greedy tokens to the text.
        cached: `generate` with and without the cache: same tokens, logits to 1e-4.
        padded: `generate` of a shorter text, padded on the left beside a longer one, as alone: logits to 1e-4.
        batched: a row's logits in a batch of texts of one length, as alone, to 1e-4.
        reloaded: saved and loaded again, the logits are the same, bit by bit.
    """

    finite: str = ""
    repeatable: str = ""
    causal: str = ""
    generates: str = ""
    cached: str = ""
    padded: str = ""
    batched: str = ""
    reloaded: str = ""

    def failing(self) -> dict[str, str]:
        """The identities that do not hold, and what was seen."""
        return {name: seen for name, seen in dataclasses.asdict(self).items() if seen}


def base_facts(base: Any, with_image: bool | None = None) -> BaseFacts:
    """Measure every identity on `base`; an exception counts as one that does not hold."""
    checks = {
        "finite": _finite,
        "repeatable": _repeatable,
        "causal": _causal,
        "generates": _generates,
        "cached": _cached,
        "padded": _padded,
        "batched": _batched,
        "reloaded": _reloaded,
    }
    return BaseFacts(**{name: _seen(check, base, with_image) for name, check in checks.items()})


def _seen(check: Callable[[Any, bool | None], str], base: Any, with_image: bool | None) -> str:
    try:
        with torch.no_grad():
            return check(base, with_image)
    except Exception as failure:  # any: what a base raises is what is measured
        return f"{type(failure).__name__}: {str(failure)[:200]}"


def _logits(base: Any, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)  # Reformer hashes at random
    return base(**inputs).logits


def _greedy(base: Any, inputs: dict[str, Tensor], **settings: Any) -> tuple[Tensor, Tensor]:
    """New tokens, (rows, 4), and the logits that chose them, (rows, 4, vocabulary)."""
    torch.manual_seed(0)
    found = base.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        suppress_tokens=_not_words(base),
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    return found.sequences[:, -NEW_TOKENS:], torch.stack(found.logits, dim=1)


def _not_words(base: Any) -> list[int] | None:
    """Ids that may not be chosen: a placeholder in the answer would ask for one more image."""
    size = base.get_input_embeddings().num_embeddings
    return list(range(90, size)) if base.config.sub_configs else None


def _compare(first: Tensor, second: Tensor, tolerance: float = TOLERANCE) -> str:
    if first.shape != second.shape:
        return f"shapes {tuple(first.shape)} and {tuple(second.shape)}"
    finite = torch.isfinite(first)  # a token that may not be chosen has minus infinity in both
    if not torch.equal(finite, torch.isfinite(second)):
        return "infinite in different places"
    difference = (first - second)[finite].abs().max().item()
    return "" if difference <= tolerance else f"differ by {difference:.2g} of {first[finite].abs().max().item():.2g}"


def _finite(base: Any, with_image: bool | None) -> str:
    return "" if torch.isfinite(_logits(base, tiny_inputs(base, with_image=with_image))).all() else "not finite"


def _repeatable(base: Any, with_image: bool | None) -> str:
    inputs = tiny_inputs(base, with_image=with_image)
    return _compare(_logits(base, inputs), _logits(base, inputs), tolerance=0.0)


def _causal(base: Any, with_image: bool | None) -> str:
    inputs = tiny_inputs(base, with_image=with_image)
    before = _logits(base, inputs)
    ids = inputs["input_ids"].clone()
    ids[:, -2:] = (ids[:, -2:] + 11) % 80 + 3
    after = _logits(base, {**inputs, "input_ids": ids})
    if torch.equal(before[:, -1], after[:, -1]):
        return "the last words do not matter"
    return _compare(before[:, :-2], after[:, :-2])


def _generates(base: Any, with_image: bool | None) -> str:
    inputs = tiny_inputs(base, with_image=with_image)
    torch.manual_seed(0)
    tokens = base.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    length = inputs["input_ids"].shape[1]
    if tokens.shape[1] != length + NEW_TOKENS or not torch.equal(tokens[:, :length], inputs["input_ids"]):
        return f"{tuple(tokens.shape)} after {length} words: not the text and four tokens"
    return ""


def _cached(base: Any, with_image: bool | None) -> str:
    inputs = tiny_inputs(base, with_image=with_image)
    tokens, logits = _greedy(base, inputs)
    tokens_without, logits_without = _greedy(base, inputs, use_cache=False)
    seen = _compare(logits, logits_without)
    if seen and not torch.equal(tokens, tokens_without):
        seen += ", other tokens"
    return seen


def _padded(base: Any, with_image: bool | None) -> str:
    inputs = tiny_inputs(base, rows=2, with_image=with_image)
    if set(inputs) - {"input_ids", "attention_mask"}:
        return ""  # asked of texts only
    ids = inputs["input_ids"].clone()
    pad = 4
    mask = torch.ones_like(ids)
    ids[1, :pad], mask[1, :pad] = 0, 0
    _, both = _greedy(base, {"input_ids": ids, "attention_mask": mask})
    _, alone = _greedy(base, {"input_ids": ids[1:, pad:], "attention_mask": mask[1:, pad:]})
    return _compare(both[1:], alone)


def _batched(base: Any, with_image: bool | None) -> str:
    inputs = tiny_inputs(base, rows=2, with_image=with_image)
    if set(inputs) - {"input_ids", "attention_mask"}:
        return ""  # asked of texts only
    both = _logits(base, inputs)
    alone = _logits(base, {name: value[1:] for name, value in inputs.items()})
    return _compare(both[1:], alone)


def _reloaded(base: Any, with_image: bool | None) -> str:
    inputs = tiny_inputs(base, with_image=with_image)
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        again = type(base).from_pretrained(folder, dtype=base.dtype).eval()
    return _compare(_logits(base, inputs), _logits(again, inputs), tolerance=0.0)


__all__ = ["BaseFacts", "base_facts"]
