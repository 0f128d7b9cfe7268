"""Loads repositories by their remote code alone and writes down what came out.

load_repositories.py JOB.json OUT: the job names repositories (folders or Hub ids), the inputs and the steering; OUT
receives `facts.json` and `tensors.safetensors`.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import blocked_library  # noqa: F401
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

TRUSTED = {"trust_remote_code": True}


def origin(thing) -> str:
    return type(thing).__module__.partition(".")[0] + ":" + type(thing).__name__


def refusal(repository: str, **options) -> str:
    try:
        AutoModelForCausalLM.from_pretrained(repository, **options)
    except ValueError as error:
        return str(error)
    return ""


def look_at_language_model(repository: str, job: dict, ids, out: Path, facts: dict, tensors: dict) -> None:
    options = {**TRUSTED, **job.get("options", {})}
    config = AutoConfig.from_pretrained(repository, **options)
    model: Any = AutoModelForCausalLM.from_pretrained(repository, **options)
    facts["classes"] = [origin(config), origin(model), origin(model.config), origin(model.steering)]
    facts["training"] = model.training
    facts["generation_config"] = model.generation_config.to_dict().get("sae_steering")
    tensors["logits"] = model(ids).logits
    # Steering: as an object of the loaded code, as JSON, as a dict; the default of the generation config; none.
    code = sys.modules[type(model.steering).__module__]
    edits = [code.FeatureEdit(**edit) for edit in job["steering"]["edits"]]
    given = {
        "object": code.Steering(edits), "dict": job["steering"], "json": json.dumps(job["steering"]), "none": False,
    }  # fmt: skip
    for name, steering in given.items():
        tensors[f"tokens_{name}"] = model.generate(ids, max_new_tokens=6, do_sample=False, steering=steering)
    tokenizer = AutoTokenizer.from_pretrained(repository, **options)
    for name, values in job.get("more", {}).items():
        steering = code.Steering.from_json(json.dumps(values)).with_tokenizer(tokenizer)
        tensors[f"tokens_{name}"] = model.generate(ids, max_new_tokens=6, do_sample=False, steering=steering)
    tensors["tokens_default"] = model.generate(ids, max_new_tokens=6, do_sample=False)
    tensors["features"] = model(ids, output_features=True).sae_features[0].to_dense()
    with torch.enable_grad():
        found = model(ids, output_features=True, features_require_grad=True, steering=False)
        values = found.sae_features[0].values
        (tensors["gradient"],) = torch.autograd.grad(found.logits[:, -1].square().sum(), values)
    tensors["detected"] = model.detect(ids, feature="good", pre_activations=True, skip_first=0).per_text
    tensors["hidden"] = AutoModel.from_pretrained(repository, **options)(ids).last_hidden_state
    with warnings.catch_warnings(record=True):  # a new head, which is told
        classifier = AutoModelForSequenceClassification.from_pretrained(repository, **options, num_labels=3)
    facts["new_head"] = list(classifier(ids).logits.shape)
    facts["from_config"] = list(AutoModelForCausalLM.from_config(config, **TRUSTED)(ids).logits.shape)
    text = tokenizer.decode(ids[0])
    hub = {k: v for k, v in job.get("options", {}).items() if k == "revision"}
    pipe = pipeline("text-generation", model=repository, **TRUSTED, **hub)
    facts["pipeline_class"] = origin(pipe.model)
    said = pipe(text, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    tensors["tokens_pipeline"] = tokenizer(said, return_tensors="pt", add_special_tokens=False).input_ids
    said = pipe(text, max_new_tokens=6, do_sample=False, return_full_text=False, steering=job["steering"])
    tensors["tokens_pipeline_steered"] = tokenizer(
        said[0]["generated_text"], return_tensors="pt", add_special_tokens=False
    ).input_ids
    again = out / "again" / facts["name"]
    model.save_pretrained(again)
    facts["files"] = sorted(path.name for path in again.iterdir())
    facts["auto_map"] = json.loads((again / "config.json").read_text())["auto_map"]
    facts["card"] = (again / "README.md").read_text()
    loaded_again = AutoModelForCausalLM.from_pretrained(str(again), **TRUSTED)
    tensors["logits_again"] = loaded_again(ids).logits
    tensors["hidden_again"] = AutoModel.from_pretrained(str(again), **TRUSTED)(ids).last_hidden_state
    if job.get("push_again"):
        model.push_to_hub(job["push_again"])
        pushed = AutoModelForCausalLM.from_pretrained(job["push_again"], **TRUSTED)
        tensors["logits_pushed"] = pushed(ids).logits
    facts["refused"] = refusal(repository, trust_remote_code=False)
    facts["refused_unasked"] = refusal(repository)


def look_at_classifier(repository: str, job: dict, ids, out: Path, facts: dict, tensors: dict) -> None:
    options = {**TRUSTED, **job.get("options", {})}
    model: Any = AutoModelForSequenceClassification.from_pretrained(repository, **options)
    facts["classes"] = [origin(model), origin(model.config)]
    facts["labels"] = [model.config.num_labels, model.config.id2label[1]]
    tensors["logits"] = model(ids).logits
    tensors["steered"] = model(ids, steering=job["steering"]).logits
    hub = {k: v for k, v in job.get("options", {}).items() if k == "revision"}
    pipe: Any = pipeline("text-classification", model=repository, **TRUSTED, **hub)
    facts["pipeline_class"] = origin(pipe.model)
    scores = pipe(pipe.tokenizer.decode(ids[0]), top_k=None)
    facts["scores"] = {entry["label"]: entry["score"] for entry in scores}
    again = out / "again" / facts["name"]
    model.save_pretrained(again)
    facts["files"] = sorted(path.name for path in again.iterdir())
    tensors["logits_again"] = AutoModelForSequenceClassification.from_pretrained(str(again), **TRUSTED)(ids).logits


@torch.no_grad()
def main() -> None:
    job, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    ids = load_file(job["inputs"])["ids"]
    facts, tensors = {}, {}
    for name, entry in job["repositories"].items():
        found, seen = {"name": name}, {}
        look = look_at_classifier if entry.get("classifier") else look_at_language_model
        look(entry["repository"], {**job, **entry}, ids, out, found, seen)
        facts[name] = found
        tensors.update({f"{name}.{key}": value.contiguous().clone() for key, value in seen.items()})
    facts["library_modules"] = [m for m in sys.modules if m.partition(".")[0] == "sae_transformers"]
    (out / "facts.json").write_text(json.dumps(facts))
    save_file(tensors, out / "tensors.safetensors")


if __name__ == "__main__":
    main()
