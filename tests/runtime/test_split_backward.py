"""The two halves of a backward give what the whole gives; parameters wait, saved tensors do not.

They agree to the last bit, except that a large product which is added to an earlier gradient may round otherwise.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, save_on_cpu
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from pipecompile.runtime import split_backward
from pipecompile.runtime.split_backward import WORTH, Known, input_half, weight_half
from pipecompile.runtime.weight_formulas import LARGE, Product


@pytest.fixture(autouse=True)
def always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_backward, "WORTH", 1)


class Function(nn.Module):
    """A module out of a function of (parts, input)."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.parts = nn.ModuleList(p for p in parts if isinstance(p, nn.Module))
        self.weights = nn.ParameterList(p for p in parts if isinstance(p, nn.Parameter))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function([*self.parts, *self.weights], x)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def tied(p: Any, x: Tensor) -> Tensor:
    return F.linear(p[0](p[0](x)), p[0].weight.t())


def embeds_and_projects(p: Any, x: Tensor) -> Tensor:
    return F.linear(p[0](x.argmax(1)) + x, p[0].weight)


def autocasts(p: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return p[0](x).float()


def offloads(p: Any, x: Tensor) -> Tensor:
    with save_on_cpu():
        return p[0](x).tanh()


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    # module, shape of its input, how many parameters wait
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 6, bias=False)), (4, 6), 3),
    "large": (lambda: nn.Sequential(nn.Linear(512, 256), nn.GELU(), nn.Linear(256, 512, bias=False)), (600, 512), 3),
    "large, as GPT-2": (
        lambda: Function(lambda p, x: torch.addmm(p[0], x, p[1]), weight(512), weight(256, 512)),
        (600, 256),
        2,
    ),
    "linear of three dimensions": (lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)), (2, 3, 6), 2),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()), (2, 3, 5, 5), 2),
    "strided, grouped, without bias": (lambda: nn.Conv1d(4, 4, 3, stride=2, groups=2, bias=False), (2, 4, 9), 1),
    "transposed convolution": (lambda: nn.ConvTranspose2d(3, 2, 2, stride=2), (2, 3, 4, 4), 2),
    "batch norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), (2, 3, 4, 4), 4),
    "product with a parameter": (lambda: Function(lambda p, x: x @ p[0], weight(6, 5)), (4, 6), 1),
    "addmm, as GPT-2": (lambda: Function(lambda p, x: torch.addmm(p[0], x, p[1]), weight(5), weight(6, 5)), (4, 6), 2),
    "scaled addmm": (
        lambda: Function(lambda p, x: torch.addmm(p[0], x, p[1], alpha=2), weight(5), weight(6, 5)),
        (4, 6),
        0,
    ),
    "whole bias": (lambda: Function(lambda p, x: torch.addmm(p[0], x, p[1]), weight(4, 5), weight(6, 5)), (4, 6), 2),
    "experts": (lambda: Function(lambda p, x: torch.bmm(x, p[0]), weight(3, 6, 5)), (3, 4, 6), 1),
    "used twice": (lambda: Function(lambda p, x: p[0](p[0](x).tanh()), nn.Linear(6, 6)), (4, 6), 2),
    "transposed twice": (lambda: Function(tied, nn.Linear(6, 6, bias=False)), (4, 6), 0),
    "tied embedding": (lambda: Function(embeds_and_projects, nn.Embedding(6, 6)), (4, 6), 1),
    "also used otherwise": (lambda: Function(lambda p, x: p[0](x) * p[0].weight.sum(), nn.Linear(6, 6)), (4, 6), 0),
    "weight norm": (lambda: Function(lambda p, x: p[0](x), weight_norm(nn.Linear(6, 5))), (4, 6), 0),
    "autocast": (lambda: Function(autocasts, nn.Linear(6, 5)), (4, 6), 2),
    "autocast convolution": (lambda: Function(autocasts, nn.Conv1d(3, 4, 3)), (2, 3, 8), 2),
    "checkpoint": (
        lambda: Function(lambda p, x: checkpoint(p[0], x, use_reentrant=False), nn.Linear(6, 5)),
        (4, 6),
        0,
    ),
    "reentrant checkpoint": (
        lambda: Function(lambda p, x: checkpoint(p[0], x, use_reentrant=True), nn.Linear(6, 5)),
        (4, 6),
        0,
    ),
    "offloaded": (lambda: Function(offloads, nn.Linear(6, 5)), (4, 6), 0),
    "transformer layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        (2, 3, 8),
        7,
    ),
    "frozen weight": (lambda: Function(lambda p, x: p[0](x), nn.Linear(6, 5).requires_grad_(False)), (4, 6), 0),
}


