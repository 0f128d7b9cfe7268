"""Settings of a training run: the schedules, and errors that name the value."""

from __future__ import annotations

from typing import Any

import pytest

from sae_transformers import SparseAutoencoder, SparseAutoencoderConfig
from sae_transformers.training.sae.arguments import SaeLossArguments, SaeTrainingArguments
from sae_transformers.training.sae.objective import SaeObjective


def test_k_falls_as_selfreg_has_it():
    """T = int(640000 / 512 * 0.5) = 625 steps from 200 to 20."""
    args = SaeLossArguments(k_start=200, k_anneal_steps=625)
    ks = [args.k_at(step, 20) for step in range(1, 2000)]
    assert (ks[0], ks[311], ks[621]) == (199, 110, 20)
    assert ks[620] == 21 and set(ks[621:]) == {20}
    assert ks == sorted(ks, reverse=True) and ks == [max(20, int(200 - 180 * s / 625)) for s in range(1, 2000)]


def test_k_is_the_saes_own_without_annealing():
    assert {SaeLossArguments().k_at(step, 20) for step in (0, 1, 10**6)} == {20}


def objective(**settings: Any) -> SaeObjective:
    sae = {name: settings.pop(name) for name in ("activation", "k") if name in settings}
    config = SparseAutoencoderConfig(**{"d_in": 4, "d_sae": 8, "activation": "topk", "k": 2, **sae})
    args = SaeLossArguments(**settings)
    args.check()
    return SaeObjective([SparseAutoencoder(config)], args)


@pytest.mark.parametrize(
    ("settings", "received"),
    [
        ({"reconstruction_loss": "huber"}, "reconstruction_loss='huber'"),
        ({"sparsity_coefficient": -0.1}, "sparsity_coefficient=-0.1"),
        ({"aux_coefficient": float("nan")}, "aux_coefficient=nan"),
        ({"pos_weight": float("inf")}, "pos_weight=inf"),
        ({"dead_after_tokens": -5}, "dead_after_tokens=-5"),
        ({"k_start": 8}, "k_start=8, k_anneal_steps=0"),
        ({"k_anneal_steps": 9}, "k_start=0, k_anneal_steps=9"),
        ({"k_start": 1, "k_anneal_steps": 5}, "k_start=1, activation='topk', k=2"),
        ({"k_start": 9, "k_anneal_steps": 5}, "k_start=9"),
        ({"k_start": 4, "k_anneal_steps": 5, "activation": "relu", "k": None}, "activation='relu'"),
        ({"k_start": 4, "k_anneal_steps": 5, "activation": "relu", "k": 2}, "activation='relu'"),
        ({"matryoshka_prefixes": [4, 2, 8]}, r"matryoshka_prefixes=\[4, 2, 8\]"),
        ({"matryoshka_prefixes": [2, 2, 8]}, r"matryoshka_prefixes=\[2, 2, 8\]"),
        ({"matryoshka_prefixes": [0, 8]}, r"matryoshka_prefixes=\[0, 8\]"),
        ({"matryoshka_prefixes": [2, 4]}, r"d_sae=8.*matryoshka_prefixes=\[2, 4\]"),
        ({"matryoshka_prefixes": [2, 16]}, r"matryoshka_prefixes=\[2, 16\]"),
        ({"finetune_dead": True, "activation": "jumprelu", "k": None}, "activation='jumprelu'"),
        ({"finetune_dead": True, "activation": "relu", "k": 2}, "activation='relu'"),
        ({"activation": "batch_topk", "k": None}, "k=None"),
        ({"k": 9}, "k=9"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(settings, received):
    with pytest.raises(ValueError, match=received):
        objective(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"k_start": 8, "k_anneal_steps": 5},
        {"k_start": 2, "k_anneal_steps": 5},
        {"k_start": 8, "k_anneal_steps": 5, "activation": "batch_topk"},
        {"matryoshka_prefixes": [8]},
        {"matryoshka_prefixes": [1, 8]},
        {"matryoshka_prefixes": None},
        {"finetune_dead": True, "activation": "topk-sigmoid"},
    ],
)
def test_a_setting_at_its_bound_is_accepted(settings):
    assert objective(**settings).saes[0].k == settings.get("k_start", 2)  # step 0


@pytest.mark.parametrize(
    ("settings", "received"),
    [
        ({"weight_init": "xavier"}, "weight_init='xavier'"),
        ({"bias_init": "median"}, "bias_init='median'"),
        ({"concept_init": "probe"}, "concept_init='probe'"),
        ({"decoder_norm": "one"}, "decoder_norm='one'"),
        ({"init_tokens": 0}, "init_tokens=0"),
        ({"window_tokens": 0}, "window_tokens=0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0"),
        ({"outlier_norm_limit": -1.0}, "outlier_norm_limit=-1.0"),
        ({"outlier_norm_limit": float("nan")}, "outlier_norm_limit=nan"),
        ({"learning_rate": -1e-3}, "learning_rate=-0.001"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"k_start": 3}, "k_start=3"),
    ],
)
def test_a_training_argument_that_makes_no_sense_is_refused(tmp_path, settings, received):
    with pytest.raises(ValueError, match=received):
        SaeTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)


def test_defaults_differ_from_the_parents_as_the_docstring_says(tmp_path):
    args = SaeTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert (args.per_device_train_batch_size, args.dataloader_drop_last, args.weight_decay) == (4096, True, 0.0)
    assert not args.remove_unused_columns
    assert SaeTrainingArguments(**{"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}).to_dict()
