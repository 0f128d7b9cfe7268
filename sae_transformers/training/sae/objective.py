"""The training objective of sparse autoencoders, as a model whose forward pass gives a loss.

    loss = reconstruction (of every prefix) + sparsity + AuxK + conditioning + ranking      per token, then the mean

All terms are ordinary expressions of the chosen latents' pre-activations; `sparse_ops` gives those their gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...modeling import SparseAutoencoder
from ...modeling.configuration_sparse_autoencoder import TOPK_ACTIVATIONS
from ...modeling.sae_losses import concept_losses, normalized_mse
from .arguments import SaeLossArguments
from .certified import CertifiedTopK, fits, pays
from .encoding import Code, bias_of, encode, encode_among, encode_seen, top_k_among
from .latent_selection import Among
from .sparse_ops import Selection, sparse_decode


class Step(NamedTuple):
    """One SAE's share of a step.

    terms: weighted loss terms, (n_tokens,) each. code: what was encoded. target, error: (n_tokens, d_out), x and
    xh - x, detached.
    """

    terms: dict[str, Tensor]
    code: Code
    target: Tensor
    error: Tensor


class SaeInTraining(nn.Module):
    """A sparse autoencoder, its objective and what training must remember of it.

    tokens_since_fired: (d_sae,) int64, tokens seen since each latent was last active, over all processes.
    dead: (d_sae,) bool, what fine-tuning takes for dead.
    norm_limit: (), tokens of a larger norm are left out; so are those of zeros or with NaN.
    certified: chooses top-k latents from scores in bfloat16; None where the float32 product does.
    """

    memory = ("tokens_since_fired", "dead", "norm_limit")
    tokens_since_fired: Tensor
    dead: Tensor
    norm_limit: Tensor

    def __init__(self, sae: SparseAutoencoder, args: SaeLossArguments) -> None:
        super().__init__()
        if sae.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"An SAE trains in float32; `bf16=True` in the arguments computes in bfloat16. Received: {sae.dtype}."
            )
        _check_fit(sae.config, args)
        self.sae, self.args, self.step = sae, args, 0
        self.certified: CertifiedTopK | None = None
        size = sae.config.d_sae
        self.register_buffer("tokens_since_fired", torch.zeros(size, dtype=torch.long, device=sae.device))
        self.register_buffer("dead", torch.zeros(size, dtype=torch.bool, device=sae.device))
        self.register_buffer("norm_limit", torch.tensor(torch.inf, device=sae.device))

    @property
    def k(self) -> int:
        """The k of this step; 0 for activations without one."""
        return self.args.k_at(self.step, self.sae.config.k or 0)

    def decide_scores(self, before: bool | None = None) -> None:
        """Decide whether scores in bfloat16 choose the latents.

        Args:
            before: what the part of the run before a checkpoint did: with `auto` it stays so, and the numbers with it.
        """
        config, wanted = self.sae.config, self.args.bf16_scores
        takes_them = config.activation == "topk" and fits(config.k or config.d_sae, config.d_sae)
        takes_them = takes_them and (self.sae.dtype, self.sae.device.type) == (torch.float32, "cpu")
        if wanted == "auto" and takes_them:
            wanted = before if before is not None else pays(config.d_in, config.d_sae)
        self.certified = CertifiedTopK() if takes_them and wanted in (True, "on") else None

    def usual(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Which hidden states (n_tokens, d_in), with what to reconstruct (n_tokens, d_out), are finite, not zero and
        of usual norm, (n_tokens,) bool."""
        norms = hidden.norm(dim=-1)
        goals = norms if target is hidden else target.norm(dim=-1)
        return (norms > 0) & (norms <= self.norm_limit) & norms.isfinite() & (goals > 0) & goals.isfinite()

    def forward(self, hidden: Tensor, target: Tensor, labels: Tensor | None) -> Step:
        """Weighted loss terms of hidden states (n_tokens, d_in).

        Args:
            target: (n_tokens, d_out), what to reconstruct; `hidden` itself unless this is a transcoder.
            labels: (n_tokens, n_concepts), 0 to 1, -100 where unknown.
        """
        if self.args.finetune_dead:
            return self._finetune(hidden, target)
        sae, args = self.sae, self.args
        normalized = sae.normalize(hidden)
        dead = self._latents_for_aux()
        certified = self.certified if self.training else None
        code = encode(sae, normalized.x, self.k, self.training, args.jumprelu_bandwidth, dead, certified)
        parts = self._decoded_prefixes(code)  # (n_tokens, n_prefixes, d_out)
        outputs = [self._output(part, normalized, hidden) for part in parts.unbind(1)]
        reconstruction = sum((self._distance(target, output) for output in outputs), target.new_zeros(len(target)))
        terms = {"reconstruction": reconstruction}
        error = outputs[-1] - target
        if args.sparsity_coefficient and code.sparsity is not None:
            rise = min(1.0, self.step / args.sparsity_warmup_steps) if args.sparsity_warmup_steps else 1.0
            terms["sparsity"] = rise * args.sparsity_coefficient * code.sparsity(sae, hidden)
        if code.gate is not None:  # a gated SAE's gate must reconstruct through a frozen decoder
            through_gate = sparse_decode(code.gate, code.selection, sae.W_dec.detach()) + sae.b_dec.detach()
            terms["gate"] = self._distance(target, sae.denormalize(through_gate, normalized))
        if dead is not None:
            self._add_aux(terms, normalized, error, dead)
        if labels is not None and sae.config.concepts:
            self._add_concepts(terms, normalized.x, code, labels)
        return Step(terms, code, target.detach(), error.detach())

    # -- terms -------------------------------------------------------------------------------------------------------

    def _distance(self, target: Tensor, output: Tensor) -> Tensor:
        if self.args.reconstruction_loss == "mse":
            return (output - target).square().mean(-1)
        return normalized_mse(target, output)

    def _output(self, decoded: Tensor, normalized: Any, hidden: Tensor) -> Tensor:
        output = self.sae.denormalize(decoded + self.sae.b_dec, normalized)
        return output + hidden @ self.sae.W_skip.T if self.sae.config.skip_connection else output

    def _decoded_prefixes(self, code: Code) -> Tensor:
        """`z[:, :m] @ W_dec[:m]` for each prefix m, (n_tokens, n_prefixes, d_out).

        Every chosen latent is decoded once, in the group between two prefixes; a running sum does the rest.
        "Learning multi-level features with Matryoshka sparse autoencoders" (https://huggingface.co/papers/2503.17547).
        """
        prefixes, selection = self.args.matryoshka_prefixes, code.selection
        if not prefixes:
            return sparse_decode(code.latents, selection, self.sae.W_dec).unsqueeze(1)
        ends = torch.tensor(prefixes, device=selection.latents.device)
        bags = selection.tokens * len(prefixes) + torch.bucketize(selection.latents, ends, right=True)
        order = bags.argsort(stable=True)
        counts = torch.bincount(bags, minlength=selection.n_tokens * len(prefixes))
        by_group = Selection(selection.latents[order], F.pad(counts.cumsum(0), (1, 0)), selection.d_sae)
        groups = sparse_decode(code.latents[order], by_group, self.sae.W_dec)
        return groups.unflatten(0, (selection.n_tokens, len(prefixes))).cumsum(1)

    def _latents_for_aux(self) -> Among | None:
        """The choice among dead latents; None without AuxK, or where none is dead."""
        if not self.args.aux_k or not self.training:
            return None
        dead = (self.tokens_since_fired >= self.args.dead_after_tokens).nonzero()[:, 0]
        return top_k_among(self.sae, self.args.aux_k, dead) if len(dead) else None

    def _add_aux(self, terms: dict[str, Tensor], normalized: Any, error: Tensor, dead: Among) -> None:
        """Dead latents reconstruct the residual, without bias or mean: "Scaling and evaluating sparse autoencoders"
        (https://huggingface.co/papers/2406.04093), appendix A.2."""
        aux = encode_seen(self.sae, normalized.x, dead)
        decoded = sparse_decode(aux.latents, aux.selection, self.sae.W_dec)
        if normalized.scale is not None:
            decoded = decoded * normalized.scale
        terms["aux"] = self.args.aux_coefficient * normalized_mse(-error.detach(), decoded)

    def _add_concepts(self, terms: dict[str, Tensor], x: Tensor, code: Code, labels: Tensor) -> None:
        sae, args = self.sae, self.args
        concepts = torch.tensor(list(sae.config.concepts.values()), device=x.device)
        if sae.config.apply_b_dec_to_input:
            x = x - sae.b_dec
        pre_acts = x @ sae.W_enc[:, concepts] + bias_of(sae)[concepts]  # (n_tokens, n_concepts)
        if args.conditioning_legacy:
            labels = torch.where(labels < 0, 0.0, labels)
        if args.conditioning_weight and args.pos_weight:
            weights = torch.where(labels > 0, args.pos_weight, 1.0)
            losses = concept_losses(pre_acts, labels)
            if args.conditioning_legacy:
                terms["reconstruction"] = terms["reconstruction"] * weights[:, 0]
            terms["conditioning"] = args.conditioning_weight * (weights * losses).sum(-1)
        if args.ranking_weight:
            lowest = code.pre_acts.new_full((len(x),), torch.inf)
            lowest = lowest.scatter_reduce(0, code.selection.tokens, code.pre_acts.detach(), "amin")
            short = torch.relu(lowest[:, None] + args.ranking_margin - pre_acts)
            # A token without chosen latents has no k-th one to exceed.
            short = torch.where((labels > 0) & lowest.isfinite()[:, None], short, 0.0)
            terms["ranking"] = args.ranking_weight * short.sum(-1)

    def _finetune(self, hidden: Tensor, target: Tensor) -> Step:
        """`nl2(alive, x) + weight * nl2(dead, x - stopgrad(alive))`: SelfReg's fine-tuning
        (https://huggingface.co/papers/2502.14133), a term left out where its set is empty."""
        sae, legacy = self.sae, self.args.finetune_legacy
        normalized = sae.normalize(hidden)
        alive, dead = (~self.dead).nonzero()[:, 0], self.dead.nonzero()[:, 0]
        code = encode_among(sae, normalized.x, self.k, alive, rectified=not legacy)
        output = self._output(sparse_decode(code.latents, code.selection, sae.W_dec), normalized, hidden)
        error = output - target
        terms = {"reconstruction": self._distance(target, output)}
        if len(dead):
            rest = encode_among(sae, normalized.x, self.k, dead, rectified=not legacy)
            decoded = sparse_decode(rest.latents, rest.selection, sae.W_dec)
            if legacy:
                decoded = decoded + sae.b_dec
            if normalized.scale is not None:
                decoded = decoded * normalized.scale
            terms["dead_residual"] = self.args.dead_residual_weight * self._distance(-error.detach(), decoded)
        return Step(terms, code, target.detach(), error.detach())

    # -- memory ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def remember(self, code: Code) -> None:
        """Note which latents were active on this batch, on any process; a BatchTopK's threshold follows."""
        fired = torch.zeros_like(self.dead)
        fired[code.selection.latents[code.latents != 0]] = True
        n_tokens = torch.tensor(code.selection.n_tokens, device=fired.device)
        lowest = None
        if self.sae.config.activation == "batch_topk":
            lowest = torch.cat([code.latents.detach(), self.sae.threshold.new_full((1,), torch.inf)]).min()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            counts = fired.int()
            torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX)
            torch.distributed.all_reduce(n_tokens)
            fired = counts.bool()
            if lowest is not None:
                torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
        self.tokens_since_fired += n_tokens
        self.tokens_since_fired[fired] = 0
        if lowest is not None:
            old = self.sae.threshold
            new = torch.where(old == 0, lowest, 0.99 * old + 0.01 * lowest)
            old.copy_(torch.where(lowest.isfinite(), new, old))