def halves(
    module: nn.Module,
    x: Tensor,
    gradient: Tensor,
    watch: Callable[[], None] = lambda: None,
    known: Known | None = None,
) -> Tensor:
    leaf = x.clone().requires_grad_()
    roots = [get_gradient_edge(module(leaf))]
    (received,), rest = input_half(roots, [gradient], [leaf], known)
    del roots
    watch()
    weight_half(rest)
    assert received is not None
    return received


@pytest.mark.parametrize("case", CASES)
def test_halves_equal_the_whole(case: str) -> None:
    make, shape, _ = CASES[case]
    torch.manual_seed(0)
    whole = make()
    split = copy.deepcopy(whole)
    known = Known()
    for step in range(3):
        x = torch.randn(shape)
        leaf = x.clone().requires_grad_()
        y = whole(leaf)
        gradient = torch.randn_like(y)
        y.backward(gradient)
        assert torch.equal(halves(split, x, gradient, known=known), leaf.grad)
        for (name, expected), got in zip(whole.named_parameters(), split.parameters()):
            if expected.grad is None:
                assert got.grad is None
            else:
                limit = 1e-6 * expected.grad.abs().max().item() if step and expected.numel() >= LARGE else 0.0
                torch.testing.assert_close(got.grad, expected.grad, rtol=0, atol=limit, msg=name)
                assert got.grad.stride() == expected.grad.stride(), name


@pytest.mark.parametrize("case", CASES)
def test_how_many_parameters_wait(case: str) -> None:
    make, shape, waiting = CASES[case]
    module = make()
    without: list[str] = []

    def watch() -> None:
        without.extend(name for name, p in module.named_parameters() if p.requires_grad and p.grad is None)

    x = torch.randn(shape)
    halves(module, x, torch.randn_like(module(x)), watch)
    assert len(without) == waiting, without


def test_an_embedding_waits_and_keeps_its_padding_row() -> None:
    for padding in (None, 1):
        whole = nn.Embedding(5, 3, padding_idx=padding)
        split = copy.deepcopy(whole)
        indices, gradient = torch.tensor([1, 2, 2]), torch.randn(3, 3)
        whole(indices).backward(gradient)
        received, rest = input_half([get_gradient_edge(split(indices))], [gradient], [])
        assert received == []
        assert split.weight.grad is None
        weight_half(rest)
        assert torch.equal(split.weight.grad, whole.weight.grad)


def test_two_parameters_never_share_a_gradient() -> None:
    """The same tensor arrives at both; each must get its own."""
    module = Function(lambda p, x: (x + p[0]) + p[1], weight(2, 3), weight(2, 3))
    for _ in range(2):
        halves(module, torch.zeros(2, 3), torch.ones(2, 3))
    assert torch.equal(module.weights[0].grad, torch.full((2, 3), 2.0))
    assert torch.equal(module.weights[1].grad, torch.full((2, 3), 2.0))


def test_hooks_see_each_gradient_once_and_whole() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    seen: list[str] = []
    module[0].weight.register_hook(lambda g: seen.append("weight"))
    module[1].weight.register_post_accumulate_grad_hook(lambda p: seen.append("norm"))
    halves(module, torch.randn(2, 3), torch.ones(2, 3))
    assert sorted(seen) == ["norm", "weight"]
    assert all(p.grad is not None for p in module.parameters())


