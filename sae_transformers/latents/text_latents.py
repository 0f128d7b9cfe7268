"""Texts in batches of like length, and what SAEs read and say of each text, without keeping their tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modeling import SparseAutoencoder
from ..modeling.modeling_sae import SaePreTrainedModel
from .batches import length_batches, right_padded
from .context import check_length
from .progress import Keep, keep_nothing
from .sparse_codes import SparseCodes, encode_texts, stack_rows


class TextBatch(NamedTuple):
    """texts: numbers of the texts. ids, mask: (batch, width) int64, padded on the right."""

    texts: Tensor
    ids: Tensor
    mask: Tensor


class TextCodes(NamedTuple):
    """Of n texts at one SAE, mean over each one's tokens but the first ones.

    hidden: (n, d_in) float32, of the hidden states. codes: (n, d_sae), of the latents. pre_acts: (n, m) float32, of
    the pre-activations of m latents that were asked for.
    """

    hidden: Tensor
    codes: SparseCodes
    pre_acts: Tensor


def text_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int,
    least: int = 2,
) -> tuple[list[list[int]], list[int]]:
    """Token ids of texts, cut, and the numbers of these texts; those of fewer than `least` tokens are left out.

    Raises:
        ValueError: fewer than two texts are long enough, or a length that the model does not have.
    """
    check_length(model, max_length, least)
    if isinstance(texts, str):
        raise TypeError("`texts` must be a list of texts. Received: one text.")
    rows = tokenizer(list(texts), truncation=True, max_length=max_length, verbose=False)["input_ids"] if texts else []
    kept = [i for i, row in enumerate(rows) if len(row) >= least]
    if len(kept) < 2:
        raise ValueError(
            f"Expected two texts or more of {least} tokens or more. Received: {len(rows)} texts, {len(kept)} of them "
            "so long."
        )
    return [rows[i] for i in kept], kept


def batches_of(rows: Sequence[Sequence[int]], *, tokens_at_once: int) -> Iterator[TextBatch]:
    """Batches of limited padded size, the longest texts first; a longer text is a batch of its own."""
    for members in length_batches([len(row) for row in rows], tokens_at_once):
        yield TextBatch(torch.tensor(members), *right_padded([rows[i] for i in members]))


@torch.no_grad()
def encode_text_means(
    model: SaePreTrainedModel,
    rows: Sequence[Sequence[int]],
    *,
    asked: Sequence[Sequence[int]] | None = None,
    skip_first: int = 1,
    tokens_at_once: int = 2048,
    report: Callable[[int], object] | None = None,
    keep: Keep = keep_nothing,
) -> list[TextCodes]:
    """Mean hidden state and mean latents of each text, for each SAE of a model; no more than a batch is held.

    Args:
        model: a `SaeForCausalLM`; it runs without steering, up to its last SAE.
        rows: token ids of n texts, more than `skip_first` each, as `text_ids` gives them.
        asked: for each SAE the latents whose pre-activations are wanted too; none by default.
        skip_first: tokens at the beginning that do not count: the first is an outlier that SAEs are seldom made for.
        tokens_at_once: of a forward pass, padding counted.
        report: called with the number of texts of each batch.
        keep: has the batches that were read, and gets the others.
    """
    n, saes = len(rows), list(model.saes)
    asked = [[]] * len(saes) if asked is None else asked
    hidden = [torch.zeros(n, sae.config.d_in) for sae in saes]
    pre_acts = [torch.zeros(n, len(latents)) for latents in asked]
    parts: list[list[SparseCodes]] = [[] for _ in saes]
    order = []
    for batch in batches_of(rows, tokens_at_once=tokens_at_once):
        found = keep(
            {
                "means": [rows[i] for i in batch.texts.tolist()],
                "asked": [list(one) for one in asked],
                "skip": skip_first,
            },
            lambda batch=batch: _batch_means(model, batch, asked, skip_first),
        )
        for number, sae in enumerate(saes):
            hidden[number][batch.texts] = found[f"{number}.hidden"]
            pre_acts[number][batch.texts] = found[f"{number}.pre_acts"]
            latents, places, values = (found[f"{number}.{name}"] for name in ("latents", "rows", "values"))
            parts[number].append(SparseCodes(latents, places, values, len(batch.texts), sae.config.d_sae))
        order.append(batch.texts)
        if report is not None:
            report(len(batch.texts))
    back = torch.cat(order).argsort()
    codes = [stack_rows(some).take_rows(back) for some in parts]
    return [TextCodes(*found) for found in zip(hidden, codes, pre_acts, strict=True)]


def _batch_means(
    model: SaePreTrainedModel, batch: TextBatch, asked: Sequence[Sequence[int]], skip_first: int
) -> dict[str, Tensor]:
    """`hidden`, `pre_acts`, and `latents`, `rows` and `values` of the codes, each after the number of its SAE."""
    inputs = model(
        input_ids=batch.ids.to(model.device), attention_mask=batch.mask.to(model.device), steering=False,
        output_sae_inputs=True, stop_at_last_sae=True,
    ).sae_inputs  # fmt: skip
    kept = batch.mask.bool() & (batch.mask.cumsum(-1) > skip_first)
    line = kept.nonzero()[:, 0]  # of each token that counts, its text in the batch
    counts = kept.sum(1, keepdim=True)
    found = {}
    for number, sae in enumerate(model.saes):
        states = inputs[number][kept.to(inputs[number].device)]
        sums = torch.zeros(len(kept), states.shape[1]).index_add_(0, line, states.float().cpu())
        codes = encode_texts(sae, states, line, len(kept))
        of_sae = {"hidden": sums / counts, "latents": codes.latents, "rows": codes.rows, "values": codes.values}
        of_sae["pre_acts"] = torch.zeros(len(kept), len(asked[number]))
        if len(asked[number]):
            latents = torch.tensor(list(asked[number]), device=sae.device)
            acts = sae.encode_pre_acts(states.to(device=sae.device, dtype=sae.dtype), latents).float().cpu()
            of_sae["pre_acts"] = of_sae["pre_acts"].index_add_(0, line, acts) / counts
        found |= {f"{number}.{name}": tensor for name, tensor in of_sae.items()}
    return found


def sae_of(model: PreTrainedModel, number: int) -> SparseAutoencoder:
    """One of a model's SAEs.

    Raises:
        ValueError: it has none, or none of that number.
    """
    if not isinstance(model, SaePreTrainedModel):
        raise ValueError(f"A base has no SAE: give one with `sae=`. Received: sae={number!r}.")
    if not 0 <= number < len(model.saes):
        raise ValueError(f"The model has SAEs 0 to {len(model.saes) - 1}. Received: SAE {number!r}.")
    return model.saes[number]


def feature_names(
    sae: SparseAutoencoder, features: Collection[int], names: Mapping[int, str] | None = None
) -> dict[int, str]:
    """What features are called, of those that have a name: by `names`, the SAE's own names and concepts, and where it
    has `annotations`, their descriptions."""
    config, notes = sae.config, sae.annotations
    known = notes.names(sorted(features)) if notes is not None else {}
    known |= {number: name for name, number in config.concepts.items()}
    known |= {int(number): name for number, name in config.feature_names.items()} | dict(names or {})
    return {number: name for number, name in known.items() if number in features}


def named_features(
    model: SaePreTrainedModel, features: Sequence[tuple[int, int | str]] | None
) -> dict[str, tuple[int, int]]:
    """Name of each feature -> SAE and latent.

    Args:
        features: SAE and latent, or the name of one of its concepts; by default all concepts.

    Raises:
        ValueError: an SAE, a latent or a concept that the model does not have.
    """
    configs = model.config.sae_configs
    if features is None:
        features = [(i, name) for i, config in enumerate(configs) for name in config.concepts]
    found = {}
    for sae, feature in features:
        if not 0 <= sae < len(configs):
            raise ValueError(
                f"The model has SAEs 0 to {len(configs) - 1}. Received: feature {feature!r} of SAE {sae}."
            )
        name = feature if isinstance(feature, str) else f"latent {feature}"
        found[f"{name} of SAE {sae}"] = (sae, configs[sae].resolve_feature(feature))
    return found
