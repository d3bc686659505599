"""The states of torch's, Python's and numpy's random generators: as they are, and as JSON."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from pipecompile.runtime.random import generators

NAMES = ("torch", "cuda")
"""Of torch's generators: the CPU's, and that of the current device, if it is in use."""


def snapshot() -> tuple[Any, ...]:
    """What ``restore`` takes."""
    return [generator.get_state() for generator in generators()], random.getstate(), numpy.random.get_state()


def restore(state: tuple[Any, ...]) -> None:
    drawn, python, of_numpy = state
    for generator, before in zip(generators(), drawn):
        generator.set_state(before)
    random.setstate(python)
    numpy.random.set_state(of_numpy)


def take() -> dict[str, Any]:
    """The states as JSON."""
    drawn, (version, numbers, rest), (kind, keys, *others) = snapshot()
    of_torch = {name: base64.b64encode(bytes(state.tolist())).decode() for name, state in zip(NAMES, drawn)}
    return of_torch | {"python": [version, list(numbers), rest], "numpy": [kind, keys.tolist(), *others]}


def give(state: Mapping[str, Any]) -> None:
    """Set what ``take`` gave. Raises KeyError, TypeError or ValueError for anything else."""
    of_torch = _tensor(state["torch"])
    version, numbers, rest = state["python"]
    random.setstate((version, tuple(numbers), rest))
    if "numpy" in state:  # older checkpoints have none
        numpy.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(of_torch)
    for name, generator in zip(NAMES[1:], generators()[1:]):
        if name in state:  # it may have been written without the device
            generator.set_state(_tensor(state[name]))


def _tensor(text: Any) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
