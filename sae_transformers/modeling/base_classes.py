"""Which class a base is: a config alone does not say where a family has a language model and a multimodal one; and
how a base without a head is held."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import transformers
from torch import nn
from transformers import PreTrainedModel

Base = TypeVar("Base", bound=nn.Module)
UNKNOWN = "Unrecognized configuration class"


def by_architecture(auto_classes: Sequence[Any], config: Any) -> list[Any]:
    """The Auto classes, those first that make what the config was saved from (`architectures`)."""
    saved_from = getattr(config, "architectures", None) or ()

    def fits(auto: Any) -> bool:
        try:
            made = auto._model_mapping.get(type(config), None)
        except (AttributeError, KeyError, ValueError):
            return False
        return any(cls.__name__ in saved_from for cls in (made if isinstance(made, tuple) else (made,)) if cls)

    return sorted(auto_classes, key=lambda auto: not fits(auto))


def load_base(
    auto_classes: Sequence[Any],
    name: str,
    options: dict[str, Any],
    config: Any = None,
    untrained: set[str] | None = None,
) -> Any:
    """A base from a folder or the Hub, by the first Auto class that knows it.

    Args:
        config: of the base, where it is known before.
        untrained: gets the names of parameters that the checkpoint lacks, where the head that is loaded here may be
            replaced; transformers' report on them is then left out where they are of the head alone.
    """
    classes = by_architecture(auto_classes, config)
    if untrained is None:
        return keep_soft_cap(_first(classes, "from_pretrained", name, options), options)
    with _held_reports() as reports:
        base, info = _first(classes, "from_pretrained", name, {**options, "output_loading_info": True})
        inside = f"{base.base_model_prefix}."
        wrong = [key for kind in ("missing_keys", "unexpected_keys") for key in info[kind] if key.startswith(inside)]
        if not wrong and not info["mismatched_keys"]:
            reports.clear()
    untrained |= {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    return keep_soft_cap(base, options)


def keep_soft_cap(base: Base, options: Mapping[str, Any]) -> Base:
    """The base with an attention that caps its scores softly, where its config says so (Gemma 2) and nobody asked for
    one: `sdpa`, which transformers up to 5.19 takes by itself, leaves the cap out.

    Args:
        options: that it was loaded with.
    """
    model: Any = next(module for module in base.modules() if isinstance(module, PreTrainedModel))
    config = model.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if capped and options.get("attn_implementation") is None and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
    return base


@contextlib.contextmanager
def _held_reports() -> Iterator[list[logging.LogRecord]]:
    """Hold back what transformers reports on a checkpoint's weights; what is left of it is told at the end."""
    logger, held = logging.getLogger("transformers.modeling_utils"), []

    def hold(record: logging.LogRecord) -> bool:
        is_report = "LOAD REPORT" in record.getMessage()
        if is_report:
            held.append(record)
        return not is_report

    logger.addFilter(hold)
    try:
        yield held
    finally:
        logger.removeFilter(hold)
        for record in held:
            logger.handle(record)


def base_from_config(auto_classes: Sequence[Any], config: Any, options: dict[str, Any]) -> Any:
    """A new base of a config, by the first Auto class that knows it, or by the class of transformers it names."""
    try:
        return _first(by_architecture(auto_classes, config), "from_config", config, options)
    except ValueError as error:
        named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0] or " ", None)
        if UNKNOWN not in str(error) or not (isinstance(named, type) and issubclass(named, PreTrainedModel)):
            raise
        return named._from_config(config, **options)


def _first(auto_classes: Sequence[Any], method: str, what: Any, options: dict[str, Any]) -> Any:
    unknown = None
    for auto in auto_classes:
        try:
            return getattr(auto, method)(what, **options)
        except ValueError as error:
            if UNKNOWN not in str(error):
                raise
            unknown = unknown or error
    raise unknown or ValueError("No Auto class was given. Received: auto_classes=().")


class BodyContainer(nn.Module):
    """A base without a head, under the name it has inside its own heads: all heads share their weights' names."""

    def __init__(self, body: PreTrainedModel) -> None:
        super().__init__()
        self.body_name = body.base_model_prefix
        self.base_model_prefix = body.base_model_prefix
        self.add_module(self.body_name, body)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.body_name)(*args, **kwargs)