class SaeObjective(nn.Module):
    """One or more sparse autoencoders as a model for `Trainer`.

    Input: hidden states (n_tokens, width) by the name of their place; `labels` (n_tokens, n_labels). Output: `loss`.
    """

    def __init__(
        self, saes: Sequence[SparseAutoencoder], args: SaeLossArguments, label_names: Sequence[str] = ()
    ) -> None:
        super().__init__()
        if not saes:
            raise ValueError("There is no SAE to train. Received: saes=[].")
        self.saes = nn.ModuleList(SaeInTraining(sae, args) for sae in saes)
        self.label_names = list(label_names)
        self.last_steps: list[Step] = []

    def forward(self, labels: Tensor | None = None, **hidden: Tensor) -> dict[str, Tensor]:
        self.last_steps = []
        loss: Any = 0.0
        part: Any
        for part in self.saes:
            config, dtype = part.sae.config, part.sae.dtype
            read = hidden[config.read_at].to(dtype)
            target = read if config.write_at == config.read_at else hidden[config.write_at].to(dtype)
            n_tokens, own_labels = len(read), self.labels_of(config, labels)
            usual = part.usual(read, target)
            if not bool(usual.all()):
                read, target = read[usual], target[usual]
                own_labels = None if own_labels is None else own_labels[usual]
            step: Step = part(read, target, own_labels)
            if self.training:
                part.remember(step.code)
            self.last_steps.append(step)
            # Over all tokens of the batch, those left out too: batches of several processes or steps weigh alike.
            loss = loss + sum(term.sum() for term in step.terms.values()) / n_tokens
        return {"loss": loss}

    @property
    def scores_in_bfloat16(self) -> dict[str, str] | None:
        """A mark, "0.bf16_scores", for each SAE whose latents are chosen from such scores; None where none is."""
        parts: Any = self.saes
        return {f"{n}.bf16_scores": "on" for n, part in enumerate(parts) if part.certified is not None} or None

    def labels_of(self, config: Any, labels: Tensor | None) -> Tensor | None:
        """The columns of labels (n_tokens, n_labels) that an SAE's concepts name; None where there are none."""
        if labels is None or not config.concepts:
            return None
        if not self.label_names:
            return labels
        return labels[:, [self.label_names.index(name) for name in config.concepts]]


