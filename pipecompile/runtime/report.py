"""What a loss function returns besides the loss: reported by the stage that makes it, gathered over microbatches.

loss function   (loss, {"accuracy": scalar, "scores": tensor})
stage           report({"accuracy": accuracy, "scores": scores})
every rank      accuracy: the mean over the microbatches       scores: concatenated along the batch's dimension
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from pipecompile.ir import Size, Value
from pipecompile.ir.size import shape_at

Sizes = Sequence[Mapping[str, int]]

_gathering: ContextVar[Gathering | None] = ContextVar("gathering", default=None)


def report(values: Mapping[str, Tensor]) -> None:
    """Called by a stage; does nothing unless a step gathers."""
    gathering = _gathering.get()
    if gathering is not None:
        gathering.add(values)


@contextmanager
def unreported() -> Iterator[None]:
    """While this lasts, nothing is reported: what runs has run before."""
    token = _gathering.set(None)
    try:
        yield
    finally:
        _gathering.reset(token)


class Gathering:
    """Gathers the ``reported`` values of a step; those that are no scalars only if ``outputs`` are wanted.

    ``sizes`` are the open sizes of each microbatch, by name.
    """

    def __init__(self, reported: Sequence[Value], microbatches: int, outputs: bool, sizes: Sizes = ()) -> None:
        self.microbatch = 0
        self._wanted = {value.name: value for value in reported if outputs or not value.spec.shape}
        self._found: dict[tuple[str, int], Tensor] = {}
        self._microbatches = microbatches
        self._sizes = sizes or ({},) * microbatches

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, tensor in values.items():
            if name in self._wanted:
                self._found[name, self.microbatch] = tensor.detach()

    @contextmanager
    def active(self) -> Iterator[None]:
        token = _gathering.set(self)
        try:
            yield
        finally:
            _gathering.reset(token)

    def results(self, sum_over_ranks: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, Tensor]:
        """The gathered values, on every rank the same: all others add zeros to those of the rank that has made one."""
        return {name: sum_over_ranks(self._whole(name, value, device)) for name, value in self._wanted.items()}

    def _whole(self, name: str, value: Value, device: torch.device) -> Tensor:
        parts = [self._found[name, m] for m in range(self._microbatches) if (name, m) in self._found]
        shape = value.spec.shape
        if not parts:
            shapes = [shape_at(shape, sizes) if sizes else shape for sizes in self._sizes]
            along = _batch_dimension(shape)
            whole_shape = [sum(sizes) if d == along else sizes[0] for d, sizes in enumerate(zip(*shapes))]
            return torch.zeros(whole_shape, dtype=_summed(getattr(torch, value.spec.dtype), bool(shape)), device=device)
        whole = (
            torch.cat(parts, _batch_dimension(shape))
            if shape
            else torch.stack([part.to(torch.float64) for part in parts]).mean()
        )
        return whole.to(_summed(whole.dtype, bool(shape)))


def _batch_dimension(shape: Sequence[int]) -> int:
    """The first dimension that follows from the rows of a microbatch; 0 if none does."""
    found = (d for d, size in enumerate(shape) if isinstance(size, Size) and re.search(r"\bbatch\b", size.text))
    return next(found, 0)


def _summed(dtype: torch.dtype, rows: bool) -> torch.dtype:
    """The dtype that results have: means are float64, truths are bytes."""
    if not rows:
        return torch.float64
    return torch.uint8 if dtype == torch.bool else dtype
