"""Comparing tensors: what counts as a difference, how large it is, which one is the worst."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from pipecompile.compare import buffers, differences, gradients, gradients_aside, worst


def one(got: Tensor | None, expected: Tensor | None, other: float = 0.0):
    """The difference of a single tensor beside a large one that agrees."""
    large = torch.full((4,), other)
    found = list(differences({"a.w": got, "b.w": large}, {"a.w": expected, "b.w": large}, "gradient of"))
    assert [difference.name for difference in found] == ["gradient of a.w", "gradient of b.w"]
    assert found[1].error == 0.0
    return found[0]


def test_equal_tensors_do_not_differ() -> None:
    difference = one(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    assert difference.error == 0.0
    assert difference.ok


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float64, 1e-9), (torch.float32, 2e-5), (torch.float16, 2e-2), (torch.bfloat16, 6e-2)]
)
def test_the_error_is_relative_to_the_norm_and_judged_by_dtype(dtype: torch.dtype, allowed: float) -> None:
    expected = torch.tensor([3.0, 4.0], dtype=dtype)
    difference = one(torch.tensor([3.0, 5.0], dtype=dtype), expected)
    assert difference.error == pytest.approx(1 / 5)
    assert difference.allowed == allowed
    assert not difference.ok


def test_noise_around_zero_is_compared_with_the_largest_tensor() -> None:
    noise, zero = torch.tensor([1e-9]), torch.tensor([0.0])
    assert one(noise, zero, other=1.0).error == pytest.approx(1e-9 / (1e-5 * 2))
    assert one(noise, zero, other=0.0).error == math.inf


def test_a_bias_is_judged_beside_its_weight() -> None:
    """The gradient of a key's bias is zero in exact arithmetic; what is left is rounding."""
    expected = {"key.weight": torch.tensor([3.0, 4.0]), "key.bias": torch.tensor([1e-8]), "other.bias": torch.ones(1)}
    got = {**expected, "key.bias": torch.tensor([-1e-8])}
    errors = {difference.name: difference.error for difference in differences(got, expected, "of")}
    assert errors == {"of key.weight": 0.0, "of key.bias": pytest.approx(2e-8 / 5), "of other.bias": 0.0}
    wrong = {**expected, "other.bias": torch.tensor([1.001])}
    assert not worst(list(differences(wrong, expected, "of"))).ok, "another module's gradients do not excuse it"


def test_integers_must_be_equal() -> None:
    assert one(torch.tensor([5]), torch.tensor([5])).ok
    assert not one(torch.tensor([5]), torch.tensor([6])).ok


def test_a_tensor_that_one_side_lacks_is_infinitely_far() -> None:
    assert one(None, torch.ones(2)).error == math.inf
    assert one(torch.ones(2), None).error == math.inf
    assert one(None, None).ok
    assert one(torch.zeros(2), None).ok, "no gradient and a gradient of zero train the same"


def test_not_a_number_is_the_worst() -> None:
    expected = {"a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1)}
    got = {"a": torch.tensor([math.nan]), "b": torch.tensor([3.0]), "c": torch.ones(1)}
    bad = worst(list(differences(got, expected, "loss")))
    assert bad.name == "loss a"
    assert not bad.ok


def test_the_worst_is_the_one_beyond_what_is_allowed() -> None:
    expected = {"half": torch.ones(1, dtype=torch.bfloat16), "single": torch.ones(1)}
    got = {"half": torch.tensor([1.03], dtype=torch.bfloat16), "single": torch.tensor([1.001])}
    bad = worst(list(differences(got, expected, "gradient of")))
    assert bad.name == "gradient of single", "its error is smaller, but it is not allowed"


def test_gradients_and_buffers_are_copies() -> None:
    model = nn.BatchNorm1d(2)
    model(torch.randn(4, 2)).sum().backward()
    taken, kept = gradients(model), buffers(model)
    before = {name: tensor.clone() for name, tensor in {**taken, **kept}.items()}
    model(torch.randn(4, 2)).square().sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in {**taken, **kept}.items())
    assert set(kept) == {"running_mean", "running_var", "num_batches_tracked"}


def test_gradients_come_back_after_the_comparison() -> None:
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    gradient = model.weight.grad
    with gradients_aside(model):
        assert model.weight.grad is None
        model(torch.ones(3, 2)).sum().backward()
    assert model.weight.grad is gradient
