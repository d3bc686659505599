"""A backward with large gradients summed in place gives what autograd gives, and keeps to autograd where it must."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from pipecompile.runtime import whole_backward
from pipecompile.runtime.whole_backward import Summed
from tests.runtime.test_split_backward import Function, autocasts, tied, weight

W = 300
CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    # a module of W numbers, and how many of its parameters are summed in place
    "linear": (lambda: nn.Sequential(nn.Linear(W, W), nn.GELU(), nn.Linear(W, W)), 2),
    "without bias": (lambda: nn.Sequential(nn.Linear(W, W, bias=False), nn.Linear(W, W, bias=False)), 2),
    "as GPT-2": (lambda: Function(lambda p, x: torch.addmm(p[0], x, p[1]), weight(W), weight(W, W)), 1),
    "product": (lambda: Function(lambda p, x: x @ p[0], weight(W, W)), 1),
    "used twice": (lambda: Function(lambda p, x: p[0](p[0](x).tanh()), nn.Linear(W, W)), 0),
    "tied": (lambda: Function(tied, nn.Linear(W, W, bias=False)), 0),
    "also used otherwise": (lambda: Function(lambda p, x: p[0](x) * p[0].weight.sum(), nn.Linear(W, W)), 0),
    "frozen bias": (lambda: Function(lambda p, x: p[0](x), _frozen(nn.Linear(W, W))), 1),
    "small": (lambda: nn.Linear(W, 20), 0),
    "autocast": (lambda: Function(autocasts, nn.Linear(W, W)), 0),
    "reentrant checkpoint": (
        lambda: Function(lambda p, x: checkpoint(p[0], x, use_reentrant=True), nn.Linear(W, W)),
        0,
    ),
    "self attention": (lambda: Function(_attends, nn.Linear(W, 3 * W), nn.LayerNorm(W), nn.Linear(W, W)), 2),
}


def _frozen(linear: nn.Linear) -> nn.Linear:
    linear.bias.requires_grad_(False)
    return linear


def _attends(p: Any, x: Tensor) -> Tensor:
    q, k, v = p[0](p[1](x)).chunk(3, -1)
    return x + p[2](F.scaled_dot_product_attention(q[None], k[None], v[None])[0])


@pytest.fixture(autouse=True)
def always_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_backward, "WORTH", 1)


@pytest.mark.parametrize("received", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_sums_equal_autograd(case: str, received: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    make, summed = CASES[case]
    calls: list[Any] = []
    call = whole_backward.Sum.__call__
    monkeypatch.setattr(whole_backward.Sum, "__call__", lambda self, g: calls.append(g) or call(self, g))
    torch.manual_seed(0)
    plain = make()
    module = copy.deepcopy(plain)
    how = Summed()
    for step in range(3):
        calls.clear()
        x = torch.randn(40, W)
        leaf, mine = (x.clone().requires_grad_(received) for _ in range(2))
        y = plain(leaf)
        gradient = torch.randn_like(y)
        if not y.requires_grad:
            return
        y.backward(gradient)
        how.backward([get_gradient_edge(module(mine))], [gradient], [mine] if received else [])
        if received:
            assert torch.equal(mine.grad, leaf.grad)
            assert len(calls) == summed
        for (name, expected), got in zip(plain.named_parameters(), module.parameters(), strict=True):
            if expected.grad is None:
                assert got.grad is None
            else:
                limit = 1e-6 * expected.grad.abs().max().item() if step else 0.0
                torch.testing.assert_close(got.grad, expected.grad, rtol=0, atol=limit, msg=name)
                assert got.grad.stride() == expected.grad.stride()


def test_hooks_see_whole_gradients() -> None:
    module, how, seen = nn.Linear(W, W), Summed(), []
    for hooks in (False, True):
        if hooks:
            module.weight.register_hook(lambda g: seen.append(g.clone()))
        leaf = torch.randn(4, W, requires_grad=True)
        how.backward([get_gradient_edge(module(leaf))], [torch.ones(4, W)], [leaf])
        expected = leaf.detach().sum(0).expand(W, W)
    torch.testing.assert_close(seen[0], expected)


def test_a_graph_that_changes() -> None:
    module = nn.ModuleDict({name: nn.Linear(W, W) for name in "ab"})
    reference = copy.deepcopy(module)
    how = Summed()
    forms: list[Callable[[Any, Tensor], Tensor]] = [
        lambda m, x: m["b"](m["a"](x).relu()),
        lambda m, x: m["a"](x),
        lambda m, x: m["a"](m["a"](x)),
        lambda m, x: m["b"](m["a"].requires_grad_(False)(x)),
        lambda m, x: m["b"](m["a"].requires_grad_(True)(x)),
    ]
    for form in forms:
        x, gradient = torch.randn(8, W), torch.randn(8, W)
        form(reference, x).backward(gradient)
        how.backward([get_gradient_edge(form(module, x))], [gradient], [])
        for (name, expected), got in zip(reference.named_parameters(), module.parameters(), strict=True):
            assert (got.grad is None) == (expected.grad is None), name
            if expected.grad is not None:
                torch.testing.assert_close(got.grad, expected.grad, rtol=1e-5, atol=1e-5, msg=name)


def test_what_was_saved_is_freed_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook lets go of its operation's input when it has run, though the graph still lives."""
    made: list[weakref.ref[Any]] = []
    start = whole_backward.Sum.__init__

    def init(self: Any, parameter: Tensor, transposed: bool, formula: Any) -> None:
        made.append(weakref.ref(formula))
        start(self, parameter, transposed, formula)

    monkeypatch.setattr(whole_backward.Sum, "__init__", init)
    module, leaf = nn.Linear(W, W), torch.randn(4, W, requires_grad=True)
    edge = get_gradient_edge(module(leaf))
    Summed().backward([edge], [torch.ones(4, W)], [leaf])
    assert [formula() for formula in made] == [None]
    del edge


def test_where_it_saves_little_autograd_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_backward, "WORTH", 1 << 30)
    monkeypatch.setattr(whole_backward.Sum, "__call__", lambda self, g: pytest.fail("summed"))
    module, how = nn.Linear(W, W), Summed()
    for _ in range(2):
        leaf = torch.randn(4, W, requires_grad=True)
        how.backward([get_gradient_edge(module(leaf))], [torch.ones(4, W)], [leaf])
    assert module.weight.grad is not None


def test_what_was_received_but_not_used_has_no_gradient() -> None:
    module, how = nn.Linear(W, W), Summed()
    for _ in range(2):
        used, unused = (torch.randn(4, W, requires_grad=True) for _ in range(2))
        how.backward([get_gradient_edge(module(used))], [torch.ones(4, W)], [used, unused])
        assert used.grad is not None
        assert unused.grad is None
    torch.testing.assert_close(module.bias.grad, torch.full((W,), 8.0))
