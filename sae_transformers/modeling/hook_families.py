"""Decoder families whose blocks differ from `h + attention(norm(h))`, then `h + mlp(norm(h))`: read in their code.

Keys are names of block classes, those of parents too, or `model_type.ClassName` where the name alone says little. A
block that stands nowhere here is taken by the general rules of `hook_points`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

STREAM_SITES = ("resid_pre", "resid_post", "mlp_out", "attn_out")
ADDED = ("mlp_out", "attn_out")

# Where a module is not found by the general rules: site -> path inside the block.
MODULES: dict[str, dict[str, str]] = {
    "ChameleonSwinDecoderLayer": {"mlp_out": "post_attention_layernorm", "attn_out": "input_layernorm"},
    "DbrxBlock": {"attn_out": "norm_attn_norm.attn"},
    "HyperCLOVAXDecoderLayer": {"mlp_out": "post_norm2", "attn_out": "post_norm1"},
    "Inkling2FullDecoderLayer": {"mlp_out": "post_mlp_convolution", "attn_out": "post_attention_convolution"},
    "Inkling2SlidingDecoderLayer": {"mlp_out": "post_mlp_convolution", "attn_out": "post_attention_convolution"},
    "InklingDecoderLayer": {"mlp_out": "mlp_sconv", "attn_out": "attn_sconv"},
    "Lfm3DecoderLayer": {"mlp_out": "post_ffn_norm", "attn_out": "post_operator_norm"},
    "RecurrentGemmaDecoderLayer": {"mlp_out": "mlp_block", "mlp_in": "mlp_block"},
    "ctrl.EncoderLayer": {"attn_out": "multi_head_attention"},
}
for _loop in ("Sliding", "Full", "SlidingLoop", "FullLoop"):
    MODULES[f"Inkling2Loop{_loop}DecoderLayer"] = MODULES["Inkling2FullDecoderLayer"]

# Blocks whose input and output have four dimensions: also refused as `hook`, since no SAE can read them.
STREAMS: dict[str, str] = {
    "DeepseekV4DecoderLayer": "(batch, seq, streams, width)",
    "Gemma3nTextDecoderLayer": "(streams, batch, seq, width)",
    "Glm5NextTextDecoderLayer": "(batch, seq, streams, width)",
    "HYV4DecoderLayer": "(batch, seq, streams, width)",
    "HYV4VLDecoderLayer": "(batch, seq, streams, width)",
}


class Refusal(NamedTuple):
    """Sites that a block does not have, why, and for which blocks of the class (all of them by default)."""

    blocks: tuple[str, ...]
    sites: tuple[str, ...]
    reason: str
    applies: Callable[[nn.Module], bool] = lambda block: True


POST_NORM = "normalises the sum of the residual stream and this tensor"
REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        ("BartDecoderLayer", "BlenderbotSmallDecoderLayer", "LEDDecoderLayer", "MarianDecoderLayer", "MvpDecoderLayer",
         "PLBartDecoderLayer", "TrOCRDecoderLayer", "openai-gpt.Block"), ADDED, POST_NORM,
    ),
    Refusal(("OPTDecoderLayer",), ADDED, POST_NORM, lambda block: not getattr(block, "do_layer_norm_before", True)),
    Refusal(
        ("BeamDecoderLayer",), ADDED, "scales the residual stream and this tensor by the depth when it adds them"
    ),
    Refusal(
        ("BltTransformerLayer",), (*STREAM_SITES, *ADDED, "mlp_in", "mlp_act", "attn_heads"),
        "runs over patches of bytes, and not over the tokens of the text",
    ),
    Refusal(
        ("CpmAntTransformerBlock",), (*STREAM_SITES, "mlp_in", "mlp_act", "attn_heads"),
        "sees its prompt's embeddings before the text, and tokens would be mistaken",
    ),
    Refusal(
        ("DoryDecoderLayer",), ADDED, "moves the residual stream part of the way to this tensor, and does not add it"
    ),
    Refusal(
        ("EvollaDecoderLayer",), ("mlp_out",), "lets an adapter change the residual stream after its MLP",
        lambda block: hasattr(block, "adapter"),
    ),
    Refusal(("FalconH1DecoderLayer",), ("attn_out",), "adds the scaled outputs of a Mamba branch and of attention"),
    Refusal(
        ("GPTNeoXJapaneseLayer",), ("attn_out",), "adds a bias to what its attention returns",
        lambda block: bool(getattr(getattr(block, "attention", None), "use_bias", False)),
    ),
    Refusal(
        ("GraniteMoeHybridDecoderLayer", "GraniteMoeSharedDecoderLayer", "GraniteMoeSWADecoderLayer"), ("mlp_out",),
        "adds the sum of its experts and of a shared MLP",
        lambda block: getattr(block, "shared_mlp", None) is not None,
    ),
    Refusal(
        ("Inkling2FullDecoderLayer", "Inkling2SlidingDecoderLayer", "Inkling2LoopFullDecoderLayer",
         "Inkling2LoopSlidingDecoderLayer", "Inkling2LoopFullLoopDecoderLayer", "Inkling2LoopSlidingLoopDecoderLayer"),
        ("resid_pre",), "starts a new residual stream, and later blocks read the old one from before this place",
        lambda block: bool(getattr(block, "is_block_boundary", False)),
    ),
    Refusal(
        ("Lfm3DecoderLayer",), ("attn_out",), "has a convolution in place of attention",
        lambda block: not getattr(block, "is_attention_layer", True),
    ),
    Refusal(
        ("LongcatFlashDecoderLayer",), (*ADDED, "mlp_in", "mlp_act", "attn_heads"), "has two attentions and three MLPs"
    ),
    Refusal(
        ("MiniMaxDecoderLayer",), ADDED, "scales the normalised residual stream and this tensor when it adds them"
    ),
    Refusal(("MllamaCrossAttentionDecoderLayer",), ADDED, "multiplies this tensor by a learned gate before adding it"),
    Refusal(
        ("MuseSparkTextDecoderLayer",), ADDED, "mixes the residual stream and this tensor by learned gates"
    ),
    Refusal(("Pix2StructTextBlock",), (*ADDED, "mlp_in"), "has modules that norm and add the residual themselves"),
    Refusal(
        ("ProphetNetDecoderLayer",), STREAM_SITES,
        "holds several predicted streams behind one another along the sequence",
    ),
    Refusal(
        ("Qwen4ExpTextDecoderLayer",), STREAM_SITES,
        "holds several residual streams side by side, of `hc_count` times the width",
    ),
    Refusal(("ReformerLayer",), STREAM_SITES, "is reversible and holds two residual streams"),
    Refusal(("XLNetLayer",), STREAM_SITES, "puts the sequence before the batch, and tokens would be mistaken"),
    Refusal(("ZayaDecoderLayer",), ADDED, "scales and shifts the residual stream and this tensor when it adds them"),
    Refusal(
        ("flaubert.MultiHeadAttention", "xlm.MultiHeadAttention"), (*STREAM_SITES, "mlp_in", "mlp_act", "attn_heads"),
        "is no block: this family keeps attentions, MLPs and norms in lists of their own",
    ),
    *(
        Refusal((name,), STREAM_SITES, f"holds several residual streams, {shape}") for name, shape in STREAMS.items()
    ),
)  # fmt: skip
# Numbers that a block multiplies each branch by before it adds it (Granite, HyperCLOVA X, MiniCPM 3).
MULTIPLIERS = ("residual_multiplier", "residual_scale")


def names_of(block: nn.Module, model_type: str) -> set[str]:
    """The keys under which a block may stand in the tables."""
    names = {cls.__name__ for cls in type(block).__mro__}
    return names | {f"{model_type}.{name}" for name in names}


def bert_half(block: nn.Module) -> nn.Module | None:
    """`attention.output` of a block like BERT's: a linear map, the addition of the residual, and often the norm of the
    sum. None in other blocks."""
    half = getattr(getattr(block, "attention", None), "output", None)
    return half if isinstance(half, nn.Module) and hasattr(half, "dense") else None


def module_of(block: nn.Module, model_type: str, site: str) -> str | None:
    """The path inside a block of a site's module, where the family is an exception; else None."""
    if getattr(block, "norm_after", False) and "Molmo2DecoderLayer" in names_of(block, model_type):
        return {"mlp_out": "post_attention_layernorm", "attn_out": "input_layernorm"}.get(site)
    for name in names_of(block, model_type) & set(MODULES):
        return MODULES[name].get(site)
    return None


def refusal_of(block: nn.Module, model_type: str, site: str) -> str | None:
    """Why a block has no such site; None where it has."""
    if site in ADDED:
        for name in MULTIPLIERS:
            factor = getattr(block, name, None)
            if isinstance(factor, (int, float)) and factor != 1:
                return f"multiplies this tensor by `{name}`, {factor:g}, before it adds it"
        half = bert_half(block)
        if half is not None and any("norm" in name.lower() for name, _ in half.named_children()):
            return POST_NORM
    names = names_of(block, model_type)
    for refusal in REFUSALS:
        if site in refusal.sites and names.intersection(refusal.blocks) and refusal.applies(block):
            return refusal.reason
    return None
