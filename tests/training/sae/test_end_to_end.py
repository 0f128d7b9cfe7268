"""Training by the divergence of next-token distributions, against a naive model with the SAE written out."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from sae_transformers import SaeForCausalLM
from sae_transformers.training.sae.end_to_end import EndToEndTrainer, next_token_divergence
from tests.tiny import VOCAB, tiny_base, tiny_sae


def texts(count: int = 8, length: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (count, length), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, -100, ids)
    return [{"input_ids": i, "labels": one} for i, one in zip(ids, labels, strict=True)]


def new_trainer(tmp_path, batch: int = 8, accumulation: int = 1, **options) -> EndToEndTrainer:
    base = tiny_base("gpt2", seed=0)
    model = SaeForCausalLM.from_base(base, [tiny_sae(seed=1, layer=0)], loss_weights={"lm": 0.0})
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    return EndToEndTrainer(model=model, args=args, train_dataset=texts(), **options)  # pyright: ignore


def test_divergence_is_zero_of_the_same_and_known_of_a_coin():
    logits = torch.randn(3, 4, dtype=torch.double)
    assert next_token_divergence(logits, logits + 5).abs().max() < 1e-6
    fair, biased = torch.tensor([0.0, 0.0]), torch.tensor([0.75, 0.25]).log()
    expected = 0.5 * torch.tensor(0.5 / 0.75).log() + 0.5 * torch.tensor(0.5 / 0.25).log()
    torch.testing.assert_close(next_token_divergence(biased, fair), expected)


def test_loss_and_gradient_are_those_of_the_model_written_out(tmp_path):
    trainer = new_trainer(tmp_path)
    model = trainer.model
    batch = {name: torch.stack([row[name] for row in texts()]) for name in ("input_ids", "labels")}
    model.train()
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    sae, found = model.saes[0], {name: p.grad.clone() for name, p in model.saes[0].named_parameters()}
    sae.zero_grad()
    model.eval()

    reference = model.lm(batch["input_ids"]).logits
    block = model.lm.transformer.h[0]
    replace = block.register_forward_hook(
        lambda module, args, output: (
            (sae(output[0]).reconstruction, *output[1:]) if isinstance(output, tuple) else sae(output).reconstruction
        )
    )
    logits = model.lm(batch["input_ids"]).logits
    replace.remove()
    p, q = reference.detach().softmax(-1), logits.softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1)
    expected = kl[batch["labels"] != -100].mean()
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-7)
    assert set(found) == {name for name, _ in sae.named_parameters()}
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_accumulated_batches_equal_one(tmp_path):
    saes = []
    for number, (batch, accumulation) in enumerate(((8, 1), (2, 4))):
        trainer = new_trainer(tmp_path / str(number), batch, accumulation)
        trainer.train()
        saes.append(trainer.model.saes[0])
    for (name, one), other in zip(saes[0].named_parameters(), saes[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)
