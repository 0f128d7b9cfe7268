from dataclasses import replace

import pytest
import torch

from sae_transformers import FeatureEdit, Steering
from sae_transformers.evaluation.suites import SpeedSuite
from sae_transformers.evaluation.suites.settings import SpeedSettings
from tests.create_training_data.words import word_tokenizer
from tests.tiny import prompt, tiny_model

SMALL = SpeedSettings(prompt_tokens=8, generated_tokens=3, repeats=2)


def test_all_calls_are_timed_and_the_model_is_as_it_was() -> None:
    model = tiny_model().eval()
    model.steering = Steering([FeatureEdit(0, 3, "direction", 5.0)])
    before = model(input_ids=prompt()).logits
    seen: list[int] = []
    found = SpeedSuite(replace(SMALL, batch_size=2))(model, word_tokenizer(), report=seen.append)
    assert torch.equal(model(input_ids=prompt()).logits, before) and sum(seen) == 3 * 2
    times = {}
    for row in found.curves["repeats"]:
        times.setdefault((row["call"], row["method"]), []).append((row["seconds"], row["cost"]))
    assert all(len(some) == 2 and min(min(one) for one in some) > 0 for some in times.values())
    methods = {"forward": 4, "generate": 3, "decode": 2}
    assert {kind: sum(call == kind for call, _ in times) for kind in methods} == methods
    for (call, method), some in times.items():
        tokens = 2 * (8 if call == "forward" else 3)
        assert found.value(f"{call}_tokens_per_s", method) == pytest.approx(tokens / min(clock for clock, _ in some))
        if method != "base":
            ratio = min(cost for _, cost in some) / min(cost for _, cost in times[call, "base"])
            assert found.value(f"{call}_time_ratio", method) == pytest.approx(ratio)
    sae = sum(t.numel() * t.element_size() for t in [*model.saes[0].parameters(), *model.saes[0].buffers()])
    assert found.value("sae_bytes", "1 SAEs") == sae
    assert found.value("base_bytes", "base") == 4 * sum(
        t.numel() for t in [*model.lm.parameters(), *model.lm.buffers()]
    )
    assert found.settings["threads"] == torch.get_num_threads() and found.settings["dtype"] == "float32"


def test_without_steering_it_is_left_out() -> None:
    found = SpeedSuite(SMALL)(tiny_model().eval(), word_tokenizer())
    assert "steered" not in {m.method for m in found.measurements} and "not measured" in found.notes[-1]


def test_the_base_is_timed_without_hooks() -> None:
    model = tiny_model().eval()
    hooked = []
    module = model.lm.model.layers[1]
    forward = module.forward
    module.forward = lambda *args, **options: (hooked.append(len(module._forward_hooks)), forward(*args, **options))[1]
    SpeedSuite(SMALL)(model, word_tokenizer())
    assert set(hooked) == {0, 1} and len(module._forward_hooks) == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [({"repeats": 0}, "repeats=0"), ({"prompt_tokens": 126}, "prompt_tokens=126, generated_tokens=3")],
)
def test_bad_counts_are_refused(options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SpeedSuite(replace(SMALL, **options))(tiny_model(), word_tokenizer())
