"""Compares a pipeline with the unsplit model: the loss, every gradient, every buffer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TOLERANCE = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 2e-5,
    torch.complex64: 2e-5,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}
FLOOR = 1e-5
"""A module whose gradients are smaller than this part of the largest one is compared against that: they are noise."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one tensor of the pipeline is from the unsplit model's, relative to the norm of what its module holds,
    and what is allowed: the gradient of a key's bias, zero in exact arithmetic, is rounding noise beside its weight's."""

    name: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


Tensors = Mapping[str, Tensor | None]


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """A copy of each parameter's gradient by FQN."""
    found = {name: p.grad for name, p in model.named_parameters()}
    return {
        name: None if g is None else (g.to_dense() if g.is_sparse else g).detach().clone() for name, g in found.items()
    }


def buffers(model: nn.Module) -> dict[str, Tensor | None]:
    """A copy of each buffer by FQN."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def differences(got: Tensors, expected: Tensors, what: str) -> Iterator[Difference]:
    """One Difference for each name; a tensor that only one side has is infinitely far."""
    norms = {name: _norm(tensor) for name, tensor in expected.items()}
    floor = FLOOR * max(norms.values(), default=0.0)
    squares: defaultdict[tuple[str, torch.dtype], float] = defaultdict(float)
    for name, tensor in expected.items():
        if tensor is not None:
            squares[_beside(name, tensor)] += norms[name] ** 2
    for name, reference in expected.items():
        mine = got.get(name)
        label = f"{what} {name}"
        if reference is None or mine is None:
            missing = (reference is None) != (mine is None) and (_norm(reference) > 0 or _norm(mine) > 0)
            yield Difference(label, math.inf if missing else 0.0, 0.0)
            continue
        allowed = TOLERANCE.get(reference.dtype, 0.0)
        gap = _norm(_precise(mine.to(reference.device)) - _precise(reference))
        yield Difference(label, _ratio(gap, max(math.sqrt(squares[_beside(name, reference)]), floor)), allowed)


def _beside(name: str, tensor: Tensor) -> tuple[str, torch.dtype]:
    """Equal for tensors of one dtype that a module itself holds."""
    return name.rpartition(".")[0], tensor.dtype


def _ratio(gap: float, scale: float) -> float:
    if not gap:
        return 0.0
    return gap / scale if scale else math.inf


def _norm(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None else float(torch.linalg.vector_norm(_precise(tensor.detach())))


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def worst(found: list[Difference]) -> Difference:
    """The difference that exceeds what is allowed the most, else the largest."""
    return max(found, key=lambda d: (not d.ok, d.error if not math.isnan(d.error) else math.inf))


@contextmanager
def gradients_aside(model: nn.Module) -> Iterator[None]:
    """No gradients at the start; afterwards those from before."""
    saved = [(p, p.grad) for p in model.parameters()]
    for p, _ in saved:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in saved:
            p.grad = grad
