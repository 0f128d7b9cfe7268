"""A new suite and a new method of steering, each a class and a line: in help, record, card and plot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import typer
from typer.testing import CliRunner

from sae_transformers import SaeForCausalLM
from sae_transformers.cli.evaluate import with_registered_suites
from sae_transformers.evaluation.method_ids import MethodId
from sae_transformers.evaluation.results import Measurement, SuiteResult, read_results, with_methods
from sae_transformers.evaluation.steering_methods import METHODS, MethodMaker, Prompting, register_steering_method
from sae_transformers.evaluation.suites import SUITES, CardFacts, Suite, register_suite
from sae_transformers.hub_cards.facts import read_model
from sae_transformers.hub_cards.model_card import model_card
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_base, tiny_sae

CONCEPTS = {"prompt injection": 3, "mean-spirited": 5, "base rate neglect": 9}


@dataclass(frozen=True)
class ToyOptions:
    """Options of the toy suite.

    Args:
        toy_words: words that are counted.
        toy_weight: weight of a word.
    """

    PANEL: ClassVar[str] = "Suite toy"

    toy_words: str | None = None
    toy_weight: float = 2.0


@dataclass(frozen=True)
class ToySuite(Suite):
    """Counts words, once for each concept."""

    Options: ClassVar[type] = ToyOptions
    needs: ClassVar[tuple[str, ...]] = ("toy_words",)
    texts_of: ClassVar[tuple[str, ...]] = ("words",)
    card: ClassVar[CardFacts] = CardFacts("other", of_features=("toy_count",))

    words: str
    weight: float = 2.0

    @classmethod
    def read(cls, options: Any, inputs: Any) -> ToySuite:
        return cls(options.toy_words, options.toy_weight)

    def measure(self, model: Any, tokenizer: Any, watch: Any) -> SuiteResult:
        watch.done(1)
        value = self.weight * len(self.words.split())
        methods = [MethodId("feature", name, 0, latent, name) for name, latent in CONCEPTS.items()]
        found = [Measurement("toy_count", value + of.feature, of.label, data="words") for of in methods]  # pyright: ignore
        return SuiteResult("toy", {}, with_methods(found, methods))

    def steps(self, model: Any) -> int:
        return 1


@dataclass(frozen=True)
class ShoutOptions:
    """Options of the toy method.

    Args:
        shout: what is shouted.
    """

    PANEL: ClassVar[str] = "Suite steering"

    shout: str = ""


class Shouting(MethodMaker):
    """An instruction by another name."""

    Options: ClassVar[type | None] = ShoutOptions

    @classmethod
    def read(cls, options: ShoutOptions, inputs: Any) -> MethodMaker | None:
        return Prompting(options.shout) if options.shout else None


@pytest.fixture
def registered() -> Iterator[None]:
    register_suite("toy", ToySuite)
    register_steering_method("shout", Shouting)
    yield
    del SUITES["toy"], METHODS["shout"]


@pytest.fixture
def app(registered: None, command_line: None) -> typer.Typer:
    made = typer.Typer()
    made.command()(with_registered_suites())
    made.command("other")(lambda: None)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saes = [tiny_sae(layer=1, site="resid_post", concepts=CONCEPTS)]
    SaeForCausalLM.from_base(tiny_base(vocab_size=94), saes=saes, weights_scope="full").save_pretrained(
        tmp_path / "model"
    )
    word_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def test_a_registered_suite_is_in_help_record_card_and_plot(app: typer.Typer, folder: Path) -> None:
    help_text = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "200"}).output
    for told in ("Suite toy", "--toy-words", "Words that are counted.", "--toy-weight", "--shout", "What is shouted."):
        assert told in help_text
    command = ["evaluate", str(folder / "model"), "--suite", "toy", "--toy-words", "a b c", "--out", str(folder)]
    result = CliRunner().invoke(app, [*command, "--plots"])
    assert result.exit_code == 0, result.output
    assert "toy_count" in result.output and (folder / "toy.png").is_file()
    record = read_results(folder / "results.json")
    assert record.suites["toy"].value("toy_count", "mean-spirited") == 11.0
    assert record.suites["toy"].settings["asked"] == {"weight": 2.0} and record.suites["toy"].data[0].name == "words"
    assert "--toy-words 'a b c'" in record.command
    card = model_card(read_model(folder / "model"), results=record)
    assert "### toy" in card and "type: toy_count" in card
    for name in CONCEPTS:  # whatever a concept is called
        assert f"toy: toy_count ({name})" in card
        assert any(line.startswith("| 0 |") and name in line and "toy_count" in line for line in card.splitlines())
    again = CliRunner().invoke(app, command)
    assert "already" in again.output


def test_what_a_registered_suite_needs_is_said(app: typer.Typer, folder: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(folder / "model"), "--suite", "toy"])
    assert result.exit_code == 2 and "needs `toy_words`" in result.stderr


def test_the_suite_intervention_runs_where_it_is_named_and_not_else(app: typer.Typer, folder: Path) -> None:
    options = ["--interventions", "3", "--max-new-tokens", "2", "--similarity", "words", "--out", str(folder)]
    result = CliRunner().invoke(app, ["evaluate", str(folder / "model"), "--suite", "intervention", *options])
    assert result.exit_code == 0, result.output
    assert "similarity_minus_random" in result.output and "random feature" in result.output
    record = read_results(folder / "results.json").suites["intervention"]
    assert len(record.curves["by_feature"]) == 3 and record.settings["similarity"] == "words"
    options = ["--repeats", "1", "--prompt-tokens", "4", "--generated-tokens", "1", "--out", str(folder / "other")]
    result = CliRunner().invoke(app, ["evaluate", str(folder / "model"), *options])
    assert result.exit_code == 0, result.output
    assert "intervention" not in read_results(folder / "other" / "results.json").suites
    assert "### intervention" not in model_card(read_model(folder / "model"))
