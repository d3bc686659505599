"""A model's own state besides its parameters: buffers, plain attributes, random numbers. Kept, and compared."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipecompile.errors import CaptureError

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


Versions = dict[str, tuple[torch.Tensor, int]]


def versions(model: nn.Module) -> Versions:
    """Every parameter, and how often it has been changed in place."""
    return {name: (p, p._version) for name, p in model.named_parameters()}


def refuse_changed_parameters(model: nn.Module, before: Versions) -> None:
    """CaptureError for a parameter that a forward has changed, but for the lengths that an embedding keeps (max_norm)."""
    after = versions(model)
    limited = {id(part.weight) for part in model.modules() if getattr(part, "max_norm", None) is not None}
    for name, (parameter, version) in before.items():
        same = after.get(name, (None, 0))[0] is parameter
        if same and (parameter._version == version or id(parameter) in limited):
            continue
        raise CaptureError(
            f"parameter {name!r} is {'changed' if same else 'replaced'} by the forward itself, so that microbatches on their "
            "way would meet each other's changes; change it after optimizer.step(), or make it a buffer that is changed in "
            "place under torch.no_grad"
        )


def reassigned(model: nn.Module, before: Attributes) -> dict[str, str]:
    """An attribute that has got another value, by the FQN of its module."""
    return {
        fqn: name for (fqn, name), value in plain_attributes(model).items() if before.get((fqn, name), value) != value
    }
