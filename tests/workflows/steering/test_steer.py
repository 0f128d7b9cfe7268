"""`steer` as a function: what its result holds, writes and shows; one's own scorer; texts that are too short."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers import (
    FluencyBudget,
    GenerationSettings,
    ReadingSettings,
    ScoringSettings,
    SearchSettings,
    Steering,
    SteerSettings,
    StrengthSettings,
    load,
    steer,
)
from sae_transformers.evaluation.generation.continuations import continue_prompts
from sae_transformers.latents.splits import label_halves
from sae_transformers.training.steering import effect_scores
from sae_transformers.training.steering.calibration import ladders_of, split_prompts
from sae_transformers.training.steering.text_attributions import text_attributions
from sae_transformers.workflows.loading import Loaded, read_steering
from sae_transformers.workflows.steering.steer import SteerResult, read_labelled
from tests.create_training_data.words import WORDS, word_tokenizer
from tests.tiny import tiny_base, tiny_sae

DRAW = random.Random(0)
LABELS = [i % 2 for i in range(40)]
TEXTS = [
    " ".join(DRAW.choices(WORDS[:4] if label else WORDS[4:8], k=4) + DRAW.choices(WORDS[20:], k=4)) for label in LABELS
]
PROMPTS = [" ".join(DRAW.choices(WORDS, k=4)) for _ in range(6)]
SETTINGS = SteerSettings(
    search=SearchSettings(top=2, pool=6),
    strength=StrengthSettings(("direction",), (0.5, 2.0, 8.0)),
    budget=FluencyBudget(perplexity_ratio=1e9),
    generation=GenerationSettings(max_new_tokens=6),
    reading=ReadingSettings(max_length=32),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steer")
    word_tokenizer().save_pretrained(folder / "base")
    tiny_base(vocab_size=len(word_tokenizer())).save_pretrained(folder / "base")
    tiny_sae(layer=1, site="resid_post").save_pretrained(folder / "sae")
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(folder / "base", str(folder / "sae"))


@pytest.fixture(scope="module")
def result(loaded: Loaded) -> SteerResult:
    return steer(loaded.model, loaded.tokenizer, TEXTS, LABELS, PROMPTS, SETTINGS)


def test_the_best_steering_is_chosen(result: SteerResult) -> None:
    assert len(result.curve) == 2 * 3 and len(result.candidates) == 2
    best = max(result.curve, key=lambda point: (point.score, -point.perplexity))
    assert result.steering == best.steering and result.report is not None
    assert (result.texts, result.prompts, result.missing, result.cut, result.warnings) == (40, 6, 0, 0, ())


def test_what_it_writes_and_shows(result: SteerResult, tmp_path: Path) -> None:
    paths = result.save(tmp_path)
    assert [path.name for path in paths] == ["steering.json", "report.json", "model"]
    assert read_steering(tmp_path / "steering.json") == read_steering(tmp_path / "report.json") == result.steering
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    assert load(tmp_path / "model").model.steering == result.steering
    frame = result.to_frame()
    assert list(frame.steering)[0] == "none" and frame.chosen.sum() == 1 and len(frame) == 7
    assert "<table>" in result._repr_html_()
    assert result.plot(tmp_path / "curve.png") in (None, tmp_path / "curve.png")


def test_the_model_steers_by_itself(result: SteerResult, loaded: Loaded) -> None:
    model = result.model()
    assert model is loaded.model and model.steering == result.steering
    model.steering = None


def test_one_s_own_scorer_and_progress(loaded: Loaded) -> None:
    seen: list[tuple[int, int]] = []
    found = steer(
        loaded.model, loaded.tokenizer, TEXTS, LABELS, PROMPTS, SETTINGS,
        scorer=lambda texts: [len(set(text.split())) for text in texts], progress=lambda *at: seen.append(at),
    )  # fmt: skip
    assert found.calibration.unsteered.score > 1
    assert (20, 20) in seen and seen[-1][0] == seen[-1][1] == (1 + 6) * 3 + 2 * 3


def test_texts_that_are_too_short_are_counted(loaded: Loaded) -> None:
    texts = [text if number % 10 else "w1" for number, text in enumerate(TEXTS)]
    found = steer(loaded.model, loaded.tokenizer, texts, LABELS, PROMPTS, SETTINGS)
    assert 0 < found.missing <= 4
    assert f"{found.missing} texts have no token after the first 1, and were not searched." in found.summary()
    with pytest.raises(ValueError, match="Texts of both labels are needed that have more than 1 tokens"):
        steer(loaded.model, loaded.tokenizer, ["w1" for _ in TEXTS], LABELS, PROMPTS, SETTINGS)


def test_cut_texts_and_no_choice_are_told(loaded: Loaded, tmp_path: Path) -> None:
    settings = replace(SETTINGS, budget=FluencyBudget(1e-9), reading=ReadingSettings(max_length=5))
    found = steer(loaded.model, loaded.tokenizer, TEXTS, LABELS, PROMPTS, settings)
    assert found.cut == 40 and not found.steering and found.steering == Steering()
    assert found.summary()[0].startswith("Warning: No steering was chosen") and "40 texts were cut." in found.summary()
    assert [path.name for path in found.save(tmp_path)] == ["steering.json", "report.json"]
    assert found.model() is loaded.model


@pytest.mark.parametrize("selection", ["combined", "correlation"])
def test_a_stopped_run_goes_on(loaded: Loaded, tmp_path: Path, selection: str) -> None:
    search = replace(SETTINGS.search, selection=selection, outcome_samples=4)
    settings = replace(
        SETTINGS, journal=tmp_path / "journal", generation=GenerationSettings(6, batch_size=6), search=search
    )
    expected = steer(loaded.model, loaded.tokenizer, TEXTS, LABELS, PROMPTS, replace(settings, journal=None))

    def stop(done: int, total: int) -> None:
        if total > 20 and done >= 12:
            raise KeyboardInterrupt

    arguments: Any = (loaded.model, loaded.tokenizer, TEXTS, LABELS, PROMPTS, settings)
    with pytest.raises(KeyboardInterrupt):
        steer(*arguments, progress=stop)
    found = steer(*arguments)
    parts = 3 if selection == "combined" else 5  # two of texts that features are correlated with
    assert expected.resumed == 0 and found.resumed == parts
    assert f"Went on after {parts} parts of {tmp_path / 'journal'}." in found.summary()
    assert found.to_dict() == expected.to_dict() and found.candidates == expected.candidates
    assert found.steering == expected.steering and (tmp_path / "journal").exists()
    found.save(tmp_path / "out")
    assert not (tmp_path / "journal").exists()


def test_a_journal_of_other_base_weights_is_not_gone_on_with(folder: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, journal=tmp_path / "journal", generation=GenerationSettings(6, batch_size=6))
    loaded = load(folder / "base", str(folder / "sae"))
    steer(loaded.model, loaded.tokenizer, TEXTS, LABELS, PROMPTS, settings)
    assert steer(loaded.model, loaded.tokenizer, TEXTS, LABELS, PROMPTS, settings).resumed > 0
    with torch.no_grad():  # trained on in place, say
        next(iter(loaded.model.lm.parameters())).mul_(1.01)
    assert steer(loaded.model, loaded.tokenizer, TEXTS, LABELS, PROMPTS, settings).resumed == 0


@pytest.mark.parametrize("selection", ["confidence", "correlation", "effect"])
def test_features_are_selected_by_effect_on_texts_that_do_not_report(
    loaded: Loaded, result: SteerResult, selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def watched(model: Any, tokenizer: Any, prompts: Any, *rest: Any, **more: Any) -> Any:
        read.extend(prompts)
        return continue_prompts(model, tokenizer, prompts, *rest, **more)

    monkeypatch.setattr(effect_scores, "continue_prompts", watched)
    search = replace(SETTINGS.search, selection=selection, outcome_samples=3)
    prompts = [*PROMPTS, *PROMPTS[:2]]  # two of them twice
    found = steer(loaded.model, loaded.tokenizer, TEXTS, LABELS, prompts, replace(SETTINGS, search=search))
    choosing, reporting = split_prompts(prompts, 0.5, SETTINGS.generation.seed)
    assert read == [p for p in choosing for _ in range(3)] * (selection != "confidence")
    assert not set(reporting) & {*read, *choosing, *TEXTS} and len(set(reporting)) == 3
    names = {"confidence": {"delta_confidence"}, "correlation": {"correlation"}}
    assert set(found.candidates[0]) == {"sae", "feature", "auroc"} | names.get(
        selection, {"delta_confidence", "correlation"}
    )
    assert set(found.searches[0].features.tolist()) == set(result.searches[0].features.tolist())


def test_features_are_selected_by_what_they_do_to_the_labelled_texts(loaded: Loaded, result: SteerResult) -> None:
    """By the texts of the half that searches, and no others."""
    search = replace(SETTINGS.search, selection="attribution")
    found = steer(loaded.model, loaded.tokenizer, TEXTS, LABELS, PROMPTS, replace(SETTINGS, search=search))
    searching, _ = label_halves(LABELS, SETTINGS.generation.seed)
    ids = [loaded.tokenizer(TEXTS[i])["input_ids"] for i in searching]
    kept = [number for number, row in enumerate(ids) if len(row) > 1]
    labels = torch.tensor([LABELS[searching[number]] for number in kept])
    expected = text_attributions(loaded.model, [ids[number] for number in kept], labels)[0]
    scores = found.searches[0].attributions
    assert scores is not None and scores.tolist() == sorted(scores.tolist(), reverse=True)
    torch.testing.assert_close(scores, expected[found.searches[0].features], rtol=1e-3, atol=1e-6)
    assert set(found.candidates[0]) == {"sae", "feature", "auroc", "attribution"}
    assert set(found.searches[0].features.tolist()) == set(result.searches[0].features.tolist())


def test_a_feature_of_less_is_correlated_with_less(loaded: Loaded) -> None:
    def found(lower: bool, sign: int) -> list[float]:
        settings = replace(
            SETTINGS,
            search=replace(SETTINGS.search, selection="correlation", outcome_samples=4),
            strength=replace(SETTINGS.strength, lower=lower),
        )
        result = steer(
            loaded.model, loaded.tokenizer, TEXTS, LABELS, PROMPTS, settings,
            scorer=lambda texts: [sign * len(set(text.split())) for text in texts],
        )  # fmt: skip
        correlations = result.searches[0].correlations
        assert correlations is not None
        return correlations.tolist()

    assert found(False, 1) == pytest.approx(found(True, -1)) and max(map(abs, found(False, 1))) > 0.05


def test_labelled_texts_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "sea.csv").write_text("text,label\na ship,1\na tree,0\n", encoding="utf-8")
    assert read_labelled(str(tmp_path / "sea.csv")) == (["a ship", "a tree"], [1, 0], "sea")
    with pytest.raises(ValueError, match=r"`concept` must be in \[0, 1\). Received: 1"):
        read_labelled(str(tmp_path / "sea.csv"), concept=1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"labels": LABELS[:-1]}, "a label for each of 40 texts. Received: 39"),
        ({"labels": [0] * 39 + [1]}, "Received: 1 of label 1"),
        ({"prompts": ["w1 " * 125, "w2 " * 125]}, "context of 128"),
        ({"prompts": TEXTS[:6]}, "3 of 3 that are"),
        ({"prompts": ["w1"]}, "1 prompts"),
    ],
)
def test_what_is_refused(loaded: Loaded, change: dict, told: str) -> None:
    given = {"texts": TEXTS, "labels": LABELS, "prompts": PROMPTS, **change}
    with pytest.raises(ValueError, match=told):
        steer(loaded.model, loaded.tokenizer, **given, settings=SETTINGS)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: SearchSettings(statistic="f"), "Received: statistic='f'"),
        (lambda: SearchSettings(top=0), "Received: top=0"),
        (lambda: StrengthSettings(("shrink",)), r"Received: ops=\('shrink',\)"),
        (lambda: StrengthSettings(strengths=()), r"Received: strengths=\(\)"),
        (lambda: ScoringSettings("gpt"), "Received: scorer='gpt'"),
        (lambda: SteerSettings(scoring=ScoringSettings("judge")), "`scorer` judge needs `llm`"),
    ],
)
def test_settings_are_refused_by_name(make: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()


def test_strengths_are_of_all_operations() -> None:
    strength = StrengthSettings(("direction", "shrink"), (1.0, 2.0))
    assert strength.by_op() == {"direction": (1.0, 2.0), "shrink": (1.0, 2.0)}
    assert [len(ladder) for ladder in ladders_of([(0, 0)], strength.ops, strengths=strength.by_op())] == [2, 2]
