"""Builds a model of which only some tensors have memory: those of one rank's stages."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipecompile.errors import BuildError
from pipecompile.weights import random_state
from pipecompile.weights.checkpoint import Checkpoint
from pipecompile.weights.guard import Guard, truncated_normals
from pipecompile.weights.hollow import Hollow, Note
from pipecompile.weights.layout import everything, stored
from pipecompile.weights.operators import NeedsValues

Make = Callable[[], nn.Module]


@dataclass(frozen=True, slots=True)
class Need:
    """What a performance must make: storages by number, of the rehearsal's ``sizes``; whether numbers are drawn."""

    numbers: frozenset[int]
    sizes: list[int]
    draw: bool


def materialise(make: Make, owned: Collection[str], checkpoint: Checkpoint | None = None) -> nn.Module:
    """The model that ``make()`` makes, with the tensors named in ``owned`` and the rest on the meta device.

    The values are those of ``make()``, or the checkpoint's where it has them: not every buffer is in one. ``make`` is
    called twice, and must make the same model each time; the random generators of torch, Python and numpy end where one
    call without a checkpoint leaves them. A model whose initialiser looks at the values of large tensors is made whole first, with a
    warning. BuildError for a checkpoint that does not fit, named by tensor.
    """
    before = random_state.snapshot()
    try:
        need = _rehearse(make, owned, from_file=checkpoint is not None)
        random_state.restore(before)
        model, hollow = _perform(make, need)
        if any(hollow.number(t) in need.numbers and hollow.is_hollow(t) for _, t in everything(model)):
            raise NeedsValues("a tensor of this rank comes from one that the rehearsal did not have")
    except NeedsValues as reason:
        warnings.warn(
            f"this rank makes the whole model before it keeps its part, because the initialiser cannot be run in parts: "
            f"{reason}",
            stacklevel=2,
        )
        random_state.restore(before)
        model, hollow = make(), None
    _strip(model, owned)
    if checkpoint is not None:
        _read(model, owned, checkpoint, hollow)
    return model


def _rehearse(make: Make, owned: Collection[str], from_file: bool) -> Need:
    """Run the initialiser without memory, and find what the owned tensors are made of."""
    hollow = Hollow(lambda number: False, draw=False)
    with truncated_normals(hollow), Guard(hollow), hollow:
        model = make()
    gc.collect()
    in_file = {id(tensor) for _, tensor in stored(model)} if from_file else set()
    foreign = {hollow.number(tensor) for name, tensor in everything(model)}
    wanted = {
        hollow.number(tensor) for name, tensor in everything(model) if name in owned and id(tensor) not in in_file
    }
    needed = wanted | (hollow.alive() - foreign)
    del model
    gc.collect()
    if hollow.left():
        raise BuildError(
            f"the initialiser keeps {hollow.left()} bytes of tensors outside of the model, in a cache perhaps, where a "
            "second run would find them without values; keep them in the model, or run with --local"
        )
    return _closure(needed, hollow.notes, hollow.sizes, draw=not from_file)


def _closure(needed: set[int], notes: list[Note], sizes: list[int], draw: bool) -> Need:
    """What is needed to make what is needed: notes are read backwards. Numbers are drawn if they must, or to ``draw``."""
    numbers = set(needed)
    for note in reversed(notes):
        if not numbers.isdisjoint(note.writes):
            numbers |= note.reads
            draw = draw or note.random
    return Need(frozenset(numbers), sizes, draw)


def _perform(make: Make, need: Need) -> tuple[nn.Module, Hollow]:
    hollow = Hollow(need.numbers.__contains__, need.draw, need.sizes)
    with truncated_normals(hollow), Guard(hollow), hollow:
        model = make()
    if len(hollow.sizes) != len(need.sizes):
        raise NeedsValues("it makes fewer tensors when it is run a second time")
    return model, hollow


def _strip(model: nn.Module, owned: Collection[str]) -> None:
    """Put what is not owned on the meta device; tensors that are one stay one."""
    keep = {id(tensor) for name, tensor in everything(model) if name in owned}
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for members in (module._parameters, module._buffers):
            for name, tensor in members.items():
                if tensor is not None and id(tensor) not in keep:
                    if id(tensor) not in moved:
                        moved[id(tensor)] = _on_meta(tensor)
                    members[name] = moved[id(tensor)]  # type: ignore[assignment]


def _on_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def _read(model: nn.Module, owned: Collection[str], checkpoint: Checkpoint, hollow: Hollow | None) -> None:
    """Fill the owned tensors from the checkpoint, which must fit the whole model."""
    names: dict[int, list[str]] = {}
    for name, tensor in stored(model):
        names.setdefault(id(tensor), []).append(name)
    checkpoint.check_names(names.values())
    done: set[int] = set()
    for name, tensor in stored(model):
        if name not in owned or id(tensor) in done:
            continue
        done.add(id(tensor))
        if hollow is not None and hollow.is_hollow(tensor):
            hollow.fill(tensor)
        checkpoint.read(names[id(tensor)], tensor)
