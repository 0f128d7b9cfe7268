"""Bases and SAEs by name, as every verb takes them."""

from __future__ import annotations

from typing import Any


def load_sae(name: str, place: str | None, **options: Any) -> Any:
    """An SAE by name, put at a place given as one text."""
    from ..modeling import SparseAutoencoder
    from ..workflows.loading import parse_place

    options.update(parse_place(place))
    return SparseAutoencoder.from_pretrained(name, **options)


def load_base(
    name: str, revision: str | None, dtype: str, head: str = "AutoModelForCausalLM", **options: Any
) -> tuple[Any, Any, str]:
    """A base model on this process's device, its tokenizer (or processor, of images), and where it was found."""
    import transformers

    from ..create_training_data.base_model import find_base_model
    from ..workflows.loading import this_device

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = this_device()
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"`model_dtype` must be auto, float32, bfloat16 or float16. Received: model_dtype={dtype!r}.")
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    found = find_base_model(name).name
    try:
        reads_images = head == "AutoModelForImageTextToText"
        reader = transformers.AutoProcessor if reads_images else transformers.AutoTokenizer
        tokenizer = reader.from_pretrained(found, revision=revision)
        base: Any = getattr(transformers, head).from_pretrained(found, revision=revision, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise OSError(f"{found!r} could not be read as a model: {str(error).strip().splitlines()[0]}") from error
    return base.to(device).eval(), tokenizer, found
