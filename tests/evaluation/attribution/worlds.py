"""Models whose attributions are known: a linear one with planted features, and two SAEs on a random base."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from sae_transformers import SaeForCausalLM, SaeForSequenceClassification
from tests.tiny import LAYERS, WIDTH, prompt, tiny_base, tiny_sae

DOUBLE = torch.float64
FIRST, SECOND = 20, 30  # the tokens of the difference
PLANTED = (3, 11)
IDS = prompt(1, 8)[0].tolist()


def planted_model() -> SaeForCausalLM:
    """What comes after the SAE is linear: the last block adds the mean of the stream over the tokens so far, there is
    no norm before the head; and of the SAE's decoder rows two alone point along the difference of the head's rows.
    """
    base = tiny_base("gpt2", dtype=DOUBLE, n_layer=2, num_hidden_layers=2, tie_word_embeddings=False)
    block, body = base.transformer.h[1], base.transformer
    with torch.no_grad():
        block.ln_1 = body.ln_f = nn.Identity()
        block.attn.c_attn.weight.zero_()  # all scores alike
        block.attn.c_attn.weight[:, 2 * WIDTH :] = torch.eye(WIDTH, dtype=DOUBLE)
        block.attn.c_attn.bias.zero_()
        block.attn.c_proj.weight.copy_(torch.eye(WIDTH, dtype=DOUBLE))
        block.attn.c_proj.bias.zero_()
        block.mlp.c_proj.weight.zero_()
        sae = tiny_sae(dtype=DOUBLE, activation="relu", layer=0, site="resid_post")
        along = nn.functional.normalize(base.lm_head.weight[FIRST] - base.lm_head.weight[SECOND], dim=0)
        rows = sae.W_dec - torch.outer(sae.W_dec @ along, along)
        rows[PLANTED[0]] += 0.7 * along
        rows[PLANTED[1]] -= 0.4 * along
        sae.W_dec.copy_(rows)
    return SaeForCausalLM.from_base(base, saes=[sae]).eval()


def planted_effects(model: SaeForCausalLM) -> torch.Tensor:
    """Of each latent at each token on the logit of FIRST less that of SECOND, (tokens, d_sae), by the model's
    construction: `z * (W_dec @ (w_first - w_second)) * (1/n + 1 at the last token)`."""
    with torch.no_grad():
        latents = model(torch.tensor([IDS]), output_features=True).sae_features[0].to_dense()[0]
    head = model.lm.lm_head.weight.detach()
    weights = torch.full((len(IDS), 1), 1 / len(IDS), dtype=DOUBLE)
    weights[-1] += 1
    return latents * (model.saes[0].W_dec.detach() @ (head[FIRST] - head[SECOND])) * weights


def classifier(**options) -> SaeForSequenceClassification:
    """Three labels on a random base."""
    config = tiny_base("gpt2", dtype=DOUBLE).config
    config.id2label = {0: "bad", 1: "fine", 2: "good"}
    config.label2id = {name: number for number, name in config.id2label.items()}
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(config, dtype=DOUBLE)
    sae = tiny_sae(layer=1, dtype=DOUBLE)
    return SaeForSequenceClassification.from_base(base, saes=[sae], **options).eval()


def random_model(kind: str = "jumprelu") -> SaeForCausalLM:
    """Two SAEs on a random base: at the output of the first block, and at the second's or in place of its MLP."""
    later = {"layer": LAYERS - 2, "site": "resid_post", "activation": "topk"}
    if kind == "transcoder":
        place = {"hook": f"transformer.h.{LAYERS - 2}.mlp.input", "hook_out": f"transformer.h.{LAYERS - 2}.mlp"}
        later = {**place, "activation": "relu", "apply_b_dec_to_input": False}
    first = {"layer": 0, "site": "resid_post", "activation": "jumprelu", "normalization": "layer_norm"}
    saes = [tiny_sae(seed=n, dtype=DOUBLE, **settings) for n, settings in enumerate((first, later), 1)]
    return SaeForCausalLM.from_base(tiny_base("gpt2", dtype=DOUBLE), saes=saes).eval()