def _check_fit(config: Any, args: SaeLossArguments) -> None:
    if config.glu or config.scaled_selection:
        raise ValueError(
            f"SAEs with a GLU encoder or a scaled selection are read and steered, not trained. "
            f"Received: glu={config.glu!r}, scaled_selection={config.scaled_selection!r}."
        )
    if config.activation == "batch_topk" and config.k is None:
        raise ValueError("Training an SAE with activation 'batch_topk' needs its `k`. Received: k=None.")
    topk = config.activation == "batch_topk" or config.activation in TOPK_ACTIVATIONS
    if args.k_start and config.activation == "groupmax":
        raise ValueError(f"`k_start` changes k, which groupmax cannot. Received: k_start={args.k_start!r}.")
    if args.k_start and (not topk or not config.k <= args.k_start <= config.d_sae):
        raise ValueError(
            f"`k_start` must lie between a top-k SAE's k and its d_sae={config.d_sae}. "
            f"Received: k_start={args.k_start!r}, activation={config.activation!r}, k={config.k!r}."
        )
    if args.matryoshka_prefixes and args.matryoshka_prefixes[-1] != config.d_sae:
        raise ValueError(
            f"The last of `matryoshka_prefixes` must be d_sae={config.d_sae}. "
            f"Received: matryoshka_prefixes={args.matryoshka_prefixes!r}."
        )
    if args.finetune_dead and not topk:
        raise ValueError(
            f"`finetune_dead` needs an SAE with a top-k activation. Received: activation={config.activation!r}."
        )
