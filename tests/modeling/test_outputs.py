"""Sparse features and the outputs' form."""

# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

import torch

from sae_transformers import FeatureEdit
from sae_transformers.modeling.base_arguments import cache_argument
from sae_transformers.modeling.outputs import SaeCausalLMOutput, SparseFeatures
from tests.tiny import prompt, tiny_model

DENSE = torch.tensor([[0.0, 2.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0], [5.0, 0.0, 3.0, 1.0]])


def test_sparse_features_are_the_dense_ones():
    found = SparseFeatures.from_dense(DENSE)
    assert found.values.shape == found.indices.shape == (3, 3)
    assert found.d_sae == 4
    assert torch.equal(found.to_dense(), DENSE)
    for feature in range(4):
        assert torch.equal(found.column(feature), DENSE[:, feature])


def test_sparse_features_of_any_shape_and_of_nothing():
    batched = DENSE.expand(2, 3, 4)
    assert torch.equal(SparseFeatures.from_dense(batched).to_dense(), batched)
    assert torch.equal(SparseFeatures.from_dense(torch.zeros(2, 5, 4)).to_dense(), torch.zeros(2, 5, 4))
    empty = SparseFeatures.from_dense(torch.zeros(0, 4))
    assert empty.to_dense().shape == (0, 4)


def test_sparse_features_are_one_short_line_in_print():
    assert repr(SparseFeatures.from_dense(DENSE)) == "SparseFeatures(shape=(3, 4), nnz=5, width=3, dtype=float32)"
    meta = SparseFeatures(torch.zeros(2, 8, device="meta").long(), torch.zeros(2, 8, device="meta").half(), 64)
    assert repr(meta) == "SparseFeatures(shape=(2, 64), nnz=?, width=8, dtype=float16)"
    out = tiny_model()(prompt(), output_features=True)
    assert "SparseFeatures(shape=(2, 9, 64), nnz=" in repr(out.sae_features) and len(repr(out.sae_features)) < 90
    indices, values, d_sae = out.sae_features[0]  # still a tuple of three
    assert indices.shape == values.shape and d_sae == 64


def test_the_fields_of_a_pass_are_those_that_were_asked_for():
    model = tiny_model()
    assert list(model(prompt()).keys()) == ["logits", cache_argument(model.lm)]
    out = model(prompt(), output_features=True, output_sae_inputs=True, use_cache=False)
    assert isinstance(out, SaeCausalLMOutput)
    assert list(out.keys()) == ["logits", "sae_features", "sae_inputs"]
    assert out.sae_features[0].values.shape == (2, 9, 8)
    assert out.sae_inputs[0].shape == (2, 9, 32)
    dense = model.saes[0].encode(out.sae_inputs[0])
    assert torch.equal(out.sae_features[0].to_dense(), dense)
    chosen = model(prompt(), features=[5, 0, 63]).sae_features[0]
    assert torch.equal(chosen, dense[..., [5, 0, 63]])
    pre = model(prompt(), features=[5, 0], pre_activations=True).sae_features[0]
    torch.testing.assert_close(pre, model.saes[0].encode_pre_acts(out.sae_inputs[0])[..., [5, 0]])


def test_a_tuple_holds_the_same():
    model = tiny_model()
    whole = model(prompt(), output_features=True, use_cache=False)
    parts = model(prompt(), output_features=True, use_cache=False, return_dict=False)
    assert isinstance(parts, tuple)
    assert torch.equal(parts[0], whole.logits)
    assert torch.equal(parts[1][0].values, whole.sae_features[0].values)


def test_features_are_those_before_the_edit():
    """What is reported is what the text shows, not what steering made of it."""
    model = tiny_model()
    plain = model(prompt(), features=[3]).sae_features[0]
    edit = [FeatureEdit(feature=3, op="set", value=9.0)]
    assert torch.equal(model(prompt(), features=[3], steering=edit).sae_features[0], plain)


def test_stopping_early_reports_the_same_and_no_logits():
    model = tiny_model()
    whole, early = model(prompt(), output_features=True), model(prompt(), output_features=True, stop_at_last_sae=True)
    assert early.logits is None
    assert torch.equal(early.sae_features[0].values, whole.sae_features[0].values)
