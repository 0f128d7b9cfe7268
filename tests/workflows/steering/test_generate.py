"""`generate` as a function: what each steering writes is what the model's own `generate` writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sae_transformers import (
    FeatureEdit,
    FeatureReweighting,
    GenerateSettings,
    GenerationSettings,
    SaeForCausalLM,
    Steering,
    generate,
)
from sae_transformers.workflows.settings.generate import TypedSteering
from sae_transformers.workflows.steering.typed_edits import typed_steerings
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_base, tiny_sae

GREEDY = GenerateSettings(generation=GenerationSettings(6, 0.0))
SAMPLED = GenerateSettings(generation=GenerationSettings(6, 1.0, samples_per_prompt=2))
PUSH = Steering([FeatureEdit(1, "rivers", "direction", 30.0)])


@pytest.fixture(scope="module")
def model() -> SaeForCausalLM:
    saes = [tiny_sae(layer=1), tiny_sae(layer=2, feature_names={"5": "rivers"})]
    return SaeForCausalLM.from_base(tiny_base(), saes=saes).eval()


def by_the_model(model: SaeForCausalLM, prompt: str, steering: Steering | bool) -> str:
    tokenizer = word_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    found = model.generate(ids, steering=steering, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def test_texts_are_those_of_the_model(model: SaeForCausalLM, tmp_path: Path) -> None:
    scale = Steering([FeatureEdit(0, 3, "scale", -20.0)], keep_error=False)
    found = generate(model, word_tokenizer(), ["w1 w2 w3", "w9"], {"push": PUSH, "scaled": scale}, GREEDY)
    for number, prompt in enumerate(found.prompts):
        for label, steering in {"unsteered": False, "push": PUSH, "scaled": scale}.items():
            assert found.texts[label][number] == by_the_model(model, prompt, steering)
    assert len({tuple(texts) for texts in found.texts.values()}) == 3
    assert [row["steering"] for row in found.rows()] == ["unsteered", "push", "scaled"] * 2
    assert list(found.table()[1]) == ["prompt", "unsteered", "push", "scaled"]
    assert list(found.to_frame()) == ["prompt", "sample", "steering", "text", "perplexity"]
    assert "<table>" in found._repr_html_() and json.loads(json.dumps(found.to_dict()))["steerings"]["push"]["edits"]
    found.save(tmp_path / "texts.csv")
    assert len((tmp_path / "texts.csv").read_text().splitlines()) == 7


def test_texts_that_grow_are_those_that_do_not(model: SaeForCausalLM) -> None:
    one = GenerateSettings(generation=GenerationSettings(6, 1.0, seed=3))
    at_once = generate(model, word_tokenizer(), "w1 w2 w3", PUSH, one)
    pieces: dict[str, str] = {}
    grown = generate(
        model, word_tokenizer(), "w1 w2 w3", PUSH, one,
        on_text=lambda label, text: pieces.update({label: pieces.get(label, "") + text}),
    )  # fmt: skip
    assert grown.texts == at_once.texts
    assert [pieces["unsteered"].strip()] == grown.texts["unsteered"]
    assert [pieces["steered"].strip()] == grown.texts["steered"]
    with pytest.raises(ValueError, match="`on_text` is for one prompt and one sample. Received: 2 texts"):
        generate(model, word_tokenizer(), ["w1", "w2"], PUSH, one, on_text=lambda label, text: None)


def test_samples_share_their_random_numbers(model: SaeForCausalLM) -> None:
    nothing = Steering([FeatureEdit(0, 3, "direction", 0.0)])
    done = []
    found = generate(
        model, word_tokenizer(), ["w1 w2", "w3"], {"nothing": nothing}, SAMPLED,
        progress=lambda *at: done.append(at),
    )  # fmt: skip
    assert found.texts["nothing"] == found.texts["unsteered"]
    assert len(set(found.texts["unsteered"])) == 4 and done[-1] == (8, 8)
    assert [row["sample"] for row in found.rows()] == [0, 0, 1, 1] * 2


def test_the_models_own_steering_is_the_default(model: SaeForCausalLM) -> None:
    assert list(generate(model, word_tokenizer(), "w1", None, GREEDY).texts) == ["unsteered"]
    own = SaeForCausalLM.from_base(tiny_base(), saes=list(model.saes)).eval()
    own.steering = PUSH
    expected = generate(model, word_tokenizer(), "w1", PUSH, GREEDY).texts
    assert generate(own, word_tokenizer(), "w1", None, GREEDY).texts == expected
    alone = generate(own, word_tokenizer(), "w1", None, GenerateSettings(False, GREEDY.generation))
    assert alone.texts == {"steered": expected["steered"]}
    own.generation_config.sae_steering = {"edits": [{"feature": 3, "op": "ablate"}]}  # pyright: ignore
    assert generate(own, word_tokenizer(), "w1", None, GREEDY).steerings["steered"].feature_edits[0].op == "ablate"


def test_what_cannot_be_steered_is_told_first(model: SaeForCausalLM) -> None:
    with pytest.raises(ValueError, match="Received: 'lakes'|feature='lakes'"):
        generate(model, word_tokenizer(), "w1", Steering([FeatureEdit(0, "lakes", "scale", 1.0)]), GREEDY)
    with pytest.raises(ValueError, match="'unsteered' is what"):
        generate(model, word_tokenizer(), "w1", {"unsteered": PUSH}, GREEDY)
    with pytest.raises(ValueError, match="Expected a list of prompts"):
        generate(model, word_tokenizer(), [], PUSH, GREEDY)


# -- steerings as one types them --------------------------------------------------------------------------------------


def edit(feature: int | str, op: str, value: float | None = None, unit: str = "absolute", sae: int = 0) -> FeatureEdit:
    return FeatureEdit(sae, feature, op, value, unit)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ({}, {}),
        ({"scale": ("0=-100",)}, {"scale 0=-100": Steering([edit(0, "scale", -100.0)])}),
        (
            {"scale": ("0=-100/100",), "set": ("1:9=2.5",), "positions": "last_prompt", "drop_error": True},
            {
                f"scale 0={v}, set 1:9=2.5": Steering(
                    [edit(0, "scale", float(v)), edit(9, "set", 2.5, sae=1)], "last_prompt", keep_error=False
                )
                for v in ("-100", "100")
            },
        ),
        (
            {"feature": ("rivers = 3x", "joy=-.2n")},
            {
                "direction rivers=3x, direction joy=-.2n": Steering(
                    [edit("rivers", "direction", 3.0, "max"), edit("joy", "direction", -0.2, "norm")], [(1, None)]
                )
            },
        ),
        ({"ablate": ("1:joy",)}, {"ablate 1:joy": Steering([edit("joy", "ablate", sae=1)])}),
        ({"erase": ("9", "joy")}, {"erase 9, erase joy": Steering([edit(9, "erase"), edit("joy", "erase")])}),
        (
            {"add": ("5=1e2",), "positions": "0:-1, 7:"},
            {"add 5=1e2": Steering([edit(5, "add", 100.0)], [(0, -1), (7, None)])},
        ),
    ],
)  # fmt: skip
def test_edits_as_text(typed: dict, expected: dict) -> None:
    assert typed_steerings(TypedSteering(**typed)) == expected


def test_a_steering_by_file_and_name_at_strengths(tmp_path: Path) -> None:
    (tmp_path / "pirates.json").write_text(PUSH.to_json())
    by_name = typed_steerings(TypedSteering("pirates"), str(tmp_path))
    assert by_name == {"pirates": PUSH} == typed_steerings(TypedSteering(str(tmp_path / "pirates.json")))
    assert typed_steerings(TypedSteering(PUSH.to_json())) == {"steered": PUSH}
    twice = typed_steerings(TypedSteering("pirates", (0.5, -2.0)), str(tmp_path))
    values = {label: steering.feature_edits[0].value for label, steering in twice.items()}
    assert values == {"pirates x 0.5": 15.0, "pirates x -2": -60.0}


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ({"scale": ("0",)}, "FEATURE=VALUE, such as 0=-100 or rivers=3x. Received: scale '0'"),
        ({"set": ("=4",)}, "Received: set '=4'"),
        ({"set": ("9=lots",)}, "must be a number, .*Received: 'lots' in set '9=lots'"),
        ({"set": ("9=1/",)}, "Received: '' in set '9=1/'"),
        ({"scale": ("9=2x",)}, "takes no unit"),
        ({"scale": ("0=1/2",), "set": ("1=1/2/3",)}, "need equally many"),
        ({"scale": ("0=1",), "positions": "a:b"}, "ranges such as 1: or 0:-1,5:7. Received: 'a:b'"),
        ({"scale": ("0=1",), "positions": "begin"}, "`positions` must be one of"),
        ({"scale": ("0=1",), "steering": "{}"}, "give it alone"),
        ({"scale": ("0=1",), "strengths": (2.0,)}, "multiply a `steering`"),
        ({"positions": "all"}, "are of edits"),
        ({"steering": '{"edits": [{"feature": 1, "value": 2}]}', "strengths": (2.0,)}, "a steering with scale"),
        (
            {"steering": Steering([FeatureReweighting(0, (1.0,))]).to_json(), "strengths": (2.0,)},
            "a steering with re-weighting",
        ),
        ({"steering": "{"}, "must be the JSON of a Steering"),
    ],
)
def test_text_that_is_no_steering(typed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        typed_steerings(TypedSteering(**typed))


def test_a_steering_that_is_nowhere(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OSError, match="neither a file, nor one of .*it has config.json. Received: steering='pirates'"):
        typed_steerings(TypedSteering("pirates"), str(tmp_path))
