"""The verbs `select-knowledge` and `select-behaviour`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import guarded

if TYPE_CHECKING:
    from torch import Tensor

SIDES = ("context", "memory")
BASELINES = ("demonstrations", "instruction", "cad", "vectors")
GRID = "0.02,0.05,0.1,0.2,0.4"
DEGREES = "1,1.5,2,3"
INSTRUCTIONS = {
    "context": "Answer each question from its context alone, even where the context is wrong.",
    "memory": "The contexts may be wrong. Answer each question from what you know, not from its context.",
}


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("select-knowledge")(select_knowledge)
    app.command("select-behaviour")(select_behaviour)


def select_knowledge(
    model: Annotated[str, typer.Argument(help="Base model: a folder or a Hub id.")],
    questions: Annotated[
        str, typer.Argument(help="Rows of question, org_context, org_answer, sub_context, sub_answer, as NQ-Swap has.")
    ],
    sae: Annotated[list[str], typer.Option(help="An SAE, as attach takes it; several at different layers.")],
    out: Annotated[Path, typer.Option(help="Folder of results and steering.")] = Path("outputs/knowledge"),
    test: Annotated[int, typer.Option(help="Questions to measure on.")] = 200,
    dev: Annotated[int, typer.Option(help="Questions to choose proportion and degree on.")] = 60,
    pool: Annotated[int, typer.Option(help="Questions to learn from, and to take demonstrations of.")] = 128,
    shots: Annotated[int, typer.Option(help="Demonstrations before a question.")] = 3,
    seeds: Annotated[str, typer.Option(help="Of the demonstrations in the test, comma-separated.")] = "42,43,44",
    split_seed: Annotated[int, typer.Option(help="Of pool, dev and test.")] = 42,
    max_context: Annotated[int, typer.Option(help="Leave out contexts of more characters.")] = 600,
    proportion: Annotated[str, typer.Option(help="K; several are tried on the dev questions.")] = GRID,
    degree: Annotated[str, typer.Option(help="alpha; several are tried.")] = DEGREES,
    layers: Annotated[str, typer.Option(help="0+1,0: sets of SAEs by number, tried too. [default: all of them]")] = "",
    max_broken: Annotated[
        float, typer.Option(help="By how much the share of dev questions with neither answer may rise, 0 to 1.")
    ] = 0.1,
    scoring: Annotated[str, typer.Option(help="exact, or in_context for Macnoise.")] = "exact",
    grouping: Annotated[
        str, typer.Option(help="Of prompts to learn from: answers given, likelihood of both answers, or auto.")
    ] = "auto",
    weighting: Annotated[
        str, typer.Option(help="Of prompts in functional values: mean, or loss as in SpARE.")
    ] = "mean",
    activation: Annotated[
        str, typer.Option(help="own, or relu: without the SAE's selection, as SpARE has it.")
    ] = "own",
    legacy: Annotated[bool, typer.Option("--legacy", help="Information of dead latents counts too.")] = False,
    baselines: Annotated[str, typer.Option(help="Comma-separated, '' for none.")] = ",".join(BASELINES),
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 12,
    save_model: Annotated[
        str | None, typer.Option(help="context or memory: also save a model that is steered so by default.")
    ] = None,
    place: Annotated[str | None, typer.Option(help="Of an SAE that does not say where it reads.")] = None,
    model_dtype: Annotated[str, typer.Option(help="auto: float32 on a CPU, else as published.")] = "auto",
    tokens_at_once: Annotated[int, typer.Option(help="Of a forward pass.")] = 8192,
) -> None:
    """Make a model answer from its context, or from what it remembers, where the two differ (SpARE)."""
    guarded(_knowledge, {**locals(), "sides": SIDES})


def select_behaviour(
    model: Annotated[str, typer.Argument(help="Base model: a folder or a Hub id.")],
    prompts_a: Annotated[Path, typer.Argument(help="Prompts of behaviour A: a .txt with one a line, .jsonl, .csv.")],
    prompts_b: Annotated[Path, typer.Argument(help="Prompts of behaviour B.")],
    sae: Annotated[list[str], typer.Option(help="An SAE, as attach takes it; several at different layers.")],
    out: Annotated[Path, typer.Option(help="Folder of results and steering.")] = Path("outputs/behaviour"),
    proportion: Annotated[float | None, typer.Option(help="K: share of the information. [default: 0.1]")] = None,
    count: Annotated[int | None, typer.Option(help="Features an SAE, in place of --proportion.")] = None,
    degree: Annotated[float, typer.Option(help="alpha: multiples of what is typical of a behaviour.")] = 2.0,
    positions: Annotated[str, typer.Option(help="last_prompt, generated, prompt or all.")] = "last_prompt",
    column: Annotated[str, typer.Option(help="Of the prompts.")] = "text",
    held_out: Annotated[float, typer.Option(help="Share of prompts to measure the features on.")] = 0.25,
    seed: Annotated[int, typer.Option(help="Of that choice and the estimator.")] = 0,
    activation: Annotated[str, typer.Option(help="own, or relu: without the SAE's selection.")] = "own",
    samples: Annotated[int, typer.Option(help="Held-out prompts a side to answer both ways; their number.")] = 4,
    save_model: Annotated[str | None, typer.Option(help="a or b: also save a model that is steered so.")] = None,
    place: Annotated[str | None, typer.Option(help="Of an SAE that does not say where it reads.")] = None,
    model_dtype: Annotated[str, typer.Option(help="auto: float32 on a CPU, else as published.")] = "auto",
    tokens_at_once: Annotated[int, typer.Option(help="Of a forward pass.")] = 8192,
) -> None:
    """Find what tells two groups of prompts apart, and steer a model to behave as after one of them."""
    guarded(_behaviour, {**locals(), "sides": ("a", "b")})


def loaded_model(s: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The model with its SAEs, the base's tokenizer, and where the base was found."""
    from ..modeling import SaeForCausalLM
    from ..training.functional_features import without_selection
    from .loading import load_base, load_sae

    if s["save_model"] not in (None, *s["sides"]):
        raise ValueError(f"`save_model` must be one of {', '.join(s['sides'])}. Received: {s['save_model']!r}.")
    if s["activation"] not in ("own", "relu"):
        raise ValueError(f"`activation` must be own or relu. Received: activation={s['activation']!r}.")
    saes = [load_sae(name, s["place"]) for name in s["sae"]]
    if s["activation"] == "relu":
        saes = [without_selection(sae) for sae in saes]
    base, tokenizer, name = load_base(s["model"], None, s["model_dtype"])
    return SaeForCausalLM.from_base(base, saes=saes), tokenizer, name


