"""The eager reference run: what a model does when nobody traces it, where tracing would show something else.

Models ask whether they are being exported and then behave differently (masks that eager mode never builds), and a graph
of operations does not show custom autograd functions, tensor hooks or buffers that are replaced. One step in eager mode
on one microbatch sees all of these. Buffers and random state are left as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pipecompile.capture.checkpoints import straight_through
from pipecompile.capture.draws import Draws, refuse_foreign_draws
from pipecompile.capture.exporting import data_followed
from pipecompile.capture.functions import OUTSIDE, Functions
from pipecompile.capture.questions import Questions
from pipecompile.capture.state import plain_attributes, reassigned, refuse_changed_parameters, untouched, versions
from pipecompile.capture.structure import Tensor, Unrenderable, rebuild
from pipecompile.capture.tracepoints import Recorder, Tracepoint
from pipecompile.errors import CaptureError


@dataclass(frozen=True, slots=True)
class Observation:
    """The calls that eager mode made, by key, why some must stay whole, and the buffers whose contents changed.

    ``questions`` have the answers that the model's code got when it asked for a tensor's value; ``random`` are the keys
    of the calls that drew random numbers themselves, ``functions`` of those that used custom autograd functions; ``changing``
    of those that changed a list or dict that they were given; ``notes`` are for the user.
    """

    calls: dict[str, Tracepoint]
    keep_whole: dict[str, str]
    changed_buffers: tuple[str, ...]
    questions: Questions = field(default_factory=Questions)
    random: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    functions: frozenset[str] = frozenset()
    changing: frozenset[str] = frozenset()


def skeleton(whole: Any) -> Any:
    """The structure with a mark in place of each tensor, or the reason why it cannot be written down."""
    try:
        return rebuild(whole, lambda leaf: Tensor.of(leaf) if isinstance(leaf, torch.Tensor) else leaf)
    except Unrenderable as reason:
        return reason


def outline(whole: Any) -> Any:
    """The result with a mark in place of each tensor, its containers as they are; None if they take only tensors."""
    try:
        return pytree.tree_map(lambda leaf: Tensor.of(leaf) if isinstance(leaf, torch.Tensor) else leaf, whole)
    except (AttributeError, TypeError, ValueError):  # a PackedSequence
        return None


def observe(step: nn.Module, model: nn.Module, batch: Any) -> Observation:
    """Run ``step(batch)`` once in eager mode with gradients on and note what the traced graph will not show."""
    reasons: dict[str, str] = {}
    questions = Questions()
    recorder = Recorder(mark=False, keep=skeleton, keep_result=outline)

    def note(reason: str) -> None:
        reasons.setdefault(call.key if (call := recorder.innermost) else OUTSIDE, reason)

    fqns = {module: fqn for fqn, module in model.named_modules()}

    def note_checkpoint(owner: nn.Module | None, reason: str) -> None:
        if owner is None:
            note(reason)
        elif owner in fqns:
            reasons.setdefault(f"{fqns[owner]}@{recorder.counts[fqns[owner]]}", reason)

    functions = Functions()
    recorder.on_enter, recorder.on_exit = functions.enter, functions.leave
    draws = Draws()
    checkpoints = straight_through(recorder, note_checkpoint)
    with (
        untouched(model),
        _watched(torch.Tensor, "register_hook", lambda: note("it registers a hook on a tensor")),
        _watched(torch.autograd, "grad", lambda: note("it calls torch.autograd.grad")),
        checkpoints,
        recorder.around(model),
        draws.watched(recorder),
    ):
        before = {name: (buffer, buffer.detach().clone()) for name, buffer in model.named_buffers()}
        attributes, parameters = plain_attributes(model), versions(model)
        with questions.answered(recorder, tracing=False), data_followed():
            functions.look(step(batch))
        refuse_changed_parameters(model, parameters)
        changed, replaced = [], []
        for name, (buffer, contents) in before.items():
            if not buffer.is_meta and not torch.equal(buffer, contents):
                changed.append(name)
            if model.get_buffer(name) is not buffer:
                replaced.append(name)
        renamed = reassigned(model, attributes)
    for key, function in functions.found.items():
        reasons.setdefault(key, f"it uses the custom autograd function {function}")
    owners = {
        name.rpartition(".")[0]: f"replaces its buffer {name} instead of changing it in place" for name in replaced
    }
    owners |= {fqn: f"gives its attribute {name!r} another value" for fqn, name in renamed.items()}
    notes = []
    if "" in renamed and not _matters(step, model, batch):
        notes.append(_harmless(renamed[""]))
        del owners[""]
    for call in recorder.calls:
        if call.fqn in owners:
            reasons.setdefault(call.key, f"it {owners[call.fqn]}")
    if OUTSIDE in reasons:
        raise CaptureError(
            f"the loss function cannot be split: {reasons[OUTSIDE]}, which only survives in a module that is called as a whole; "
            "move that code into a module of the model whose inputs and outputs are tensors"
        )
    refuse_foreign_draws(step, model, batch, draws)
    return Observation(
        {call.key: call for call in recorder.calls},
        reasons,
        tuple(changed + replaced),
        questions,
        frozenset(draws.torch),
        tuple(notes),
        frozenset(functions.found),
        frozenset(recorder.changing),
    )


def _matters(step: nn.Module, model: nn.Module, batch: Any) -> bool:
    """Whether two steps in a row, from the same buffers and random numbers, give different losses."""
    losses = []
    attributes = plain_attributes(model)
    modules = dict(model.named_modules())
    try:
        with torch.no_grad():
            for _ in range(2):
                with untouched(model):
                    loss = step(batch)[0]
                    after = plain_attributes(model)
                for (fqn, name), value in after.items():
                    setattr(modules[fqn], name, value)
                losses.append(loss)
    finally:
        for (fqn, name), value in attributes.items():
            setattr(modules[fqn], name, value)
    return not losses[0].is_meta and not torch.equal(*losses)


def _harmless(name: str) -> str:
    return (
        f"the model's forward gives its attribute {name!r} another value, which did not change the next loss; stages do not "
        "run that line: keep what the loss depends on in a buffer, changed in place"
    )


@contextmanager
def _watched(owner: Any, name: str, note: Callable[[], None]) -> Iterator[None]:
    """While this lasts, calls of a function of torch are noted."""
    original = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        note()
        return original(*args, **kwargs)

    setattr(owner, name, noted)
    try:
        yield
    finally:
        setattr(owner, name, original)
