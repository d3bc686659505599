"""Tracepoints: hooks around every module's forward that note which tensors go in and come out.

While a model is traced, each hook passes the call's tensors to a marker operation, whose only effect is to stand in the
traced graph with those tensors as its arguments; everything that is not a tensor stays on this side, per call. Calls
nest and the graph is in program order, so a call's operations are exactly those between its two markers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pipecompile.capture import transforms
from pipecompile.capture.structure import containers, held, tensors

torch.library.define("pipecompile::mark", "(Tensor[] tensors, int event) -> ()")


@torch.library.impl("pipecompile::mark", "CompositeExplicitAutograd")
def _mark(tensors: list[torch.Tensor], event: int) -> None:
    """Does nothing: what counts is that it stands in the graph."""


MARK = torch.ops.pipecompile.mark.default
torch.fx.node.has_side_effect(MARK)
REGION = 1 << 32
"""Events of regions count from here, those of calls from 0."""


@dataclass(slots=True)
class Tracepoint:
    """One call of a module as it was seen: its arguments, what is remembered of its result (a caller may change that
    itself), and the calls inside (up to ``end``).

    A call that repeats another one has that one as its ``template``, and ``clones`` of the calls inside of it.
    """

    key: str
    fqn: str
    parent: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any = None
    end: int = 0
    template: int = -1
    clones: tuple[int, ...] = ()


@dataclass(slots=True)
class Recorder:
    """Records the calls of a model's modules; ``keep`` and ``keep_result`` turn what they are given
    and what they return into what is remembered.

    With ``mark``, it also leaves markers in the graph that is being traced. ``look`` is called whenever a call begins or
    ends, with the key of the one that ran until then.
    """

    mark: bool
    keep: Callable[[Any], Any] = lambda whole: whole
    keep_result: Callable[[Any], Any] = lambda whole: whole
    calls: list[Tracepoint] = field(default_factory=list)
    events: list[tuple[int, bool]] = field(default_factory=list)
    stack: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    on_enter: Callable[[Tracepoint], None] | None = None
    on_exit: Callable[[Tracepoint, Any], None] | None = None
    look: Callable[[str], None] | None = None
    regions: list[str] = field(default_factory=list)
    changing: set[str] = field(default_factory=set)
    """Keys of the calls that put something else into a list or dict that they were given."""
    given: list[list[tuple[Any, list[Any]]]] = field(default_factory=list)
    functions: frozenset[str] = frozenset()
    """Keys of the calls with custom autograd functions, which leave torch's trace believing that gradients stay off."""

    @contextmanager
    def region(self, owner: nn.Module | None, given: Any, options: str = "") -> Iterator[None]:
        """Markers around a checkpointed region; events are (REGION + 2 * its number (+ 1 if a module's own), entering).

        ``regions`` are the options of each, as source.
        """
        number = len(self.regions)
        self.regions.append(options)
        place = REGION + 2 * number + (owner is not None)
        for entering in (True, False):
            if self.mark:
                MARK([tensor for _, tensor in tensors(given)], len(self.events))
            self.events.append((place, entering))
            if entering:
                yield

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        """Hooks on every module of ``model`` while the context lasts; the user's own hooks stay inside of them."""
        handles = []
        for fqn, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(fqn), with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(self._leave(), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def repeat(self, index: int, template: int) -> None:
        """Note that call ``index`` is like call ``template``, the calls inside included."""
        call, first = self.calls[index], self.calls[template]
        call.template = template
        place = {template: index}
        for inner in range(template + 1, first.end):
            seen = self.calls[inner]
            fqn = call.fqn + seen.fqn.removeprefix(first.fqn)
            place[inner] = len(self.calls)
            self.calls.append(Tracepoint(f"{fqn}@{self.counts[fqn]}", fqn, place[seen.parent], (), {}))
            self.counts[fqn] += 1
        for inner in range(template + 1, first.end):
            clone = self.calls[place[inner]]
            clone.end = max((place[i] + 1 for i in range(inner + 1, self.calls[inner].end)), default=place[inner] + 1)
        call.clones = tuple(place[inner] for inner in range(template + 1, first.end))

    @property
    def innermost(self) -> Tracepoint | None:
        """The call that is running."""
        return self.calls[self.stack[-1]] if self.stack else None

    def _event(self, whole: Any, entering: bool) -> None:
        if self.mark:
            MARK([tensor for _, tensor in tensors(whole)], len(self.events))
        self.events.append((self.stack[-1], entering))

    def _enter(self, fqn: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if transforms.running() is not None:
                return
            key = f"{fqn}@{self.counts[fqn]}"
            self.counts[fqn] += 1
            parent = self.stack[-1] if self.stack else -1
            if self.look:
                self.look(self.calls[parent].key if self.stack else "")
            self.calls.append(Tracepoint(key, fqn, parent, self.keep(args), self.keep(kwargs)))
            self.stack.append(len(self.calls) - 1)
            self.given.append(list(containers((args, kwargs))))
            if self.on_enter:
                self.on_enter(self.calls[-1])
            self._event((args, kwargs), entering=True)

        return hook

    def _leave(self) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            if transforms.running() is not None:
                return
            call = self.calls[self.stack[-1]]
            call.result, call.end = self.keep_result(result), len(self.calls)
            if self.look:
                self.look(call.key)
            if self.on_exit:
                self.on_exit(call, result)
            if any(not _same(held(now), before) for now, before in self.given.pop()):
                self.changing.add(call.key)
            if call.key in self.functions:
                torch._C._set_grad_enabled(torch.is_grad_enabled())
            self._event(result, entering=False)
            self.stack.pop()

        return hook


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other))
