"""`attach` and `convert`: from a published SAE to a model or to another format, by one command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline
from typer.testing import CliRunner

from sae_transformers import SaeForCausalLM, SparseAutoencoder
from sae_transformers.cli import app
from sae_transformers.modeling.conversion.export import export, format_of, targets
from sae_transformers.modeling.conversion.names.releases import find_sae, releases
from tests.create_training_data.words import word_tokenizer
from tests.modeling.conversion.families import FAMILIES, W_DEC, D
from tests.tiny import prompt, tiny_base, tiny_sae


def run(*arguments: object):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder of the width of the checkpoints."""
    folder = tmp_path / "gpt2"  # the name that the SAELens checkpoint says it was made for
    tiny_base(hidden_size=D).save_pretrained(folder)
    return folder


# -- attach ----------------------------------------------------------------------------------------------------------


def test_attach_writes_a_model_that_loads_without_the_weights_of_the_base(base, tmp_path):
    sae = FAMILIES["saelens"](tmp_path / "sae")
    result = run("attach", "--base", base, "--sae", sae, "--out", tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert "jumprelu, 12 -> 40, reads layers.1.resid_post, for gpt2" in result.output
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "modeling_sae_causal_lm.py"} <= files
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 3 * 4 * W_DEC.numel()
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    lm = AutoModelForCausalLM.from_pretrained(base)
    ids = prompt() % 90
    assert torch.equal(model(ids).logits, lm(ids).logits)
    assert torch.equal(model.saes[0].W_dec, W_DEC)
    hidden = lm.model(ids, output_hidden_states=True).hidden_states[2]
    features = model(ids, output_features=True).sae_features[0].to_dense()
    torch.testing.assert_close(features, SparseAutoencoder.from_pretrained(sae).encode(hidden))


def test_attach_and_convert_fold_decoder_norms_and_say_which_latents_the_maxima_are_of(base, tmp_path):
    tiny_sae(layer=1, d_in=D).save_pretrained(tmp_path / "sae")
    given = ["attach", "--base", base, "--sae", tmp_path / "sae", "--out", tmp_path / "model"]
    assert "of latents as stored" in " ".join(run(*given).output.split())
    folded = run(*given, "--fold-decoder-norm")
    assert folded.exit_code == 0, folded.output
    assert "as on Neuronpedia" in folded.output and "decoder norms folded" in folded.output
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    torch.testing.assert_close(model.saes[0].W_dec.norm(dim=-1), torch.ones(64))
    assert run("convert", tmp_path / "sae", tmp_path / "copy", "--fold-decoder-norm").exit_code == 0
    assert torch.equal(SparseAutoencoder.from_pretrained(tmp_path / "copy").W_dec, model.saes[0].W_dec)


