"""The eager reference run: what a model does when nobody traces it, where tracing would show something else.

Models ask whether they are being exported and then behave differently (masks that eager mode never builds), and a graph
of operations does not show custom autograd functions, tensor hooks or buffers that are replaced. One step in eager mode
on one microbatch sees all of these. Buffers and random state are left as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.utils import _pytree as pytree

from pipecompile.capture.checkpoints import straight_through
from pipecompile.capture.questions import Questions
from pipecompile.capture.structure import Tensor, Unrenderable, rebuild, tensors
from pipecompile.capture.tracepoints import Recorder, Tracepoint


@dataclass(frozen=True, slots=True)
class Observation:
    """The calls that eager mode made, by key, why some must stay whole, and the buffers whose contents changed.

    ``questions`` have the answers that the model's code got when it asked for a tensor's truth.
    """

    calls: dict[str, Tracepoint]
    keep_whole: dict[str, str]
    changed_buffers: tuple[str, ...]
    questions: Questions = field(default_factory=Questions)


def skeleton(whole: Any) -> Any:
    """The structure with a mark in place of each tensor, or the reason why it cannot be written down."""
    try:
        return rebuild(whole, lambda leaf: Tensor.of(leaf) if isinstance(leaf, torch.Tensor) else leaf)
    except Unrenderable as reason:
        return reason


def outline(whole: Any) -> Any:
    """The result with a mark in place of each tensor, its containers as they are."""
    return pytree.tree_map(lambda leaf: Tensor.of(leaf) if isinstance(leaf, torch.Tensor) else leaf, whole)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Buffers and the random state are afterwards as they were before."""
    saved = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        yield
    with torch.no_grad():
        for name, buffer in saved.items():
            owner, _, last = name.rpartition(".")
            current = model.get_buffer(name)
            if current.shape == buffer.shape and current.dtype == buffer.dtype:
                current.copy_(buffer)
            else:
                setattr(model.get_submodule(owner), last, buffer)


def observe(step: nn.Module, model: nn.Module, batch: Any) -> Observation:
    """Run ``step(batch)`` once in eager mode with gradients on and note what the traced graph will not show."""
    seen: set[Any] = set()
    reasons: dict[str, str] = {}
    questions = Questions()
    recorder = Recorder(mark=False, keep=skeleton, keep_result=outline)

    def note(reason: str) -> None:
        if call := recorder.innermost:
            reasons.setdefault(call.key, reason)

    def look(call: Tracepoint, result: Any) -> None:
        for function in _new_functions(result, seen):
            reasons.setdefault(call.key, f"it uses the custom autograd function {function}")

    fqns = {module: fqn for fqn, module in model.named_modules()}

    def note_checkpoint(owner: nn.Module | None, reason: str) -> None:
        if owner is None:
            note(reason)
        elif owner in fqns:
            reasons.setdefault(f"{fqns[owner]}@{recorder.counts[fqns[owner]]}", reason)

    recorder.on_exit = look
    checkpoints = straight_through(recorder, note_checkpoint)
    with untouched(model), _watch_tensor_hooks(note), checkpoints, recorder.around(model):
        before = {name: (buffer, buffer.detach().clone()) for name, buffer in model.named_buffers()}
        with questions.answered(recorder, tracing=False):
            step(batch)
        changed, replaced = [], []
        for name, (buffer, contents) in before.items():
            if not buffer.is_meta and not torch.equal(buffer, contents):
                changed.append(name)
            if model.get_buffer(name) is not buffer:
                replaced.append(name)
    for name in replaced:
        owner = name.rpartition(".")[0]
        for call in recorder.calls:
            if call.fqn == owner:
                reasons.setdefault(call.key, f"it replaces its buffer {name} instead of changing it in place")
    return Observation({call.key: call for call in recorder.calls}, reasons, tuple(changed + replaced), questions)


@contextmanager
def _watch_tensor_hooks(note: Any) -> Iterator[None]:
    original = torch.Tensor.register_hook

    def register_hook(tensor: torch.Tensor, hook: Any) -> Any:
        note("it registers a hook on a tensor")
        return original(tensor, hook)  # type: ignore[no-untyped-call]

    torch.Tensor.register_hook = register_hook  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.register_hook = original  # type: ignore[method-assign]


def _new_functions(result: Any, seen: set[Any]) -> Iterator[str]:
    """Names of the custom autograd functions behind a result that no earlier look has reached."""
    todo = [tensor.grad_fn for _, tensor in tensors(result) if tensor.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            yield type(node).__name__.removesuffix("Backward")
        todo.extend(parent for parent, _ in node.next_functions if parent is not None)
