"""The verb `reduce-bias`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import guarded

if TYPE_CHECKING:
    from torch import Tensor

FINDERS = ("swaps", "tokens", "contrast")
COUNTS = "0,1,2,5,10,20,50,100"
TYPES = (1, 2)


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("reduce-bias")(reduce_bias)


def reduce_bias(
    model: Annotated[str, typer.Argument(help="Base model: a folder or a Hub id.")],
    text: Annotated[str, typer.Argument(help="Text with gendered words to find features on, as harvest takes it.")],
    sae: Annotated[str, typer.Option(help="The SAE, as attach takes it.")],
    winobias: Annotated[
        Path, typer.Option(help="Folder of WinoBias' files {pro,anti}_stereotyped_type{1,2}_....txt.")
    ],
    crows_pairs: Annotated[Path | None, typer.Option(help="CrowS-Pairs' csv file.")] = None,
    lambada: Annotated[str | None, typer.Option(help="LAMBADA's rows: .jsonl with a column text.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of results.json and steering.json.")] = Path("outputs/bias"),
    find: Annotated[
        str,
        typer.Option(
            help="swaps: features that change when gendered words are swapped; tokens: that tell gendered words from "
            "others; contrast: female from male ones."
        ),
    ] = "swaps",
    words: Annotated[str | None, typer.Option(help="Gendered words, male:female,... [default: 26 pairs]")] = None,
    counts: Annotated[str, typer.Option(help="Numbers of features taken out.")] = COUNTS,
    op: Annotated[str, typer.Option(help="ablate, or clamp to the mean activation on the text.")] = "ablate",
    random_seeds: Annotated[int, typer.Option(help="As many random features as a control, so many times.")] = 1,
    random_counts: Annotated[str | None, typer.Option(help="Numbers of these. [default: as --counts]")] = None,
    max_loss: Annotated[
        float, typer.Option(help="What LAMBADA's log-perplexity may rise by, in nats, for a number to be chosen.")
    ] = 0.05,
    max_texts: Annotated[int, typer.Option(help="Rows with gendered words that are used.")] = 200,
    max_length: Annotated[int, typer.Option(help="Tokens of these rows; longer ones are cut.")] = 64,
    max_pairs: Annotated[int | None, typer.Option(help="Of each file or kind; the first ones.")] = None,
    max_choose: Annotated[int | None, typer.Option(help="Pairs of each file of WinoBias' dev part.")] = None,
    max_lambada: Annotated[int, typer.Option(help="Rows; one in four helps to choose, the others measure.")] = 400,
    txt_rows: Annotated[str, typer.Option(help="A row of a .txt file: paragraph, line or file.")] = "paragraph",
    place: Annotated[str | None, typer.Option(help="Of an SAE that does not say where it reads.")] = None,
    model_dtype: Annotated[str, typer.Option(help="auto: float32 on a CPU, else as published.")] = "auto",
    tokens_at_once: Annotated[int, typer.Option(help="Of a forward pass.")] = 1024,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap that gives the 95 % intervals.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the random features and the intervals.")] = 0,
) -> None:
    """Find features that go with gender, take them out in growing number, and measure bias and what it costs."""
    guarded(_reduce_bias, dict(locals()), width=160)


def _reduce_bias(s: dict[str, Any], console: Any) -> None:
    import time

    import torch

    from ..create_training_data.shards import Store
    from ..modeling import SaeForCausalLM
    from ..training.bias_reduction import OPS, reducing, sweep
    from .loading import load_base, load_sae

    start = time.perf_counter()
    counts = _numbers("--counts", s["counts"])
    random_counts = counts if s["random_counts"] is None else _numbers("--random-counts", s["random_counts"])
    for name, value, known in (("--find", s["find"], FINDERS), ("--op", s["op"], OPS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}. Received: {value!r}.")
    parts = _read_parts(s)
    sae = load_sae(s["sae"], s["place"])
    base, tokenizer, name = load_base(s["model"], None, s["model_dtype"])
    model = SaeForCausalLM.from_base(base, saes=[sae]).eval()
    sae = model.saes[0]
    ranked, activity = _find(s, model, tokenizer, console)
    counts = sorted({0, *(n for n in counts if n <= len(ranked.features))})
    store = Store(s["out"])
    measure = _Measure(model, tokenizer, parts, s, console, store)
    values = activity[ranked.features]
    measure.label = s["find"]
    sweep(ranked.features, counts, measure, op=s["op"], values=values)
    generator = torch.Generator().manual_seed(s["seed"])
    live = (activity > 0).nonzero()[:, 0]
    drawn = []
    for number in range(s["random_seeds"]):
        some = live[torch.randperm(len(live), generator=generator)]
        drawn.append(some[: max(counts)].tolist())
        controls = [n for n in random_counts if 0 < n <= len(some)]
        measure.label = f"random, draw {number + 1}"
        sweep(some, controls, measure, op=s["op"], values=activity[some])
    told = measure.told
    chosen = _choose({n: told[f"{n} {s['find']}"] for n in counts}, s["max_loss"])
    _show(told, console, f"{name}, {sae.config.read_at}: {len(ranked.features):,} features qualify, {chosen} chosen")
    steering = reducing(ranked.features[:chosen], op=s["op"], value=values[:chosen].tolist())
    facts = {
        "complete": True, "model": name, "sae": s["sae"], "find": s["find"], "op": s["op"], "chosen": chosen,
        "features": ranked.features[: max(counts)].tolist(),
        "scores": ranked.scores[ranked.features[: max(counts)]].tolist(),
        "random_features": drawn, "seconds": time.perf_counter() - start,
        "model_dtype": str(base.dtype).removeprefix("torch."),
    }  # fmt: skip
    store.write_json("results.json", {"facts": facts, "runs": told})
    store.write_json("steering.json", steering.to_dict())
    console.print(
        f"{s['out'] / 'results.json'}, {s['out'] / 'steering.json'}; {facts['seconds']:,.0f} s", markup=False
    )


def _numbers(option: str, text: str) -> list[int]:
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [-1]
    if found[0] < 0:
        raise ValueError(f"{option} must be numbers of features, such as {COUNTS}. Received: {text!r}.")
    return found


def _read_parts(s: dict[str, Any]) -> dict[str, Any]:
    """Name -> pairs, or last-word texts; those that choose end in `choose`."""
    from ..evaluation.bias import read_crows_pairs, read_winobias
    from ..latents.texts import read_column

    limit, parts = s["max_pairs"], {}
    for part, name, most in (("dev", "choose", s["max_choose"] or limit), ("test", "test", limit)):
        for number in TYPES:
            files = [s["winobias"] / f"{side}_stereotyped_type{number}_{part}.txt" for side in ("pro", "anti")]
            parts[f"WinoBias {number} {name}"] = read_winobias(*files)[:most]
    if s["crows_pairs"] is not None:
        pairs = read_crows_pairs(s["crows_pairs"])
        parts["CrowS gender"] = [pair for pair in pairs if pair.kind == "gender"][:limit]
        parts["CrowS other"] = [pair for pair in pairs if pair.kind != "gender"][:limit]
    if s["lambada"] is not None:
        rows = read_column(s["lambada"], "text", keep_empty=True)[: s["max_lambada"]]
        parts["LAMBADA choose"] = rows[::4]
        parts["LAMBADA"] = [row for i, row in enumerate(rows) if i % 4]
    return {name: part for name, part in parts.items() if part}


def _find(s: dict[str, Any], model: Any, tokenizer: Any, console: Any) -> tuple[Any, Tensor]:
    """Features that go with gender, the strongest first, and the mean activation of each latent on the text."""
    import torch

    from ..create_training_data.gendered_texts import both_versions
    from ..create_training_data.swaps import read_word_pairs
    from ..latents.sparse_codes import encode_texts
    from ..latents.texts import open_text
    from ..training.bias_reduction import GENDERED_PAIRS, rank_by_swaps, rank_by_tokens

    pairs = read_word_pairs(s["words"] or GENDERED_PAIRS)
    rows = []
    for _, block in open_text(s["text"], txt_rows=s["txt_rows"]).blocks(256, itertools.count()):
        rows += zip(*both_versions([text.strip() for text in block.texts], pairs), strict=True)
        if len(rows) >= 4 * s["max_texts"]:
            break
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and s["max_length"] > limit:
        raise ValueError(f"--max-length must be at most {limit} for this model. Received: {s['max_length']}.")
    ids = [tuple(_cut(tokenizer, text, s["max_length"]) for text in row) for row in rows]
    ids = [row for row in ids if min(map(len, row)) > 1 and not torch.equal(*row)][: s["max_texts"]]
    if not ids:
        raise ValueError(
            f"The text needs rows with gendered words among their first {s['max_length']} tokens. Received: none."
        )
    states, texts, kept = zip(
        *(_states(model, [row[side] for row in ids], s["tokens_at_once"]) for side in (0, 1)), strict=True
    )
    console.print(f"{len(ids):,} rows with gendered words, {len(states[0]):,} tokens")
    sae, both = model.saes[0], torch.cat(states)
    activity = encode_texts(sae, both).sums() / len(both)
    if s["find"] == "swaps":
        return rank_by_swaps(sae, states[0], states[1], (texts[0], texts[1])), activity
    male, female = (frozenset(pair[side] for pair in pairs) for side in (0, 1))
    said = [word.strip().lower() for word in tokenizer.batch_decode(torch.cat(kept)[:, None])]
    is_male, is_female = (torch.tensor([word in known for word in said]) for known in (male, female))
    gendered = is_male | is_female
    if s["find"] == "tokens":
        return rank_by_tokens(sae, both, gendered.long()), activity
    return rank_by_tokens(sae, both[gendered], is_female[gendered].long()), activity


def _cut(tokenizer: Any, text: str, max_length: int) -> Tensor:
    import torch

    return torch.tensor(tokenizer(text, truncation=True, max_length=max_length)["input_ids"])


def _states(model: Any, ids: list[Tensor], tokens_at_once: int) -> tuple[Tensor, Tensor, Tensor]:
    """States (n, d_in) of all tokens but the first of each row and those ten times as long as the median, the row of
    each (n,) and its id (n,)."""
    import torch

    from ..latents.hidden_states import HiddenStateReader

    place = model.saes[0].config.read_at
    keep = [torch.arange(1, len(row)) for row in ids]
    reader = HiddenStateReader(model.lm, [place], config=model.config)
    states = reader.read(ids, keep, dtype=torch.float32, tokens_at_once=tokens_at_once)[place]
    texts = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(row) - 1 for row in ids]))
    norms = states.norm(dim=-1)
    short = norms <= 10 * norms.median()
    short |= torch.bincount(texts[short], minlength=len(ids))[texts] == 0
    return states[short], texts[short], torch.cat([row[1:] for row in ids])[short]


class _Measure:
    """What a `Steering` does to each part. The first one that it is called with is what the others are compared to.
    What is known is in results.json after each, so that a run that is cut off leaves what it had."""

    def __init__(
        self, model: Any, tokenizer: Any, parts: dict[str, Any], settings: dict[str, Any], console: Any, store: Any
    ) -> None:
        self.model, self.tokenizer, self.parts = model, tokenizer, parts
        self.tokens_at_once, self.console = settings["tokens_at_once"], console
        self.store, self.label, self.plain = store, "", None
        self.told: dict[str, Any] = {}
        self.bootstrap = {name: settings[name] for name in ("resamples", "seed")}

    def __call__(self, steering: Any) -> dict[str, Any]:
        import time

        from ..evaluation.bias import score_last_words, score_pairs

        start = time.perf_counter()
        options = {"steering": steering or False, "tokens_at_once": self.tokens_at_once}
        found = {
            name: (score_last_words if name.startswith("LAMBADA") else score_pairs)(
                self.model, self.tokenizer, part, **options
            )
            for name, part in self.parts.items()
        }
        self.plain = self.plain or found
        self.told[f"{len(steering.edits)} {self.label}"] = self.summary(found, self.plain)
        self.store.write_json("results.json", {"facts": {"complete": False}, "runs": self.told})
        self.console.print(f"{len(steering.edits)} features: {time.perf_counter() - start:,.0f} s")
        return found

    def summary(self, run: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
        from ..evaluation.bias import last_word_summary, preference, preference_change

        told: dict[str, Any] = {}
        for name, scores in run.items():
            if name.startswith("LAMBADA"):
                told[name] = last_word_summary(scores, **self.bootstrap)
                told[name]["lost"] = preference_change(scores.log_p, plain[name].log_p, **self.bootstrap)
                continue
            kinds = ("sentence", "shared") if name.startswith("CrowS") else ("sentence", "marked")
            told[name] = {}
            for by in kinds:
                after, before = getattr(scores, by), getattr(plain[name], by)
                told[name][by] = preference(after, **self.bootstrap)
                told[name][by]["change"] = preference_change(before, after, **self.bootstrap)
        return told


def _choose(told: dict[int, dict[str, Any]], max_loss: float) -> int:
    """The number of features with the smallest gaps on the pairs that choose, within the loss that is allowed."""
    lost = {n: one["LAMBADA choose"]["lost"]["value"] if "LAMBADA choose" in one else 0.0 for n, one in told.items()}
    allowed = {n: one for n, one in told.items() if n == 0 or lost[n] <= max_loss}

    def size(n: int) -> float:
        return sum(abs(allowed[n][f"WinoBias {number} choose"]["sentence"]["gap"]["value"]) for number in TYPES)

    return min(allowed, key=lambda n: (size(n), n))


def _show(told: dict[str, Any], console: Any, title: str) -> None:
    from rich.table import Table

    parts = [name for name in next(iter(told.values())) if not name.startswith("LAMBADA")]
    last = "LAMBADA" in next(iter(told.values()))
    table = Table("features", *parts, *(["LAMBADA: right, perplexity"] if last else []), title=title)
    for key, run in told.items():
        both = [(run[name]["sentence"]["gap"]["value"], run[name]["sentence"]["share"]["value"]) for name in parts]
        cells = [f"{gap:+.3f} {share:.1%}" for gap, share in both]
        if last:
            cells.append(f"{run['LAMBADA']['accuracy']['value']:.1%} {run['LAMBADA']['perplexity']['value']:.2f}")
        table.add_row(key, *cells)
    console.print(table)
    console.print("Mean gap in nats (0: no preference) and share of pairs whose stereotypical text is likelier.")
