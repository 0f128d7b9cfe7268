"""The verb `classify`."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import guarded

if TYPE_CHECKING:
    from torch import Tensor

PAPER_SEEDS = "14592,3278,36048,32098,29256,18289"  # SelfReg's (https://huggingface.co/papers/2502.14133)
COLUMNS = ("accuracy", "f1", "auroc", "ece", "delta_logit", "delta_in_std", "flips", "reliance")


_data = partial(typer.Option, rich_help_panel="Data")
_features = partial(typer.Option, rich_help_panel="Unintended features")
_heads = partial(typer.Option, rich_help_panel="Heads")
_tuning = partial(typer.Option, rich_help_panel="Tuning the base")


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(classify)


def classify(
    model: Annotated[str, typer.Argument(help="Base model: a folder or a Hub id.")],
    train: Annotated[str, typer.Argument(help="Rows with a text and its label: .csv, .jsonl, .parquet, a Hub id.")],
    sae: Annotated[str, typer.Option(help="The SAE at whose place the classifier reads, as attach takes it.")],
    out: Annotated[Path, typer.Option(help="Folder of results and classifier.")] = Path("outputs/classifier"),
    test: Annotated[str | None, _data(help="Rows to measure on. [default: cross-validation]")] = None,
    folds: Annotated[int, _data(help="Of the cross-validation.")] = 5,
    text_column: Annotated[str, _data(help="Of the text.")] = "text",
    label_column: Annotated[str, _data(help="Of the label; a,b,c for several yes-or-no labels.")] = "label",
    classes: Annotated[
        str | None, _data(help="A,B: these labels, all others become 'other'. [default: all labels]")
    ] = None,
    pairs: Annotated[str | None, _data(help="CHOSEN,REJECTED: columns of pairs, in place of labels.")] = None,
    prompt_column: Annotated[str | None, _data(help="Of --pairs: stands before both, as {prompt}.")] = None,
    unintended: Annotated[
        Path | None, _features(help="Features: a list (.txt, .csv, .json) or a table of judge (.tsv, .parquet).")
    ] = None,
    judgements: Annotated[
        str, _features(help="Of judge's table: those that must all say so, as 0,1 for both of disease.")
    ] = "0",
    original: Annotated[str | None, _features(help="Rows to measure a swap on; --swapped has the others.")] = None,
    swapped: Annotated[str | None, _features(help="The same rows with an attribute swapped.")] = None,
    swap_words: Annotated[
        str | None, _features(help="he:she,him:her: in place of --original, the rows that have one of the words.")
    ] = None,
    swap_column: Annotated[str, _features(help="Of their text.")] = "text",
    top: Annotated[
        int, _features(help="Without --unintended: so many features that react to half of the swaps.")
    ] = 100,
    methods: Annotated[str, _heads(help="Comma-separated. [default: all eight]")] = "",
    seeds: Annotated[str, _heads(help="Comma-separated; the default is the paper's.")] = PAPER_SEEDS,
    pooling: Annotated[str, _heads(help="last or mean.")] = "mean",
    removal: Annotated[str, _heads(help="Of SelfReg: own, relu or none.")] = "own",
    alignment: Annotated[
        str, _heads(help="Of SelfReg's penalty: affine (the paper's code), encoder, decoder.")
    ] = "decoder",
    penalty: Annotated[float, _heads(help="Of SelfReg.")] = 0.3,
    learning_rate: Annotated[float, _heads(help="Of all heads.")] = 3e-3,
    legacy: Annotated[bool, _heads("--legacy", help="Losses as in SelfReg's code.")] = False,
    template: Annotated[str, _data(help="What the model reads, with {text} where a row goes.")] = "{text}",
    max_length: Annotated[int, typer.Option(help="Tokens; longer texts are cut, the template is not.")] = 256,
    lora_epochs: Annotated[float, _tuning(help="Then tune the base with LoRA for so many epochs.")] = 0.0,
    lora_rank: Annotated[int, _tuning(help="Of LoRA.")] = 8,
    state_weight: Annotated[float, _tuning(help="With LoRA: of unintended features in the states.")] = 0.1,
    keep: Annotated[str, _heads(help="The method whose best head becomes the classifier.")] = "selfreg",
    place: Annotated[str | None, typer.Option(help="Of an SAE that does not say where it reads.")] = None,
    model_dtype: Annotated[str, typer.Option(help="auto: float32 on a CPU, else as published.")] = "auto",
    tokens_at_once: Annotated[int, typer.Option(help="Of a forward pass.")] = 4096,
) -> None:
    """Compare classifiers that may and may not use some features, and save the one to publish."""
    guarded(_classify, dict(locals()))


def _classify(s: dict[str, Any], console: Any) -> None:
    from dataclasses import replace

    from ..create_training_data.classification_data import read_classification
    from ..create_training_data.shards import Store
    from ..create_training_data.swaps import read_word_pairs, swapped_pairs
    from ..create_training_data.templates import templated_ids
    from ..evaluation.plots import plot_methods
    from ..latents.texts import read_column
    from ..modeling import SaeForSequenceClassification
    from ..modeling.feature_head import FeatureHead, FeatureHeadConfig
    from ..training.classifier import Comparison, put_head, read_texts, score_texts, tune_base
    from ..training.head_settings import METHODS, HeadSettings
    from .loading import load_base, load_sae

    if (s["original"] is None) != (s["swapped"] is None) or (s["original"] and s["swap_words"]):
        raise ValueError("Give --original with --swapped, or --swap-words. Received: something else.")
    base_settings = HeadSettings(learning_rate=s["learning_rate"], legacy=s["legacy"])
    methods = {name: replace(base_settings, method=name) for name in s["methods"].split(",") if name}
    methods = methods or {name: replace(base_settings, method=name) for name in METHODS}
    if "selfreg" in methods:
        removal = "none" if s["removal"] == "none" else "relu"  # what is done is in the states already
        methods["selfreg"] = replace(
            methods["selfreg"], penalty=s["penalty"], alignment=s["alignment"], removal=removal
        )
    seeds = [int(seed) for seed in s["seeds"].split(",")]
    data = read_classification(
        {part: s[part] for part in ("train", "test") if s[part] is not None},
        text_column=s["text_column"],
        label_column=s["label_column"],
        classes=s["classes"] and s["classes"].split(","),
        pairs=s["pairs"] and tuple(s["pairs"].split(",")),
        prompt_column=s["prompt_column"],
    )
    console.print(data.describe(), markup=False)
    sae = load_sae(s["sae"], s["place"])
    base, tokenizer, name = load_base(
        s["model"], None, s["model_dtype"], head="AutoModelForSequenceClassification", **data.base_options()
    )
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if limit and s["max_length"] > limit:
        raise ValueError(f"--max-length must be at most {limit} for this model. Received: {s['max_length']}.")
    texts = dict(data.texts)
    if s["original"] is not None:
        texts |= {part: read_column(s[part], s["swap_column"], keep_empty=True) for part in ("original", "swapped")}
    elif s["swap_words"] is not None:
        found = swapped_pairs(texts.get("test", texts["train"]), read_word_pairs(s["swap_words"]))
        texts |= dict(zip(("original", "swapped"), found, strict=True))
    ids = {part: templated_ids(tokenizer, found, s["template"], s["max_length"]) for part, found in texts.items()}
    reading = _Reading(base, sae, s["pooling"], s["tokens_at_once"])
    reading.find_max_norm(ids["train"][:128])
    features = _unintended(s, reading, ids)
    console.print(f"{len(features):,} of {sae.config.d_sae:,} features are unintended")
    head = {"pooling": s["pooling"], "max_norm": reading.max_norm, "removal": s["removal"]}
    classifier = SaeForSequenceClassification.from_base(
        base,
        saes=[sae],
        feature_head={**head, "alignment": s["alignment"], "pairwise": data.pairs},
        loss_weights={"unintended": s["penalty"]},
    )
    classifier.set_unintended(features.tolist())
    plain_head = FeatureHead(FeatureHeadConfig(**{**head, "removal": "none"}), sae.config.d_in, 1, 1)
    states: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for part, rows in ids.items():
        console.print(f"hidden states: {part}")
        heads = [plain_head, classifier.feature_head]
        found = read_texts(classifier, rows, heads, tokens_at_once=s["tokens_at_once"], progress=True)
        for one, values in zip(states, found, strict=True):
            one[part] = values.view(-1, 2, values.shape[-1]) if data.pairs and part in data.texts else values
    given = {"sae": sae, "unintended": features}
    comparison = Comparison(*states, data.labels, objective=data.objective, folds=s["folds"], **given)
    rows, trained = comparison.run(methods, seeds)
    _show(rows, console, "test rows" if s["test"] else f"{s['folds']}-fold cross-validation")
    out: Path = s["out"]
    out.mkdir(parents=True, exist_ok=True)
    kept = s["keep"] if s["keep"] in trained else next(iter(trained))
    if kept != "selfreg":
        classifier.feature_head.config.removal = classifier.config.feature_head["removal"] = "none"
        classifier.config.loss_weights["unintended"] = 0.0
    put_head(classifier, trained[kept])
    results: dict[str, Any] = {"methods": rows}
    if s["lora_epochs"] > 0:
        with tempfile.TemporaryDirectory() as scratch:
            classifier = tune_base(
                classifier,
                ids["train"],
                data.labels["train"],
                out=scratch,
                rank=s["lora_rank"],
                epochs=s["lora_epochs"],
                state_weight=s["state_weight"],
            )
        parts = {part: ids[part] for part in ids if part != "train"}
        results["lora"] = score_texts(classifier, parts, data.labels.get("test"), data.objective)
        console.print("after LoRA: " + ", ".join(f"{name} {value:.3f}" for name, value in results["lora"].items()))
    results["facts"] = {"model": name, "sae": s["sae"], "labels": data.names, "seeds": seeds, "kept": kept}
    results["facts"]["unintended"] = features.tolist()
    Store(out).write_json("results.json", results)
    drawn = plot_methods(rows, out / "methods.png")
    classifier.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    console.print(f"{out / 'results.json'}, {drawn or 'no plot: pip install sae-transformers[plots]'}", markup=False)
    console.print(
        f"AutoModelForSequenceClassification.from_pretrained({str(out / 'model')!r}, trust_remote_code=True)"
    )


class _Reading:
    """Hidden states of tokens at the SAE's place, as the classifier's pooling counts them."""

    def __init__(self, base: Any, sae: Any, pooling: str, tokens_at_once: int) -> None:
        from ..latents.hidden_states import HiddenStateReader

        self.place, self.sae, self.pooling, self.max_norm = sae.config.read_at, sae.to(base.device), pooling, None
        self.reader, self.tokens_at_once = HiddenStateReader(base, [self.place]), tokens_at_once

    def tokens(self, ids: list[Tensor]) -> tuple[Tensor, Tensor]:
        """States (n, d_in) of the tokens that count and the text of each (n,)."""
        import torch

        counted = [torch.arange(len(row) - 1 if self.pooling == "last" else 0, len(row)) for row in ids]
        states = self.reader.read(ids, counted, dtype=torch.float32, tokens_at_once=self.tokens_at_once)[self.place]
        texts = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(places) for places in counted]))
        if self.max_norm is not None:
            short = states.norm(dim=-1) <= self.max_norm
            alone = torch.bincount(texts[short], minlength=len(ids)) == 0
            states, texts = states[short | alone[texts]], texts[short | alone[texts]]
        return states, texts

    def find_max_norm(self, ids: list[Tensor]) -> None:
        """Ten times the median: the first token and a few others are far beyond."""
        if self.pooling == "mean":
            self.max_norm = 10 * float(self.tokens(ids)[0].norm(dim=-1).median())


def _unintended(s: dict[str, Any], reading: _Reading, ids: dict[str, list[Tensor]]) -> Tensor:
    """The features that are given or found. What finds them, half of the swaps, is taken out of `ids`."""
    import torch

    from ..create_training_data.annotation_tables import read_unintended
    from ..training.unintended import counterfactual_features, read_feature_table

    if s["unintended"] is not None:
        table: Path = s["unintended"]
        judged = table.suffix == ".parquet"
        if not judged:
            with table.open(encoding="utf-8") as file:
                judged = "Task" in file.readline().split("\t")
        if judged:
            wanted = [int(number) for number in s["judgements"].split(",")]
            return torch.tensor(read_unintended(table, wanted), dtype=torch.long)
        return read_feature_table(table, reading.sae.config.d_sae)
    if "original" not in ids:
        return torch.empty(0, dtype=torch.long)
    pairs = list(zip(ids["original"], ids["swapped"], strict=True))
    pairs = [pair for pair in pairs if not torch.equal(*pair)]
    if len(pairs) < 2:
        raise ValueError(f"A swap must change two rows or more, within --max-length. Received: {len(pairs)}.")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    judged, held = order[: len(pairs) // 2], order[len(pairs) // 2 :]
    sides = [reading.tokens([pairs[i][side] for i in judged]) for side in (0, 1)]
    (original, first), (swapped, second) = sides
    ids["original"], ids["swapped"] = ([pairs[i][side] for i in held] for side in (0, 1))
    return counterfactual_features(reading.sae, original, swapped, texts=(first, second), top=s["top"])["indices"]


def _show(rows: dict[str, list[dict[str, float]]], console: Any, where: str) -> None:
    from rich.table import Table

    from ..evaluation.classification import paired_t_test, summary

    some = next(iter(rows.values()))
    names = [name for name in COLUMNS if name in some[0]]
    table = Table("", *names, "F1 to plain (p)", title=f"{where}, {len(some)} seeds: mean ± 95 % interval")
    for method, found in rows.items():
        told = summary(found)
        cells = [f"{told[name].mean:.3f} ± {told[name].high - told[name].mean:.3f}" for name in names]
        versus = ""
        if "plain" in rows and method != "plain" and len(found) > 1:
            test = paired_t_test([row["f1"] for row in found], [row["f1"] for row in rows["plain"]], "two-sided")
            versus = f"{test.difference:+.3f} ({test.p:.2f})"
        table.add_row(method, *cells, versus)
    console.print(table)
