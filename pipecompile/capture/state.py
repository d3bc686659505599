"""A model's own state besides its parameters: buffers, plain attributes, random numbers. Kept, and compared."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PLAIN = (type(None), bool, int, float, str)
Memory = tuple[int, tuple[int, ...], tuple[int, ...]] | None
Attributes = dict[tuple[str, str], object]


def plain_attributes(model: nn.Module) -> Attributes:
    """The numbers, truth values and texts that modules hold, by (FQN, name)."""
    return {
        (fqn, name): value
        for fqn, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, PLAIN) and name != "training"
    }


def memory(tensor: object) -> Memory:
    """Where a tensor lies; None where that cannot be told."""
    if not isinstance(tensor, torch.Tensor) or tensor.is_meta or not tensor.numel():
        return None
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def held_twice(model: nn.Module) -> dict[Memory, str]:
    """The FQN of each parameter by its memory: modules in a plain list use parameters that only a ParameterList names.

    A parameter that a plain attribute shares memory with (``self.frozen = self.weight.detach()``) is left out.
    """
    parameters = {memory(p): fqn for fqn, p in model.named_parameters()}
    plain = {memory(value) for module in model.modules() for value in vars(module).values()}
    return {place: fqn for place, fqn in parameters.items() if place is not None and place not in plain}


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Buffers, plain attributes and the random state are afterwards as they were before, after an error too."""
    saved = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    attributes = plain_attributes(model)
    foreign = random.getstate(), sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(foreign[0])
        if foreign[1] is not None:
            sys.modules["numpy"].random.set_state(foreign[1])
        _give_back(model, saved, attributes)


def _give_back(model: nn.Module, buffers: Mapping[str, Tensor], attributes: Attributes) -> None:
    with torch.no_grad():
        for name, buffer in buffers.items():
            owner, _, last = name.rpartition(".")
            current = model.get_buffer(name)
            if current.shape == buffer.shape and current.dtype == buffer.dtype:
                current.copy_(buffer)
            else:
                setattr(model.get_submodule(owner), last, buffer)
    modules = dict(model.named_modules())
    for (fqn, name), value in attributes.items():
        if vars(modules[fqn]).get(name, modules) is not value:  # another one, or none
            setattr(modules[fqn], name, value)


def reassigned(model: nn.Module, before: Attributes) -> dict[str, str]:
    """An attribute that has got another value, by the FQN of its module."""
    return {
        fqn: name for (fqn, name), value in plain_attributes(model).items() if before.get((fqn, name), value) != value
    }
