"""Interrupted and resumed training equals uninterrupted training, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from sae_transformers.training.sae.trainer import TRAINING_STATE
from tests.training.runs import D_SAE, PLACES, D, assert_same_state, new_sae, state_of, tokens, trained, trainer_for

AUX = {"aux_k": 6, "dead_after_tokens": 64}
SETTINGS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "topk and AuxK": ([{}], AUX),
    "layer norm, tied": ([{"normalization": "layer_norm", "tied": True}], {**AUX, "decoder_norm": "none"}),
    "scale from data": ([{"normalization": "scalar"}], {"weight_init": "kaiming", "bias_init": "geometric_median"}),
    "batch top-k": ([{"activation": "batch_topk"}], AUX),
    "two places and sizes": ([{}, {"layer": 1, "site": "mlp_out", "d_sae": 24}, {"activation": "relu"}], AUX),
    "k annealing": ([{}], {"k_start": 20, "k_anneal_steps": 15}),
    "jumprelu": (
        [{"activation": "jumprelu"}],
        {"sparsity_coefficient": 0.02, "sparsity_warmup_steps": 12, "jumprelu_bandwidth": 0.2},
    ),
    "gated": ([{"activation": "gated"}], {"sparsity_coefficient": 0.02}),
    "concepts": ([{"concepts": {"second": 3}}], {"concept_init": "diffmean", "ranking_weight": 0.3}),
    "Matryoshka": ([{}], {"matryoshka_prefixes": [8, 20, D_SAE]}),
    "fine-tuning": (
        [{}],
        {"finetune_dead": True, "weight_init": "keep", "bias_init": "keep", "learning_rate": 0.06},
    ),
    "accumulation": ([{}], {**AUX, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 40}),
    "schedule and clipping": ([{}], {"lr_scheduler_type": "cosine", "warmup_steps": 5, "max_grad_norm": 0.01}),
}


QUICK = {("topk and AuxK", 11), ("jumprelu", 11), ("Matryoshka", 11), ("fine-tuning", 3), (1, 9), (2, 4)}


def cases(*all_of_them: Any) -> list[Any]:
    """A few are tried each time, all with the slow tests."""
    return [pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow) for one in all_of_them]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = control.should_save = True


@pytest.mark.parametrize(
    ("name", "stop"),
    cases(
        *((name, 11) for name in SETTINGS), *((name, s) for name in ("topk and AuxK", "fine-tuning") for s in (3, 16))
    ),
)
def test_resumed_equals_uninterrupted(tmp_path, name, stop):
    """8 batches an epoch: inside the first, inside the second, at a border. 18 steps."""
    saes, settings = SETTINGS[name]
    data = tokens(labels=name == "concepts")
    settings = {**settings, "max_steps": 18}
    whole = trained([new_sae(i, **sae) for i, sae in enumerate(saes)], tmp_path / "whole", data, **settings)
    assert whole.state.global_step == 18 and whole.state.epoch is not None and whole.state.epoch > 2
    part = trained(
        [new_sae(i, **sae) for i, sae in enumerate(saes)],
        tmp_path / "part",
        data,
        callbacks=[StopAt(stop)],
        **settings,
    )
    assert part.state.global_step == stop
    # In a new process all would be new; the weights given do not matter, unless they are kept.
    resumed = trainer_for([new_sae(50 + i, **sae) for i, sae in enumerate(saes)], tmp_path / "part", data, **settings)
    torch.manual_seed(99)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 18
    assert_same_state(state_of(resumed), state_of(whole))


@pytest.mark.slow
def test_the_settings_above_exercise_what_they_name(tmp_path):
    """AuxK has dead latents, fine-tuning both sets, the threshold moves, the scale comes from data."""
    aux = trained(new_sae(), tmp_path, **AUX, max_steps=18, logging_strategy="steps", logging_steps=18)
    assert aux.state.log_history[0]["dead_share"] > 0 and aux.state.log_history[0]["aux"] > 0
    dead = trained(new_sae(), tmp_path, **SETTINGS["fine-tuning"][1], max_steps=2).model.saes[0].dead
    assert 0 < int(dead.sum()) < D_SAE
    assert trained(new_sae(activation="batch_topk"), tmp_path).saes[0].threshold > 0
    assert trained(new_sae(normalization="scalar"), tmp_path).saes[0].config.input_scale != 1.0
    thresholds = trained(new_sae(activation="jumprelu"), tmp_path, **SETTINGS["jumprelu"][1]).saes[0].threshold
    assert (thresholds != 1e-3).any() and (thresholds >= 0).all()


class Stream(IterableDataset):
    """Batches in order, as one epoch after another; knows its place."""

    widths, label_names = {PLACES[0]: D}, []

    def __init__(self) -> None:
        x = tokens().tensors[PLACES[0]]
        self.batches, self.position, self.given = x.split(64)[:7], 0, []

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for number in range(self.position, len(self.batches)):
            self.position += 1
            self.given.append(number)
            yield {PLACES[0]: self.batches[number]}
        self.position = 0


@pytest.mark.parametrize(("accumulation", "stop"), cases(*((n, stop) for n in (1, 2) for stop in (4, 9, 14))))
def test_a_stream_goes_on_where_it_stood(tmp_path, accumulation, stop):
    settings = {**AUX, "max_steps": 18, "gradient_accumulation_steps": accumulation}
    streams = [Stream(), Stream(), Stream()]
    whole = trained(new_sae(0), tmp_path / "whole", streams[0], **settings)
    trained(new_sae(0), tmp_path / "part", streams[1], callbacks=[StopAt(stop)], **settings)
    resumed = trainer_for(new_sae(5), tmp_path / "part", streams[2], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / f"checkpoint-{stop}"))
    assert resumed.state.global_step == whole.state.global_step == 18
    assert_same_state(state_of(resumed), state_of(whole))


def test_a_streams_sample_is_trained_on_too(tmp_path):
    stream = Stream()
    trained(new_sae(), tmp_path, stream, max_steps=3, init_tokens=128)
    assert stream.given == [0, 1, 0, 1, 2]


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match=f"no checkpoint to resume in '{tmp_path}'"):
        trainer_for(new_sae(), tmp_path).train(resume_from_checkpoint=True)
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    with pytest.raises(ValueError, match=f"checkpoint-7 is no checkpoint.*{TRAINING_STATE}"):
        trainer_for(new_sae(), tmp_path).train(resume_from_checkpoint=str(folder))


def test_a_checkpoint_of_other_saes_is_refused(tmp_path):
    trained(new_sae(), tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match=r"d_sae=40.*Received: one with d_sae=24"):
        trainer_for(new_sae(d_sae=24), tmp_path, max_steps=4).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="holds 1 SAEs.*Received: 2"):
        trainer_for([new_sae(), new_sae()], tmp_path, max_steps=4).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path):
    whole = trained(new_sae(), tmp_path / "whole", max_steps=6)
    trained(new_sae(), tmp_path / "part", max_steps=6, save_strategy="steps", save_steps=2)
    for step in (4, 6):  # as a process leaves them that is killed before the last file
        (tmp_path / "part" / f"checkpoint-{step}" / "trainer_state.json").unlink()
    resumed = trainer_for(new_sae(5), tmp_path / "part", max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    torch.testing.assert_close(resumed.saes[0].state_dict(), whole.saes[0].state_dict(), rtol=0, atol=0)