def test_a_large_product_is_summed_without_an_intermediate() -> None:
    for transposed, turned in itertools.product((False, True), repeat=2):
        parameter = weight(256, 512)
        parameter.grad = torch.ones(256, 512)
        rows, columns = (512, 256) if transposed != turned else (256, 512)
        product = Product(torch.randn(rows, 3), torch.randn(3, columns), turned)
        expected = 1 + (product.compute().t() if transposed else product.compute())
        before = parameter.grad.data_ptr()
        assert product.add_to(parameter, transposed)
        torch.testing.assert_close(parameter.grad, expected)
        assert parameter.grad.data_ptr() == before
        parameter.grad = None
        assert not product.add_to(parameter, transposed)


def test_a_graph_that_changes_is_read_anew() -> None:
    """Another parameter or branch, a parameter frozen, one thawed, one shared: each graph differs a little from the one before."""
    module = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
    reference = copy.deepcopy(module)
    forms: list[Callable[[Any, Tensor], Tensor]] = [
        lambda m, x: m["b"](m["a"](x).relu()),
        lambda m, x: m["b"](m["a"](x).relu()),
        lambda m, x: m["c"](m["a"](x).relu()),
        lambda m, x: m["b"](m["a"](x).tanh()),
        lambda m, x: m["a"](m["a"](x).tanh()),
        lambda m, x: m["b"](m["a"](x).tanh()) + m["c"](x),
        lambda m, x: m["b"](m["a"].requires_grad_(False)(x).tanh()) + m["c"](x),
        lambda m, x: m["b"](m["a"].requires_grad_(True)(x).tanh()) + m["c"](x),
        lambda m, x: torch.cat([m["c"](x), x]).sum(0).expand(2, 4),
        lambda m, x: torch.cat([m["c"](x), x, x]).sum(0).expand(2, 4),
        lambda m, x: m["c"](x) * m["c"].weight.sum(),
    ]
    known = Known()
    structures = []
    for form in forms:
        x, gradient = torch.randn(2, 4), torch.randn(2, 4)
        leaf = x.clone().requires_grad_()
        form(reference, leaf).backward(gradient)
        received = halves(Function(lambda p, y, f=form: f(module, y)), x, gradient, known=known)
        assert torch.equal(received, leaf.grad)
        structures.append(known.structure)
        for (name, expected), got in zip(reference.named_parameters(), module.parameters()):
            if expected.grad is None:
                assert got.grad is None, name
            else:
                torch.testing.assert_close(got.grad, expected.grad, rtol=1e-6, atol=1e-6, msg=name)
    assert structures[0] is structures[1], "the same graph is recognised"
    assert len(set(map(id, structures))) == len(forms) - 1


class Token:
    """Lives as long as the graph that saved it."""


class Saves(torch.autograd.Function):
    tokens: list[weakref.ref[Token]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.token = Token()
        Saves.tokens.append(weakref.ref(ctx.token))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_what_the_second_half_does_not_need_is_freed_by_the_first() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    alive: list[bool] = []
    Saves.tokens.clear()

    def watch() -> None:
        alive.extend(token() is not None for token in Saves.tokens)

    module = Function(lambda p, x: p[1](Saves.apply(p[0](x))), first, second)
    halves(module, torch.randn(2, 3), torch.ones(2, 3), watch)
    assert alive == [False]


def test_small_products_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few microseconds of work are done at once; looked at again after a while, a larger microbatch is split."""
    monkeypatch.setattr(split_backward, "WORTH", WORTH)
    monkeypatch.setattr(split_backward, "PAUSE", 2)
    module, known = nn.Linear(64, 64), Known()
    waited: list[bool] = []
    for rows in (8, 8192, 8192, 8192):
        module.zero_grad()
        halves(
            module,
            torch.randn(rows, 64),
            torch.ones(rows, 64),
            lambda: waited.append(module.weight.grad is None),
            known,
        )
        torch.testing.assert_close(module.bias.grad, torch.full((64,), float(rows)))
    assert waited == [False, False, False, True]


def test_nothing_to_do() -> None:
    assert input_half([], [], [torch.zeros(1, requires_grad=True)]) == ([None], [])
    weight_half([])
