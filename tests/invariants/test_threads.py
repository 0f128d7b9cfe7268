"""Several threads steer one model in different ways: each gets what it would get alone, and nothing is left behind."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sae_transformers import FeatureEdit, Steering
from tests.covering import covering
from tests.tiny import prompt, tiny_base, tiny_model

ROUNDS, STEPS = 12, 5
STEERINGS = (
    Steering([FeatureEdit(feature=3, op="add", value=6.0)]),
    Steering([FeatureEdit(feature=7, op="set", value=-5.0), FeatureEdit(feature=40, op="scale", value=3.0)]),
    Steering([FeatureEdit(feature=11, op="direction", value=9.0)], positions="generated"),
    False,
)


@pytest.fixture
def model():
    return tiny_model(concepts={"anger": 3})


def together(jobs) -> list:
    """Results of jobs that all start at once, one thread each."""
    start = threading.Barrier(len(jobs))

    def run(job):
        start.wait(timeout=30)
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(run, job) for job in jobs]]


def generated(model, **options) -> tuple[torch.Tensor, torch.Tensor]:
    out = model.generate(
        prompt(), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, output_scores=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.scores)


def passed(model, **options) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        out = model(prompt(), output_features=True, **options)
    return out.logits, out.sae_features[0].to_dense()


def same(found, expected) -> bool:
    return all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def in_block(model, call, steering):
    with model.steered(steering):
        return call(model)


def assert_unsteered(model) -> None:
    ids, plain = prompt(), tiny_base()
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        assert torch.equal(model.lm(input_ids=ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)
    assert model._slot.get() is None and model._scope.current() is None and model._scope.latest is None
    assert model._scope.generation is None
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    assert torch.equal(model.lm.generate(ids, **options), plain.generate(ids, **options))


@pytest.mark.parametrize(
    ("how", "call", "threads"), covering(["argument", "block"], [generated, passed], [2, 4], times=2)
)
def test_every_thread_gets_what_it_would_get_alone(model, threads, call, how):
    def job(steering):
        if how == "argument":
            return call(model, steering=steering)
        return in_block(model, call, steering)

    chosen = STEERINGS[:threads]
    alone = [job(steering) for steering in chosen]
    for i in range(threads):
        for j in range(i):
            assert not same(alone[i][:1], alone[j][:1]), "the steerings must differ"
    wrong = 0
    for _ in range(ROUNDS):
        results = together([lambda s=s: job(s) for s in chosen])
        wrong += sum(not same(found, expected) for found, expected in zip(results, alone, strict=True))
    assert wrong == 0
    assert_unsteered(model)


def test_losses_and_features_of_threads_do_not_mix():
    model = tiny_model(concepts={"anger": 3})
    model.config.loss_weights = {"lm": 1.0, "reconstruction": 1.0, "sparsity": 1.0, "conditioning": 1.0}

    def job(label, ids):
        grads = torch.autograd.grad(model(ids, labels=ids, concept_targets=label).loss, list(model.saes.parameters()))
        return list(grads)

    cases = [(torch.tensor([0.0, 0.0]), prompt(seed=1)), (torch.tensor([1.0, -100.0]), prompt(seed=2))]
    alone = [job(*case) for case in cases]
    for _ in range(ROUNDS):
        for found, expected in zip(together([lambda c=c: job(*c) for c in cases]), alone, strict=True):
            assert same(found, expected)
    assert_unsteered(model)


def test_a_worker_thread_sees_the_only_block(model):
    alone = passed(model, steering=STEERINGS[0])
    with model.steered(STEERINGS[0]):
        (seen,) = together([lambda: passed(model)])
        (own,) = together([lambda: in_block(model, passed, STEERINGS[1])])
        (none,) = together([lambda: passed(model, steering=False)])
    assert same(seen, alone)
    assert same(own, passed(model, steering=STEERINGS[1]))
    assert same(none, passed(model))
    assert_unsteered(model)


def test_with_two_blocks_an_unrelated_thread_must_say_what_it_wants(model):
    entered, leave = threading.Event(), threading.Event()
    failures = []

    def other():
        with model.steered(STEERINGS[1]):
            entered.set()
            leave.wait(timeout=30)

    def unrelated():
        try:
            model(prompt())
        except RuntimeError as error:
            failures.append(str(error))
        return passed(model, steering=STEERINGS[0])

    worker = threading.Thread(target=other)
    alone = passed(model, steering=STEERINGS[0])
    with model.steered(STEERINGS[0]):
        worker.start()
        assert entered.wait(timeout=30)
        (explicit,) = together([unrelated])
        assert same(passed(model), alone), "the thread's own block"
        leave.set()
        worker.join(timeout=30)
        (worker_after,) = together([lambda: passed(model)])
    assert len(failures) == 1 and "2 threads steer this model" in failures[0] and "steering=" in failures[0]
    assert same(explicit, alone) and same(worker_after, alone)
    assert_unsteered(model)


def test_blocks_that_overlap_without_nesting_leave_nothing(model):
    """A enters, B enters, A leaves, B leaves: B's block must not bring A's back."""
    in_a, in_b, out_a = (threading.Event() for _ in range(3))

    def a():
        with model.steered(STEERINGS[0]):
            in_a.set()
            assert in_b.wait(timeout=30)
        out_a.set()

    def b():
        assert in_a.wait(timeout=30)
        with model.steered(STEERINGS[1]):
            in_b.set()
            assert out_a.wait(timeout=30)
            return passed(model), model._scope.latest is model.prepare_steering(STEERINGS[1])

    _, (found, latest_is_own) = together([a, b])
    assert same(found, passed(model, steering=STEERINGS[1])) and latest_is_own
    assert_unsteered(model)


def test_readers_never_trip_over_blocks_that_open_and_close(model):
    alone, steered = passed(model, steering=False), passed(model, steering=STEERINGS[0])
    done = threading.Event()

    def toggle():
        try:
            for _ in range(3000):
                with model.steered(STEERINGS[0]):
                    pass
        finally:
            done.set()

    def read():
        count = 0
        while not done.is_set():
            found = passed(model)
            assert same(found, alone) or same(found, steered)
            for _ in range(200):
                model._scope.current()
            count += 1
        return count

    assert together([toggle, read])[1] > 0
    assert_unsteered(model)


def test_nested_blocks_restore_the_outer_one(model):
    outer, inner = (passed(model, steering=s) for s in STEERINGS[:2])
    plain = passed(model)
    with model.steered(STEERINGS[0]) as same_model:
        assert same_model is model
        assert same(passed(model), outer)
        with model.steered(STEERINGS[1]):
            assert same(passed(model), inner)
            with model.steered(False):
                assert same(passed(model), plain)
            assert same(passed(model), inner)
        assert same(passed(model), outer)
    assert same(passed(model), plain)
    assert_unsteered(model)


def test_exceptions_leave_nothing_behind(model):
    class Stop(Exception):
        pass

    with pytest.raises(Stop), model.steered(STEERINGS[0]):
        raise Stop
    assert_unsteered(model)

    def fail(module, args, output):
        raise Stop

    handle = model.lm.model.layers[2].register_forward_hook(fail)  # after the SAE has worked
    for call in (generated, passed):
        with pytest.raises(Stop):
            call(model, steering=STEERINGS[0])
        with pytest.raises(Stop), model.steered(STEERINGS[1]):
            call(model)
    handle.remove()
    assert_unsteered(model)
    with pytest.raises(ValueError, match="feature=64"):
        generated(model, steering=Steering([FeatureEdit(feature=64, op="add", value=1.0)]))
    assert_unsteered(model)


def test_the_base_object_is_itself_again_after_every_call():
    from sae_transformers import SaeForCausalLM
    from tests.tiny import tiny_sae

    base = tiny_base()
    ids = prompt()
    with torch.no_grad():
        before = base(input_ids=ids).logits
        model = SaeForCausalLM.from_base(base, [tiny_sae(layer=1)])
        generated(model, steering=STEERINGS[0])
        assert not torch.equal(passed(model, steering=STEERINGS[1])[0], before)
        assert torch.equal(base(input_ids=ids).logits, before)
        with model.steered(STEERINGS[0]):  # a block concerns the model, not the base under it
            assert torch.equal(base(input_ids=ids).logits, before)
            assert not torch.equal(model(ids).logits, before)