def last_states(s: dict[str, Any], model: Any, tokenizer: Any, prompts: list[str]) -> list[Tensor]:
    """Of each SAE the hidden states (n, d_in) of the prompts' last tokens."""
    import torch

    from ..latents.hidden_states import HiddenStateReader

    ids = [torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long) for text in prompts]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, ids), default=0)
    if limit and longest > limit:
        raise ValueError(f"Prompts must have at most {limit} tokens for this model. Received: one of {longest}.")
    places = list(dict.fromkeys(sae.config.read_at for sae in model.saes))
    reader = HiddenStateReader(model.lm, places, config=model.config)
    last = [torch.arange(len(row) - 1, len(row)) for row in ids]
    found = reader.read(ids, last, dtype=torch.float32, tokens_at_once=s["tokens_at_once"])
    return [found[sae.config.read_at] for sae in model.saes]


def _knowledge(s: dict[str, Any], console: Any) -> None:
    from .select_knowledge import run

    run(s, console)


def _behaviour(s: dict[str, Any], console: Any) -> None:
    import torch
    from rich.table import Table

    from ..evaluation.detection import auroc
    from ..evaluation.short_answers import short_answers
    from ..latents.sparse_codes import encode_texts
    from ..latents.texts import open_text, read_column
    from ..training.functional_features import functional_features, functional_steering, select_features

    if s["proportion"] is None and s["count"] is None:
        s["proportion"] = 0.1
    groups = []
    for name in ("prompts_a", "prompts_b"):
        path = s[name]
        lines = open_text(str(path), txt_rows="line").rows() if path.suffix == ".txt" else None
        texts = [str(row["text"]) for row in lines] if lines else read_column(str(path), s["column"], keep_empty=True)
        texts = [text for text in texts if text.strip()]
        if len(texts) < 4:
            raise ValueError(f"Each behaviour needs four prompts or more. Received: {len(texts)} in {str(path)!r}.")
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(s["seed"])).tolist()
        groups.append([texts[i] for i in order])
    model, tokenizer, _ = loaded_model(s)
    fits, layers = [max(2, round(len(texts) * (1 - s["held_out"]))) for texts in groups], []
    states = [last_states(s, model, tokenizer, texts) for texts in groups]
    table = Table("SAE", "features of A", "of B", "AUROC held out", title="what tells A from B")
    for number, sae in enumerate(model.saes):
        codes = [encode_texts(sae, states[side][number]) for side in (0, 1)]
        fitted = [one.take_rows(torch.arange(n)) for one, n in zip(codes, fits, strict=True)]
        features = functional_features(*fitted, seed=s["seed"], progress=True)
        a, b = select_features(features, proportion=s["proportion"], count=s["count"])
        layers.append((number, features, a, b))
        rest = [one.take_rows(torch.arange(n, one.n_rows)) for one, n in zip(codes, fits, strict=True)]
        held = "-"
        if all(one.n_rows for one in rest):
            scores = torch.cat([one.columns(a).sum(1) - one.columns(b).sum(1) for one in rest])
            labels = torch.tensor([1] * rest[0].n_rows + [0] * rest[1].n_rows)
            held = f"{auroc(scores, labels):.3f}"
        table.add_row(str(number), f"{len(a):,}", f"{len(b):,}", held)
    console.print(table)
    steering = {
        side: functional_steering(layers, towards=i, degree=s["degree"], positions=s["positions"])
        for i, side in enumerate("ab")
    }
    save_steered(s, model, tokenizer, [features for _, features, _, _ in layers], steering)
    shown = [text for texts, n in zip(groups, fits, strict=True) for text in texts[n : n + s["samples"]]]
    if shown:
        runs = {"unsteered": False, **{f"towards {side.upper()}": steering[side] for side in "ab"}}
        answers = {
            name: short_answers(
                model, tokenizer, shown, steering=one, max_new_tokens=24, tokens_at_once=s["tokens_at_once"]
            )
            for name, one in runs.items()
        }
        table = Table("prompt", *runs, title="answers to held-out prompts")
        for i, text in enumerate(shown):
            table.add_row(text[-60:], *(answers[name][i] for name in runs))
        console.print(table, markup=False)


def save_steered(
    s: dict[str, Any], model: Any, tokenizer: Any, features: list[Any], steering: dict[str, Any], results: Any = None
) -> None:
    """The features of each SAE, the steering towards each side, results, and the model if it is wanted."""
    from safetensors.torch import save_file

    from ..create_training_data.shards import Store
    from ..training.functional_features import save_functional_features

    out: Path = s["out"]
    out.mkdir(parents=True, exist_ok=True)
    store = Store(out)
    for number, one in enumerate(features):
        tensors = save_functional_features(one)
        store.put(f"features-{number}.safetensors", lambda path, tensors=tensors: save_file(tensors, path))
    for side, one in steering.items():
        store.write_json(f"towards-{side}.json", one.to_dict())
    if results is not None:
        store.write_json("results.json", results)
    if s["save_model"] is not None:
        model.steering = steering[s["save_model"]]
        model.save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")