def test_attach_several_to_a_classifier(base, tmp_path):
    first = FAMILIES["saelens"](tmp_path / "one")
    second = FAMILIES["dictionary_learning"](tmp_path / "two")
    result = run(
        "attach", "--base", base, "--sae", first, "--sae", second, "--head", "sequence-classification",
        "--out", tmp_path / "model", "--place", "layers.2.mlp_out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    with pytest.warns(UserWarning, match="no trained head"):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert [entry.read_at for entry in model.config.sae_configs] == ["layers.2.mlp_out"] * 2


def test_attach_to_a_trained_classifier_keeps_its_head(base, tmp_path):
    """The head is not in the repository but in the base's own; it is neither new nor told to be."""
    torch.manual_seed(3)
    labels: Any = {"id2label": {0: "bad", 1: "fine", 2: "good"}, "label2id": {"bad": 0, "fine": 1, "good": 2}}
    trained: Any = AutoModelForSequenceClassification.from_pretrained(base, **labels)
    trained.save_pretrained(tmp_path / "classifier")
    sae = FAMILIES["saelens"](tmp_path / "sae")
    given = ["--sae", sae, "--head", "sequence-classification", "--place", "layers.2.mlp_out"]
    result = run("attach", "--base", tmp_path / "classifier", *given, "--out", tmp_path / "model", "--force")
    assert result.exit_code == 0, result.output
    model: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert torch.equal(model.lm.score.weight, trained.score.weight) and model.config.id2label == labels["id2label"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give --sae"),
        (["--sae", "nowhere/at-all"], "nowhere/at-all"),
        (["--sae", "gemma-scope-2b-pt-res/77/16k"], "has no layer '77'; it has 0-25"),
        (["--sae", "SAE", "--base", "BASE", "--head", "chat"], "head='chat'"),
        (["--sae", "SAE", "--base", "OTHER"], "made for 'gpt2'"),
        (["--sae", "SAE", "--base", "BASE", "--place", "layers.9.resid_post"], r"layer=9"),
    ],
)
def test_attach_says_what_is_wrong(base, tmp_path, arguments, message, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the variable was read long ago
    other = shutil.copytree(base, tmp_path / "llama")
    names = {"SAE": FAMILIES["saelens"](tmp_path / "sae"), "BASE": base, "OTHER": other}
    result = run("attach", *(names.get(word, word) for word in arguments), "--out", tmp_path / "model")
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output
    assert not (tmp_path / "model").exists()


def test_a_base_of_another_name_is_taken_by_force(base, tmp_path):
    other = shutil.copytree(base, tmp_path / "llama")
    sae = FAMILIES["saelens"](tmp_path / "sae")
    assert run("attach", "--base", other, "--sae", sae, "--force", "--out", tmp_path / "m").exit_code == 0


def test_the_list_works_offline_and_narrows(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run("attach", "--list", "--sae", "gemma-scope-2-270m")
    assert result.exit_code == 0
    assert "google/gemma-3-270m" in result.output and "CC-BY-4.0" in result.output
    assert "llama" not in result.output
    assert "No release" in run("attach", "--list", "--sae", "no-such-release").output


def test_attach_writes_the_tokenizer_of_the_base_for_pipelines(base, tmp_path):
    word_tokenizer().save_pretrained(base)
    sae = FAMILIES["saelens"](tmp_path / "sae")
    result = run("attach", "--base", base, "--sae", sae, "--out", tmp_path / "model")
    assert result.exit_code == 0 and "Warning" not in result.output, result.output
    made = pipeline("text-generation", str(tmp_path / "model"), trust_remote_code=True)
    plain = pipeline("text-generation", str(base))
    options = {"max_new_tokens": 5, "do_sample": False, "return_tensors": True}
    found = made("w1 w2 w3", **options)[0]["generated_token_ids"]
    assert found[:3] == [5, 6, 7] and found == plain("w1 w2 w3", **options)[0]["generated_token_ids"]


def test_attach_goes_on_without_a_tokenizer_and_says_so(base, tmp_path):
    sae = FAMILIES["saelens"](tmp_path / "sae")
    result = run("attach", "--base", base, "--sae", sae, "--out", tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert f"The tokenizer of the base could not be read, so {str(tmp_path / 'model')!r} has none" in result.output
    assert f"Received: base={str(base)!r}: " in result.output and (tmp_path / "model" / "config.json").is_file()


def test_a_base_by_a_relative_path_is_found_from_any_folder(base, tmp_path, monkeypatch):
    sae = FAMILIES["saelens"](tmp_path / "sae")
    monkeypatch.chdir(tmp_path)
    assert run("attach", "--base", "gpt2", "--sae", sae, "--out", "model").exit_code == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    for one in ("gpt2", AutoModelForCausalLM.from_pretrained("gpt2")):
        model = SaeForCausalLM.from_base(one, saes=[SparseAutoencoder.from_pretrained(sae)])
        assert model.config.base_model_name_or_path == str(base)


def test_the_list_has_every_name_whole_on_a_narrow_terminal():
    lines = CliRunner().invoke(app, ["attach", "--list"], env={"COLUMNS": "40"}).output.splitlines()
    assert [line for line in lines[:-2] if not line.startswith("    ")] == [one.pattern for one in releases().values()]
    assert lines[-2] == f"{len(releases())} releases"
    gemma = lines.index("gemma-scope-2-270m-pt/{site}/{layer}/{width}/{l0}")
    assert lines[gemma + 1] == "    google/gemma-3-270m, CC-BY-4.0"
    assert lines[gemma + 2].startswith("    site attn_out, ") and "; width 16k, " in lines[gemma + 2]


# -- releases --------------------------------------------------------------------------------------------------------


def test_short_names():
    named = find_sae("gemma-scope-2-270m-pt/resid_post/12/16k/medium")
    assert named is not None
    assert named.repository == "google/gemma-scope-2-270m-pt"
    assert named.sae_id == "resid_post/layer_12_width_16k_l0_medium"
    assert named.base == "google/gemma-3-270m"
    # SAELens' canonical choice for this layer and width.
    canonical = find_sae("gemma-scope-9b-pt-res/23/131k")
    assert canonical is not None and canonical.sae_id == "layer_23/width_131k/average_l0_101"
    assert find_sae("google/gemma-2-2b") is None
    theirs = find_sae("selfreg-mistral-7b-toxic-detect")
    assert theirs is not None and theirs.repository == "wuxs/Mistral_TopK_SAE_l16_FT_ToxicDetect" and not theirs.sae_id


@pytest.mark.parametrize("name", releases())
def test_every_release_names_an_sae(name):
    release, chosen = releases()[name], []
    for _ in release.placeholders:
        chosen.append(release.choices(chosen)[0])
    found = find_sae("/".join([name, *chosen]))
    assert found is not None and "{" not in found.sae_id and found.repository.count("/") == 1
    assert release.summary() or not release.placeholders
    with pytest.raises(ValueError, match=name):
        find_sae("/".join([name, *chosen, "more"]))


# -- convert ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["sae_transformers", "saelens", "sparsify", "dictionary_learning"])
def test_convert_writes_any_writable_format(tmp_path, to):
    source = FAMILIES["sparsify"](tmp_path / "in")
    result = run("convert", source, tmp_path / "out", "--to", to)
    assert result.exit_code == 0, result.output
    assert "sparsify: topk (k=4), 12 -> 40, reads layers.1.resid_post" in result.output
    assert float(result.output.split()[-1].rstrip(".")) < 1e-6
    assert format_of(tmp_path / "out") == to
    copy, original = (SparseAutoencoder.from_pretrained(f) for f in (tmp_path / "out", source))
    assert torch.equal(copy.W_enc, original.W_enc) and copy.config.k == 4


def test_convert_again_over_the_same_format_only(tmp_path):
    source = FAMILIES["sparsify"](tmp_path / "in")
    for _ in range(2):
        assert run("convert", source, tmp_path / "out", "--to", "saelens").exit_code == 0
    result = run("convert", source, tmp_path / "out", "--to", "sparsify")
    assert result.exit_code == 2 and "another format" in result.output


def test_convert_measures_on_a_real_model(base, tmp_path):
    source = FAMILIES["saelens"](tmp_path / "in")
    result = run("convert", source, tmp_path / "out", "--place", "layers.0.resid_post", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "Gaussian rows" in result.output
    assert SparseAutoencoder.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_an_export_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="to='gguf'"):
        export(tiny_sae(), tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()
    assert targets() == ["sae_transformers", "saelens", "sparsify", "dictionary_learning", "circuit-tracer"]
