"""Pictures of a dashboard for the documentation, from made-up features: docs/images/dashboard-light.png and -dark.png.

    python docs/dashboard_screenshots.py --out docs/images

Needs the packages `playwright` and `pillow` and an installed Chromium; no browser is fetched. Every text below was
made up for this.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import re
import shutil
import tempfile
from pathlib import Path

import torch

from sae_transformers.create_training_data.annotation.tables import FeatureAnnotation
from sae_transformers.evaluation.features.histograms import ActivationHistograms
from sae_transformers.evaluation.features.table import FeatureTable, LogitWeights
from sae_transformers.evaluation.results import Measurement, Results, SuiteResult
from sae_transformers.hub_cards.dashboard import write_dashboard
from sae_transformers.hub_cards.dashboard_data import (
    OWN_ACTIVATION,
    DashboardData,
    SpanShown,
    SteeringSample,
    signed,
)

TOKENS = 250_000
# explanation, tokens it raises, tokens it lowers, texts with the strength of a word behind it, intended or not
CONCEPTS = [
    (
        "Rivers, lakes and other bodies of fresh water",
        " river| lake| stream| water| banks| shore| flow| upstream| fishing| dam",
        " desert| dry| sky| attic| ash| roof| oven| dust| hallway| carpet",
        [
            "In spring the melting snow fills the*1 stream*7 behind our house and the*2 river*12 rises to the bridge.",
            "They paddled across the*2 lake*11 before dawn, when its*1 water*6 lay flat as glass.",
            "A heron stood in the shallow*4 creek*9 and waited for the fish to come back.",
            "The village keeps its boats on the*1 eastern*2 shore*8 of the*3 reservoir*9 all winter.",
        ],
        True,
    ),
    (
        "Disappointment in a review, after something was expected",
        " sadly| disappointing| unfortunately| worse| letdown| bland| wasted| boring| dull| regret",
        " superb| delight| charming| wonderful| perfect| gem| lovely| thrilled| brilliant| joy",
        [
            "I had hoped for more; sadly*11 the second half*2 falls*5 flat*9 and nobody seems to care.",
            "The soup arrived cold, the waiter shrugged, and the*1 dessert was*2 a letdown*10 too.",
            "Everyone praised this album, but*4 I found it bland*9 and far*2 too*4 long*3.",
        ],
        True,
    ),
    (
        "Given names of women",
        " Anna| Maria| Elena| her| Sofia| she| Lucia| Clara| herself| Julia",
        " his| he| himself| Peter| Mr| Karl| him| Thomas| king| Sir",
        [
            "The letter was signed by Elena*11 and*2 her sister Clara*10, who had moved to the coast.",
            "Ask Maria*12 whether the keys are still at the bakery.",
            "It was Sofia*10 who first noticed that the clock ran backwards.",
        ],
        False,
    ),
    (
        "Obligations in contracts and laws",
        " shall| must| hereby| obliged| pursuant| liable| thereof| required| party| clause",
        " maybe| perhaps| kinda| yeah| wow| funny| cute| guess| cool| stuff",
        [
            "The tenant shall*12 return the keys, and the landlord shall*11 refund the deposit within*3 ten days.",
            "Any party*3 that fails to give notice must*9 bear*2 the costs pursuant*10 to clause*5 four.",
        ],
        None,
    ),
    (
        "Closing brackets at the end of a call",
        ")| );|))| ]|});| }|\n)|));|)]|)\n",
        " the| and| of| a| in| to| was| were| with| by",
        [
            "result = combine(first, second(third*2)*8)*11\nprint(result*1)*9",
            "rows.append((name, size*1)*6)*10",
        ],
        True,
    ),
    (
        "Numbers that are years",
        " 1984| 1969| century| decade| era| 2001| AD| anniversary| since| war",
        " kg| cm| mph| ml| km| litre| ounce| inch| mg| mile",
        [
            "The bridge was finished in*3 1911*10 and closed again in 1964*11.",
            "Since*5 1987*12 no one has won it twice.",
        ],
        None,
    ),
    (
        "Comparisons with ‘than’",
        " than| more| less| rather| fewer| compared| better| worse| greater| versus",
        " and| hence| thus| so| therefore| upon| lo| o| hark| thereby",
        ["It is easier to begin than*11 to*2 end.", "She knew more*4 than*12 she said."],
        True,
    ),
    (
        "Weather that turns bad",
        " storm| rain| thunder| clouds| wind| hail| flood| gale| fog| lightning",
        " sunny| indoors| shelf| desk| invoice| taxi| keyboard| clear| dry| bright",
        [
            "By noon the clouds*6 had*1 turned black and hail*11 beat on the roof.",
            "A gale*12 tore the flags from the pier.",
        ],
        True,
    ),
    (
        "Speech reported with hesitation",
        " um| well| uh| er| hmm| sort| like| maybe| guess| anyway",
        " hereby| shall| thereof| pursuant| whereas| decree| affirm| ratified| assert| declare",
        ["Well*9, um*12, I suppose we could try the other door."],
        None,
    ),
    (
        "Dialect forms of the verb ‘to be’",
        " ain| be| been| wuz| dis| dat| finna| gon| y'all| nah",
        " is| are| am| were| isn| aren| was| shall| whom| hence",
        ["That dog ain*11't*6 going anywhere, my uncle said."],
        False,
    ),
    (
        "Chemical elements",
        " carbon| iron| oxygen| zinc| sodium| helium| nickel| copper| silver| nitrogen",
        " poem| sonnet| waltz| opera| novel| verse| ballad| essay| fable| hymn",
        ["Traces of zinc*10 and nickel*11 were found in the well."],
        True,
    ),
    (
        "Beginnings of questions",
        " Why| How| What| When| Who| Where| Did| Does| Is| Could",
        ".| .|;| ;|!| !|:| —| –| …",
        ["Why*11 did nobody lock the gate? How*9 long was it open?"],
        True,
    ),
]
STEERED = {
    0: [
        (
            -8.0,
            "We went to the museum and then to the tower, and the guide told us about the kings who built it.",
            9.1,
        ),
        (4.0, "We walked along the water until the path ended, and sat there a while before we turned back.", 8.4),
        (8.0, "We took the boat up the river, past the dam, to a lake so still that the clouds lay in it.", 10.2),
        (16.0, "We river the lake water, the lake, the river and the water of the stream of the lake water.", 71.3),
    ]
}
UNSTEERED = "We had three days there, and on the second we hired bicycles and saw most of the old town."
PROMPT = "Tell me about your last holiday."


def span(text: str, row: int) -> SpanShown:
    """A text with `*strength` behind words, as tokens with activations."""
    tokens: list[str] = []
    values: list[float | None] = []
    for piece, strength in re.findall(r"([ ]?[^\s*]+|\n)(?:\*(\d+))?", text):
        tokens.append(piece)
        values.append(float(strength) + 0.11 * (row % 3) if strength else 0.0)
    known = [value or 0.0 for value in values]
    return SpanShown(
        max(known), tokens, [None, *values[1:]] if not values[0] else values, known.index(max(known)), row
    )


def made_up(n_features: int, seed: int = 0, written: bool = True) -> DashboardData:
    """`n_features` features, the first of them with texts; the others repeat their words in other order."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    top, bottom = [], []
    for feature in range(n_features):
        one = CONCEPTS[feature % len(CONCEPTS)]
        ends = [one[1].split("|"), one[2].split("|")]
        if feature >= len(CONCEPTS):
            ends = [draw.sample(draw.choice(CONCEPTS)[1 + end].split("|"), 10) for end in range(2)]
        top.append(ends[0])
        bottom.append(ends[1])
    rising = (torch.rand(n_features, 10, generator=generator) * 1.2 + 0.4).sort(dim=1, descending=True).values
    moments = [torch.randn(n_features, generator=generator, dtype=torch.float64).abs() for _ in range(4)]
    ids = torch.zeros(n_features, 10, dtype=torch.long)
    frequency = 10 ** (torch.randn(n_features, generator=generator).double() * 0.7 - 2.4).clamp(-4.6, -0.5)
    dead = torch.rand(n_features, generator=generator) < 0.03
    dead[: len(CONCEPTS)] = False
    frequency[dead] = 0
    weights = LogitWeights(moments[0], moments[1], moments[2], moments[3] * 2 + 3, ids, rising, ids, -rising * 0.9)
    coherence = torch.rand(n_features, generator=generator, dtype=torch.float64)
    table = FeatureTable(weights, top, bottom, (frequency + 1e-10).log10(), dead, coherence)
    histograms = ActivationHistograms(n_features)
    histograms.n_tokens = TOKENS
    centre = 8 + 10 * torch.rand(n_features, generator=generator)[:, None]
    bins = torch.arange(histograms.n_bins)[None] - 128  # eight to a factor of two, from 1
    shape = torch.exp(-(((bins - centre) / (4 + centre / 5)) ** 2)) * (bins <= 29)
    counts = shape / shape.sum(1, keepdim=True) * frequency[:, None] * TOKENS
    histograms.counts = counts.round().int()
    last = torch.where(histograms.counts > 0, bins, -8).amax(1)
    histograms.maxima = torch.where(dead, 0.0, 2 ** ((last + 0.7) / 8))
    n = n_features if written else min(n_features, len(CONCEPTS))
    spans, annotations, neighbours = {}, {}, {}
    for feature in range(n):
        if dead[feature]:
            continue
        explanation, _, _, texts, intended = CONCEPTS[feature % len(CONCEPTS)]
        spans[feature] = [span(text, 100 + 7 * feature + i) for i, text in enumerate(texts)]
        if feature < len(CONCEPTS) or feature % 3:
            said = {True: "yes", False: "no", None: ""}[intended]
            reason = f"The spans share one thing: {explanation[0].lower()}{explanation[1:]}. " + (
                "A reader who judges the text's subject would use it."
                if intended
                else "Who is named, and how they speak, should not decide about the text."
            )
            annotations[feature] = FeatureAnnotation(explanation, intended, [(said, reason)] if said else [], "yes")
        neighbours[feature] = [((feature + k * k + 1) % n_features, 0.71 - 0.09 * k) for k in range(4)]
    samples = {
        feature: [
            SteeringSample(PROMPT, UNSTEERED, "", 0.0, 7.9),
            *(SteeringSample(PROMPT, text, f"direction {signed(s)}", s, likely) for s, text, likely in rows),
        ]
        for feature, rows in STEERED.items()
        if feature < n_features
    }
    measured = [
        Measurement("explained_variance", 0.74, n=50_000),
        Measurement("l0", 32.0, n=50_000),
        Measurement("loss_recovered", 0.95, low=0.94, high=0.96, n=8_000),
    ]
    results = Results(
        {}, "sae-transformers evaluate", "2025-01-01", {"reconstruction": SuiteResult("reconstruction", {}, measured)}
    )
    facts = {"Base model": "a made-up model", "Read at": "layers.14.resid_post", "Text": f"{TOKENS:,} made-up tokens"}
    aurocs = {f: 0.5 + 0.45 * math.sin(f + 1) ** 2 for f in range(min(n_features, len(CONCEPTS)))}
    return DashboardData(
        "Features of a made-up SAE", facts, table, spans=spans, annotations=annotations, samples=samples,
        neighbours=neighbours, measures={"AUROC, reviews": aurocs}, histograms=histograms, results=results,
        activation=OWN_ACTIVATION,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--features", type=int, default=4608)
    parser.add_argument("--page", type=Path, help="Keep the dashboard itself here.")
    options = parser.parse_args()
    from PIL import Image
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("Chromium is needed, and not found.")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = options.page or Path(folder) / "dashboard.html"
        write_dashboard(made_up(options.features), page_file)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for theme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 1360, "height": 900}, color_scheme=theme)
            page.goto(page_file.resolve().as_uri() + "#feature-0")
            page.get_by_role("heading", name="Feature 0").wait_for()
            page.wait_for_timeout(400)
            picture = Image.open(io.BytesIO(page.screenshot()))
            picture.quantize(200, dither=Image.Dither.NONE).save(options.out / f"dashboard-{theme}.png", optimize=True)
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
