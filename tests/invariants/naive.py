"""Steering done the slow way, to compare the library with: a bare transformers base and one plain forward hook.

Every forward pass sees the whole sequence (the reference never uses a cache), so a column of the hidden state is an
absolute position. Row by row: full dense encode, edit, full dense decode, and what the first decode missed added back.
Nothing here calls the library; SAEs are read as bags of weights and config fields, steering as its declaration.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def block_list(base: Any) -> nn.ModuleList:
    """The decoder blocks, by each family's own name for them."""
    paths = {
        "gpt2": "transformer.h",
        "bloom": "transformer.h",
        "falcon": "transformer.h",
        "gpt_neox": "gpt_neox.layers",
        "opt": "model.decoder.layers",
    }
    return base.get_submodule(paths.get(base.config.model_type, "model.layers"))


def site_module(base: Any, layer: int, site: str) -> nn.Module:
    """The module whose output (or, for resid_pre, input) is the tensor in question; written down family by family."""
    family = base.config.model_type
    mlp = {
        "gemma2": "post_feedforward_layernorm",
        "gemma3_text": "post_feedforward_layernorm",
        "olmo2": "post_feedforward_layernorm",
        "opt": "fc2",
        "bloom": "mlp.dense_4h_to_h",
    }
    attention = {
        "gemma2": "post_attention_layernorm",
        "gemma3_text": "post_attention_layernorm",
        "olmo2": "post_attention_layernorm",
        "gpt2": "attn",
        "gpt_neox": "attention",
        "bloom": "self_attention.dense",
        "falcon": "self_attention",
    }
    block = block_list(base)[layer]
    if site == "mlp_out":
        return block.get_submodule(mlp.get(family, "mlp"))
    if site == "attn_out":
        return block.get_submodule(attention.get(family, "self_attn"))
    return block


# -- the sparse autoencoder ----------------------------------------------------------------------------------------


def weights(sae: Any) -> tuple[Tensor, Tensor]:
    """W_enc (d_in, d_sae) and W_dec (d_sae, d_out)."""
    return (sae.W_dec.T if sae.config.tied else sae.W_enc), sae.W_dec


