"""Constant vectors in the biases of a model, so that it is steered without this library."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from ....latents.output_files import locked_folder
from ....modeling import SaeForCausalLM, Steering
from ....modeling.hook_points import LAST_MAPS, find_hook_point
from ....modeling.output_files import LOCK

PROBE = (2, 16)  # texts and tokens
TOLERANCE = 1e-5  # of the largest logit; in half precision a few steps of its own
STEPS = 8


def bake(
    model: SaeForCausalLM,
    steering: Steering,
    vectors: Mapping[int, Tensor],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> float:
    """Write the base of a model with vectors in the biases of the MLPs' last maps, and compare it, read by
    transformers alone, with the steered model on random tokens.

    What an MLP returns is added to the residual stream, so its bias is what is added at `resid_post`.

    Args:
        model: an `SaeForCausalLM`, steered by `steering` where it is compared.
        vectors: index of the block, from 0 -> (d_model,).
        folder: new or empty.
        tokenizer: is written too.

    Returns:
        largest difference of the logits, relative to the largest logit.

    Raises:
        ValueError: a block has no bias at that place, the base is quantised, the two models differ, or the folder
            holds something else.
        OSError: the folder cannot be written.
    """
    baked = _with_biases(model.lm, vectors)
    with locked_folder(folder):
        if [file for file in folder.iterdir() if file.name != LOCK]:
            raise ValueError(f"Expected a new or empty folder. Received: {str(folder)!r}, which holds files.")
        with tempfile.TemporaryDirectory(dir=folder) as draft:
            baked.save_pretrained(draft)
            if tokenizer is not None:
                tokenizer.save_pretrained(draft)
            difference = _difference(model, steering, type(model.lm).from_pretrained(draft, dtype=model.lm.dtype))
            limit = max(TOLERANCE, STEPS * torch.finfo(model.lm.dtype).eps)
            if not difference <= limit:
                raise ValueError(
                    f"{type(model.lm).__name__} with these biases does not compute what the steered model does. "
                    f"Expected logits equal to {limit:.0e}. Received: a difference of {difference:.1e}. Use "
                    f"to='gguf', or the model with its SAEs."
                )
            for file in Path(draft).iterdir():
                shutil.move(file, folder / file.name)
    return difference


def _with_biases(base: PreTrainedModel, vectors: Mapping[int, Tensor]) -> Any:
    """A model that shares the base's weights but for the biases, which are its own."""
    if getattr(base.config, "quantization_config", None) is not None:
        raise ValueError("Expected a base that is not quantised. Received: one with a `quantization_config`.")
    config = copy.deepcopy(base.config)
    text_config = config.get_text_config()
    switched_on = getattr(text_config, "mlp_bias", None) is False
    if switched_on:  # Llama and its kin: a bias in each map of each MLP
        text_config.mlp_bias = True
    with torch.device("meta"):
        baked = type(base)(config)
    result = baked.load_state_dict(base.state_dict(), strict=False, assign=True)
    added = [key for key in result.missing_keys if switched_on and key.endswith(".bias")]
    if result.unexpected_keys or len(added) < len(result.missing_keys):
        odd = [*result.unexpected_keys, *(key for key in result.missing_keys if key not in added)]
        raise ValueError(f"Expected a {type(base).__name__} as transformers makes it. Received: one with {odd[0]!r}.")
    like = next(base.parameters())
    for key in added:
        parent, _, name = key.rpartition(".")
        shape = baked.get_parameter(key).shape
        setattr(baked.get_submodule(parent), name, nn.Parameter(like.new_zeros(shape), requires_grad=False))
    baked.tie_weights()
    if base.generation_config is not None:
        baked.generation_config = copy.deepcopy(base.generation_config)
    for layer, vector in vectors.items():
        owner = _last_map(baked, config, layer)
        bias = owner.bias.detach()
        total = (bias.double() + vector.to(bias.device, torch.float64)).to(bias.dtype)
        owner.bias = nn.Parameter(total, requires_grad=False)
    return baked


def _last_map(base: PreTrainedModel, config: PreTrainedConfig, layer: int) -> Any:
    """The module whose bias is added to what block `layer` returns."""
    point = find_hook_point(base, config, f"layers.{layer}.mlp_out")
    module: Any = point.module
    has_bias = isinstance(getattr(module, "bias", None), Tensor)
    if not has_bias and not hasattr(module, "experts"):
        inner = [name for name in LAST_MAPS["mlp_act"] if isinstance(getattr(module, name, None), nn.Module)]
        if len(inner) == 1:
            module = getattr(module, inner[0])
            has_bias = isinstance(getattr(module, "bias", None), Tensor)
    if not has_bias:
        raise ValueError(
            f"{type(base).__name__} has no bias where block {layer} adds its MLP to the residual stream "
            f"({point.path}), nor a setting `mlp_bias` that makes one. Use to='gguf', or the model with its SAEs. "
            f"Received: to='baked_bias', layer={layer}."
        )
    return module


@torch.no_grad()
def _difference(model: SaeForCausalLM, steering: Steering, plain: PreTrainedModel) -> float:
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, PROBE, generator=torch.Generator().manual_seed(0))
    was_training = model.training
    model.eval()
    try:
        device = model.lm.device
        wanted = model(ids.to(device), steering=steering).logits.float().cpu()
    finally:
        model.train(was_training)
    found = plain.eval()(ids).logits.float()
    largest = wanted.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((wanted - found).abs().max() / largest)
