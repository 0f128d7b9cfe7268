"""Train sparse autoencoders by what their reconstruction does to the model they stand in."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer

from ...modeling import Steering

LABELS = ("labels", "concept_targets")  # all else that a batch holds goes to the base again


def next_token_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """`KL(reference || logits)` of next-token distributions.

    Args:
        logits, reference: (..., vocab); no gradient goes to `reference`.

    Returns:
        (...), in nats.
    """
    ours = F.log_softmax(logits.float(), dim=-1)
    theirs = F.log_softmax(reference.detach().float(), dim=-1)
    return F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)


class EndToEndTrainer(Trainer):
    """`Trainer` for a `SaeForCausalLM` whose hidden states are replaced by their reconstruction while it trains.

        loss = divergence_weight * KL(base || reconstructed) + the model's own loss

    The model's own loss is what its `loss_weights` say, of the reconstructed run: `lm` for cross-entropy (give
    labels), `reconstruction`, `sparsity`, `conditioning`. "Identifying functionally important features with end-to-end
    sparse dictionary learning" (https://huggingface.co/papers/2405.12241): its e2e loss is divergence and sparsity.

    Args:
        divergence_weight: 0 saves the second forward pass.
    """

    model: Any

    def __init__(self, *args: Any, divergence_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.divergence_weight = divergence_weight

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self.model.lm.eval()  # its dropout would count as the SAE's doing
        options = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        replaced = Steering(reconstruct=tuple(range(len(self.model.saes))))
        outputs = model(**inputs, **options, steering=replaced)
        loss = outputs.loss if outputs.loss is not None else outputs.logits.new_zeros(())
        if self.divergence_weight:
            given = {name: value for name, value in inputs.items() if name not in LABELS}
            with torch.no_grad():
                reference = model(**given, steering=False).logits
            counted = _counted(inputs, reference)
            divergence = next_token_divergence(outputs.logits[counted], reference[counted]).sum()
            # Trainer adds micro-batches up: each gives its share of the tokens of all.
            share = counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = loss + self.divergence_weight * divergence / share
        return (loss, outputs) if return_outputs else loss


def _counted(inputs: dict[str, Any], logits: Tensor) -> Tensor:
    """Tokens with an LM label, or all real tokens where there are no labels, (batch, seq) bool."""
    if inputs.get("labels") is not None:
        return inputs["labels"] != -100
    if inputs.get("attention_mask") is not None:
        return inputs["attention_mask"].bool()
    return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