def normalised(sae: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SAE's input for hidden states (T, d_in), and `scale`, `mean` (T, 1) that undo it."""
    c = sae.config
    one, zero = x.new_ones(len(x), 1), x.new_zeros(len(x), 1)
    normal, scale, mean = _normalised(c, x, one, zero)
    return (normal, scale, mean) if c.normalize_output else (normal, one, zero)


def _normalised(c: Any, x: Tensor, one: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if c.normalization == "layer_norm":
        mean = x.sum(-1, keepdim=True) / c.d_in
        std = ((x - mean).square().sum(-1, keepdim=True) / (c.d_in - 1)).sqrt()
        return (x - mean) / (std + c.layer_norm_eps), std, mean
    if c.normalization == "constant_norm":
        norm = x.square().sum(-1, keepdim=True).sqrt()
        return x / norm * math.sqrt(c.d_in), norm / math.sqrt(c.d_in), zero
    if c.normalization == "scalar":
        return x * c.input_scale, one / (c.output_scale or c.input_scale), zero
    return x, one, zero


def pre_activations(sae: Any, x: Tensor) -> Tensor:
    """(T, d_sae); of a gated SAE the gate's."""
    w_enc, _ = weights(sae)
    inputs = normalised(sae, x)[0]
    if sae.config.apply_b_dec_to_input:
        inputs = inputs - sae.b_dec
    pre = inputs @ w_enc + (sae.b_gate if sae.config.activation == "gated" else sae.b_enc)
    return pre / (1 + (-(inputs @ sae.W_glu + sae.b_glu)).exp()) if sae.config.glu else pre


def activated(sae: Any, pre: Tensor) -> Tensor:
    """Latents (T, d_sae) of pre-activations."""
    c = sae.config
    functions = {
        "topk": torch.relu, "groupmax": torch.relu, "topk-sigmoid": torch.sigmoid, "topk-tanh": torch.tanh,
        "topk-identity": lambda v: v, "abs_topk": lambda v: v,
    }  # fmt: skip
    if c.activation in functions:
        score = pre.abs() if c.activation == "abs_topk" else pre
        score = score * sae.selection_scale if c.scaled_selection else score
        kept = torch.zeros_like(pre, dtype=torch.bool)
        if c.activation == "groupmax":
            size = c.d_sae // c.k
            for group in range(c.k):
                best = group * size + score[:, group * size : (group + 1) * size].argmax(-1)
                kept[torch.arange(len(pre)), best] = True
        else:
            kept = kept.scatter(-1, score.argsort(dim=-1, descending=True)[:, : c.k], True)
        function = functions[c.activation]
        return torch.where(kept, function(pre), 0.0)
    if c.activation in ("jumprelu", "batch_topk"):
        return pre.clamp(min=0) * (pre > sae.threshold)
    if c.activation == "gated":
        magnitude = (pre - sae.b_gate) * sae.r_mag.exp() + sae.b_mag
        return magnitude.clamp(min=0) * (pre > 0)
    return pre.clamp(min=0) if c.activation == "relu" else pre


def decoded(sae: Any, latents: Tensor, scale: Tensor, mean: Tensor, x: Tensor) -> Tensor:
    """(T, d_out)."""
    output = (latents @ weights(sae)[1] + sae.b_dec) * scale + mean
    return output + x @ sae.W_skip.T if sae.config.skip_connection else output


def latents_of(sae: Any, x: Tensor) -> Tensor:
    return activated(sae, pre_activations(sae, x))


def reconstruction_of(sae: Any, x: Tensor) -> Tensor:
    _, scale, mean = normalised(sae, x)
    return decoded(sae, latents_of(sae, x), scale, mean, x)


# -- edits ---------------------------------------------------------------------------------------------------------


def edited(
    sae: Any, number: int, read: Tensor, written: Tensor, steering: Any, factors: list[float] | None = None
) -> Tensor:
    """What steering makes of one row's hidden states: `read` (T, d_in) is encoded, `written` (T, d_out) is changed.
    factors: of each edit, how far it goes."""
    edits = [e for e in steering.edits if e.sae == number]
    replaced = number in steering.reconstruct or (not steering.keep_error and bool(edits))
    if not edits and not replaced:
        return written
    dtype = sae.W_dec.dtype
    x, old_state = read.to(dtype), written.to(dtype)
    w_dec = weights(sae)[1]
    pre, (_, scale, mean) = pre_activations(sae, x), normalised(sae, x)
    before = activated(sae, pre)
    error = old_state - decoded(sae, before, scale, mean, x)
    after = before.clone()
    for edit in edits:
        if hasattr(edit, "scores"):
            scores = torch.tensor(edit.scores, dtype=dtype)
            after = activated(sae, pre * scores)
            if edit.mode == "swap":
                after = torch.where(after != 0, pre, 0.0)
            if edit.legacy:
                scale, mean = scale * 0 + scores.mean() ** 2, mean * 0 + scores.mean()
    weighted, touched, added = after.clone(), set(), torch.zeros_like(old_state)
    for edit, factor in zip(edits, factors or [1.0] * len(edits), strict=True):
        if hasattr(edit, "scores"):
            continue
        i = sae.config.concepts[edit.feature] if isinstance(edit.feature, str) else edit.feature
        value = 0.0 if edit.value is None else edit.value
        v = x.new_full((len(x),), value)
        if edit.unit == "max":
            v = v * sae.feature_max[i]
        elif edit.unit == "norm":
            v = v * x.norm(dim=-1) / w_dec[i].norm() / (1.0 if edit.op == "direction" else scale[:, 0])
        if edit.op == "direction":
            added = added + factor * v[:, None] * w_dec[i]
            continue
        z = after[:, i]
        new = {
            "add": z + v,
            "scale": v * z,
            "set": v,
            "ablate": v * 0,
            "erase": v * 0,
            "at_least": torch.maximum(z, v),
            "at_most": torch.minimum(z, v),
            "shrink": (z - v).clamp(min=0),
            "scale_magnitude": v * pre[:, i].abs(),
        }[edit.op]
        new = z + factor * (new - z)
        after = torch.cat([after[:, :i], new[:, None], after[:, i + 1 :]], dim=1)
        touched.add(i)
    if steering.balance and touched:
        others = [j for j in range(sae.config.d_sae) if j not in touched]
        after = after.clone()
        after[:, others] -= (after - weighted).sum(-1, keepdim=True) / len(others)
    error = without(error, w_dec[erased_latents(sae, edits)])
    new_state = decoded(sae, after, scale, mean, x) + added
    return new_state if replaced else new_state + error


def erased_latents(sae: Any, edits: list) -> list[int]:
    erased = [e.feature for e in edits if getattr(e, "op", "") == "erase"]
    return sorted({sae.config.concepts[f] if isinstance(f, str) else f for f in erased})


def without(error: Tensor, directions: Tensor) -> Tensor:
    """Errors (T, d) less their parts along the span of directions, one after the other made orthogonal."""
    basis: list[Tensor] = []
    for direction in directions:
        for one in basis:
            direction = direction - (direction @ one) * one
        if direction.norm() > 1e-6 * directions.norm(dim=-1).max():
            basis.append(direction / direction.norm())
    for one in basis:
        error = error - (error @ one)[:, None] * one
    return error


def steered_columns(positions: Any, first: int, end: int, total: int) -> list[bool]:
    """Whether each of `total` columns is steered, for a row whose prompt occupies the columns [first, end)."""
    if positions == "all":
        return [True] * total
    if positions == "prompt":
        return [column < end for column in range(total)]
    if positions == "generated":
        return [column >= end - 1 for column in range(total)]
    if positions == "last_prompt":
        return [column == end - 1 for column in range(total)]

    def column_of(bound: int) -> int:
        return end + bound if bound < 0 else first + bound

    return [
        any(
            (start is None or column >= column_of(start)) and (stop is None or column < column_of(stop))
            for start, stop in positions
        )
        for column in range(total)
    ]


class Hooks:
    """Plain hooks on a bare base that steer a batch.

    Args:
        base: the bare model. saes: the SAEs, whose config says where they stand.
        rows: one steering (or None) for each prompt; one for all if it is not a list.
        prompts: (first, end) columns of each prompt; the same for all if it is one pair.
        mask: (rows, length) bool of columns that may be steered; those beyond it are not.
    """

    def __init__(self, base: Any, saes: list, rows: Any, prompts: Any, mask: Tensor | None = None) -> None:
        self.base, self.saes, self.mask = base, saes, mask
        self.rows = rows if isinstance(rows, list) else [rows]
        self.prompts = prompts if isinstance(prompts, list) else [prompts]
        self.shape: tuple[int, int] = (0, 0)
        self.tokens: list[list[int]] | None = None
        self.read: dict[int, Tensor] = {}
        self.seen: dict[int, Tensor] = {}  # what the last pass showed before any edit

    def of_row(self, values: list, row: int) -> Any:
        """The entry of a batch row, which may be a beam or a further return sequence of a prompt."""
        return values[row // (self.shape[0] // len(values))]

    def note_shape(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        source = kwargs.get("input_ids", args[0] if args else None)
        source = kwargs["inputs_embeds"] if source is None else source
        self.shape = tuple(source.shape[:2])
        self.tokens = source.tolist() if source.ndim == 2 else None

    def changed(self, number: int, hidden: Tensor) -> Tensor:
        batch, length = self.shape
        here = hidden.reshape(batch, length, -1)
        read = self.read.get(number, here)
        self.seen[number] = read
        rows = []
        for b in range(batch):
            steering = self.of_row(self.rows, b)
            if steering is None:
                rows.append(here[b])
                continue
            first, end = self.of_row(self.prompts, b)
            chosen = torch.tensor(steered_columns(steering.positions, first, end, length))
            if steering.exclude_tokens and self.tokens is not None:
                chosen &= torch.tensor([token not in steering.exclude_tokens for token in self.tokens[b]])
            if self.mask is not None:
                mask = self.of_row(list(self.mask), b)
                chosen &= torch.tensor([c < len(mask) and bool(mask[c]) for c in range(length)])
            new = edited(self.saes[number], number, read[b], here[b], steering).to(hidden.dtype)
            rows.append(torch.where(chosen[:, None], new, here[b]))
        return torch.stack(rows).reshape(hidden.shape)

    def place(self, number: int, path: str | None, layer: int, site: str, action: Any) -> Any:
        """Hang `action(hidden)` on a place; what it returns, if anything, takes the hidden state's place."""
        if path is not None:
            module, side = self.base.get_submodule(path.removesuffix(".input").removesuffix(".output")), path
        else:
            module, side = site_module(self.base, layer, site), site
        if side == "resid_pre" or side.endswith(".input"):

            def before(module: nn.Module, args: tuple, kwargs: dict) -> Any:
                if args:
                    new = action(number, args[0])
                    return None if new is None else ((new, *args[1:]), kwargs)
                new = action(number, kwargs["hidden_states"])
                return None if new is None else (args, {**kwargs, "hidden_states": new})

            return module.register_forward_pre_hook(before, with_kwargs=True)

        def after(module: nn.Module, args: tuple, output: Any) -> Any:
            whole = isinstance(output, Tensor)
            new = action(number, output if whole else output[0])
            return new if whole or new is None else (new, *output[1:])

        return module.register_forward_hook(after)

    def keep_read(self, number: int, hidden: Tensor) -> None:
        self.read[number] = hidden.reshape(*self.shape, -1)

    @contextmanager
    def installed(self):
        handles = [self.base.register_forward_pre_hook(self.note_shape, with_kwargs=True)]
        for number, sae in enumerate(self.saes):
            c = sae.config
            if c.hook_out is not None:
                handles.append(self.place(number, c.hook, c.layer, c.site, self.keep_read))
                handles.append(self.place(number, c.hook_out, 0, "", self.changed))
            else:
                handles.append(self.place(number, c.hook, c.layer, c.site, self.changed))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


# -- whole passes --------------------------------------------------------------------------------------------------


def prompt_columns(ids: Tensor, attention_mask: Tensor | None) -> list[tuple[int, int]]:
    """(first, end) of each row's real tokens."""
    if attention_mask is None:
        return [(0, ids.shape[1])] * len(ids)
    real = [[c for c, one in enumerate(row) if one] for row in attention_mask.tolist()]
    return [(columns[0], columns[-1] + 1) for columns in real]


def naive_forward(base: Any, saes: list, rows: Any, ids: Tensor, mask: Tensor | None = None, **inputs: Any) -> Tensor:
    """Steered logits (batch, seq, vocab) of whole texts, of which all is prompt. mask: as for `Hooks`."""
    hooks = Hooks(base, saes, rows, prompt_columns(ids, inputs.get("attention_mask")), mask)
    with hooks.installed():
        if "inputs_embeds" not in inputs:
            inputs["input_ids"] = ids
        return base(**inputs, use_cache=False).logits


class Recorder:
    """The logits of every pass of a base in its own precision (`generate` rounds scores to float32).

    passes: last column of each pass, (batch, vocab). at: absolute position -> (batch, vocab), of the latest pass that
    showed it.
    """

    def __init__(self, base: Any) -> None:
        self.base = base
        self.passes: list[Tensor] = []
        self.at: dict[int, Tensor] = {}
        self.stop = 0

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        ids = kwargs.get("input_ids", args[0] if args else None)
        length = (ids if ids is not None else kwargs["inputs_embeds"]).shape[1]
        self.stop = (0 if cache is None else int(cache.get_seq_length())) + length

    def after(self, module: nn.Module, args: tuple, logits: Tensor) -> None:
        logits = logits.detach().clone()
        self.passes.append(logits[:, -1])
        for j in range(logits.shape[1]):
            self.at[self.stop - logits.shape[1] + j] = logits[:, j]

    def positions(self, start: int, stop: int) -> Tensor:
        """(stop - start, batch, vocab)."""
        return torch.stack([self.at[p] for p in range(start, stop)])

    def __enter__(self) -> Recorder:
        self.handles = [
            self.base.register_forward_pre_hook(self.before, with_kwargs=True),
            self.base.get_output_embeddings().register_forward_hook(self.after),
        ]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()


class Generated(NamedTuple):
    """tokens (batch, total); scores (steps, batch, vocab) in float32; `logits` of every pass."""

    tokens: Tensor
    scores: Tensor
    logits: Recorder


def naive_generate(
    base: Any, saes: list, rows: Any, ids: Tensor, mask: Tensor | None = None, **options: Any
) -> Generated:
    """transformers' `generate` without a cache, steered by hooks."""
    # Padding is on the left: every prompt ends where the ids end.
    prompts = [(first, ids.shape[1]) for first, _ in prompt_columns(ids, options.get("attention_mask"))]
    with Hooks(base, saes, rows, prompts, mask).installed(), Recorder(base) as logits:
        output = base.generate(
            ids, use_cache=False, output_scores=True, return_dict_in_generate=True, **{"do_sample": False, **options}
        )
    return Generated(output.sequences, torch.stack(output.scores), logits)


@torch.no_grad()
def naive_guided(
    base: Any,
    saes: list,
    rows: Any,
    ids: Tensor,
    guidance: float,
    steps: int,
    negative: Tensor | None = None,
    mask: Tensor | None = None,
) -> Generated:
    """Greedy classifier-free guidance, both branches steered, each with its own prompt: the unconditional one's is
    `negative`, by default the prompt's last token. A mask names tokens of the prompt, so of that branch none.
    https://huggingface.co/papers/2306.17806, equation 7 on log probabilities."""
    other = ids[:, -1:] if negative is None else negative
    none = None if mask is None else torch.zeros_like(mask)
    branches, scores = ((ids.shape[1], mask), (other.shape[1], none)), []
    with Recorder(base) as logits:
        for _ in range(steps):
            for tokens, (end, allowed) in zip((ids, other), branches, strict=True):
                with Hooks(base, saes, rows, (0, end), allowed).installed():
                    base(tokens, use_cache=False)
            with_prompt, without = (x.float().log_softmax(-1) for x in logits.passes[-2:])
            scores.append(guidance * (with_prompt - without) + without)
            chosen = scores[-1].argmax(-1, keepdim=True)
            ids, other = torch.cat([ids, chosen], 1), torch.cat([other, chosen], 1)
    return Generated(ids, torch.stack(scores), logits)
