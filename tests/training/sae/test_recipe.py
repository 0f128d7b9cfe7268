"""A run as a YAML file: what it says, what flags change, what is refused; and the shipped files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from sae_transformers import SparseAutoencoder
from sae_transformers.cli import app
from sae_transformers.training.sae.recipe import CONFIGS, Recipe, own_options, read_recipe
from sae_transformers.training.sae.run import run_recipe

PLACE = "layers.1.resid_post"


def write_store(folder: Path, *, labels: bool = False, n_tokens: int = 300, width: int = 8) -> Path:
    """A finished harvest, by hand: two shards."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    sizes = [n_tokens // 2, n_tokens - n_tokens // 2]
    for number, size in enumerate(sizes):
        tensors = {PLACE: torch.randn(size, width, generator=generator)}
        if labels:
            tensors["labels"] = (tensors[PLACE][:, :1] > 0).float()
        save_file(tensors, folder / f"shard-{number:06d}.safetensors")
    index = {
        "format": "sae_transformers hidden states",
        "version": 1,
        "places": {PLACE: width},
        "model": "someone/some-model",
        "labels": ["anger"] if labels else [],
    }
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "complete.json").write_text(json.dumps({"n_tokens": n_tokens, "shards": sizes}))
    return folder


def recipe_of(tmp_path: Path, **changes) -> Path:
    values = {
        "data": str(tmp_path / "data"),
        "sae": {"activation": "topk", "k": 2, "d_sae": 16, "layer": 1},
        "training": {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 4,
            "per_device_train_batch_size": 50,
            "learning_rate": "1e-2",  # YAML takes 1e-2 for a string
            "save_strategy": "no",
            "logging_steps": 2,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        },
        **changes,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_run_from_the_command_line_saves_what_loads(tmp_path):
    write_store(tmp_path / "data")
    config = recipe_of(tmp_path)
    done = CliRunner().invoke(app, ["train", "--config", str(config), "--d_sae", "24", "--max_steps=3"])
    assert done.exit_code == 0, done.output
    sae = SparseAutoencoder.from_pretrained(tmp_path / "out")
    assert (sae.config.d_sae, sae.config.k, sae.config.read_at) == (24, 2, PLACE)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["steps"] == 3 and metrics["l0"] <= 2 and "fvu" in metrics


def test_out_is_output_dir_as_in_the_other_verbs(tmp_path):
    write_store(tmp_path / "data")
    words = ["train", "--config", str(recipe_of(tmp_path)), "--out", str(tmp_path / "elsewhere")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "elsewhere" / "metrics.json").is_file() and not (tmp_path / "out").exists()


def test_several_saes_in_one_run(tmp_path):
    write_store(tmp_path / "data")
    sizes = [{"activation": "topk", "k": 2, "d_sae": n, "layer": 1} for n in (12, 20)]
    run_recipe(read_recipe(recipe_of(tmp_path, sae=sizes)))
    found = [SparseAutoencoder.from_pretrained(tmp_path / "out" / f"{PLACE}-{n}").config.d_sae for n in (0, 1)]
    assert found == [12, 20]


def test_finetuning_goes_on_with_a_saved_sae(tmp_path):
    write_store(tmp_path / "data")
    run_recipe(read_recipe(recipe_of(tmp_path)))
    before = SparseAutoencoder.from_pretrained(tmp_path / "out")
    words = ["--method", "finetune", "--start_from", str(tmp_path / "out"), "--output_dir", str(tmp_path / "tuned")]
    run_recipe(read_recipe(recipe_of(tmp_path), [*words, "--learning_rate", "1e-6"]))
    after = SparseAutoencoder.from_pretrained(tmp_path / "tuned")
    moved = (after.W_dec - before.W_dec).abs().max()
    assert 0 < moved < 1e-4  # it began where the other ended


def test_hidden_states_of_another_model_are_refused(tmp_path):
    write_store(tmp_path / "data")
    run_recipe(read_recipe(recipe_of(tmp_path)))
    assert SparseAutoencoder.from_pretrained(tmp_path / "out").config.metadata == {"base_model": "someone/some-model"}
    index = json.loads((tmp_path / "data" / "index.json").read_text())
    (tmp_path / "data" / "index.json").write_text(json.dumps({**index, "model": "another"}))
    words = ["--method", "finetune", "--start_from", str(tmp_path / "out"), "--output_dir", str(tmp_path / "tuned")]
    with pytest.raises(ValueError, match="'someone/some-model'.*Received: those of 'another'"):
        run_recipe(read_recipe(recipe_of(tmp_path), words))


def test_conditioning_needs_concepts_and_labels(tmp_path):
    write_store(tmp_path / "data")
    write_store(tmp_path / "labelled", labels=True)
    with pytest.raises(ValueError, match="concepts"):
        read_recipe(recipe_of(tmp_path), ["--method", "condition"])
    conditioned = ["--method", "condition", "--concepts", '{"anger": 3}']
    with pytest.raises(ValueError, match="without labels"):
        run_recipe(read_recipe(recipe_of(tmp_path), conditioned))
    run_recipe(read_recipe(recipe_of(tmp_path), [*conditioned, "--data", str(tmp_path / "labelled")]))
    assert SparseAutoencoder.from_pretrained(tmp_path / "out").config.concepts == {"anger": 3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lerning_rate", "1"], "did you mean learning_rate"),
        (["--method", "distill"], "method='distill'"),
        (["--method", "finetune"], "start_from"),
        (["stray"], "'stray'"),
        (["--max_steps", "many"], "many"),
        (["--k", "17"], "k=17"),
        (["--layer", "3"], r"layers\.3\.resid_post"),
        (["--reconstruction_loss", "huber"], "reconstruction_loss='huber'"),
    ],
)
def test_a_mistake_is_named(tmp_path, words, message):
    write_store(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        run_recipe(read_recipe(recipe_of(tmp_path), words))
    assert not (tmp_path / "out" / "config.json").exists()


def test_no_is_a_strategy_and_false_for_a_switch(tmp_path):
    recipe = read_recipe(recipe_of(tmp_path), ["--save_strategy", "no", "--bf16", "no", "--disable_tqdm", "yes"])
    arguments = recipe.make_arguments()
    assert (arguments.save_strategy, arguments.bf16, arguments.disable_tqdm) == ("no", False, True)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'nowhere.yaml'.*scar"):
        read_recipe("nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ValueError, match="no YAML"):
        read_recipe(broken)
    broken.write_text("speed: 3")
    with pytest.raises(ValueError, match="'speed'"):
        read_recipe(broken)
    result = CliRunner().invoke(app, ["train", "--config", "nowhere.yaml"])
    assert result.exit_code == 2 and result.output.count("\n") == 1


@pytest.mark.parametrize("name", sorted(file.stem for file in CONFIGS.glob("*.yaml")))
def test_every_shipped_file_makes_a_run(name):
    recipe = read_recipe(name, ["--bf16", "false", "--use_cpu", "true"])
    args = recipe.make_arguments()
    assert args.learning_rate >= 0
    for settings in recipe.sae:
        assert settings["d_sae"] > 0


def test_the_papers_settings():
    pretrain, scar = read_recipe("selfreg-pretrain"), read_recipe("scar")
    args = read_recipe("selfreg-pretrain", ["--bf16", "false"]).make_arguments()
    assert pretrain.sae[0]["d_sae"] == 65536 and pretrain.sae[0]["tied"] and pretrain.sae[0]["layer"] == 15
    assert [args.k_at(step, 20) for step in (1, 312, 622, 700)] == [199, 110, 20, 20]
    assert (args.learning_rate, args.adam_epsilon, args.weight_decay) == (1e-3, 6.25e-10, 0.0)
    assert (args.aux_k, args.sparsity_coefficient) == (0, 0.0)
    tune = read_recipe("selfreg-finetune", ["--bf16", "false"]).make_arguments()
    assert tune.finetune_dead and tune.dead_residual_weight == 0.1 and tune.learning_rate == 5e-5
    assert (scar.sae[0]["d_sae"], scar.sae[0]["k"], scar.sae[0]["site"]) == (24576, 2048, "mlp_out")
    args = scar.make_arguments()
    assert (args.learning_rate, args.max_grad_norm, args.per_device_train_batch_size) == (1e-5, 1.0, 2048)


def test_every_own_option_says_what_it_is():
    options = own_options()
    assert {"aux_k", "k_anneal_steps", "window_tokens"} <= {name for name, _, _ in options}
    assert all(len(meaning) > 10 for _, _, meaning in options)


def test_a_recipe_without_data_says_so(tmp_path):
    with pytest.raises(ValueError, match="names no `data`"):
        run_recipe(Recipe(sae=[{"d_sae": 8, "layer": 1}], training={"output_dir": str(tmp_path)}))
