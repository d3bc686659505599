"""Recomputation: a call keeps its arguments only, and runs again when its backward asks for what it saved.

    forward    arguments ──▶ call ──▶ results        of every tensor that autograd saves, its number is kept
    backward   arguments ──▶ call again ──▶ the saved tensors by number, until the call's graph is freed

The second run sees what the first saw: the random numbers, autocast, and the buffers that the call changes, which are
afterwards as they were before it. Where a backward is split, what a recomputed stage saves is read once more than autograd
does, so a saved tensor may be asked for any number of times. (Chen et al. 2016, arXiv 1604.06174.)
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map

from pipecompile.errors import RuntimeFault
from pipecompile.runtime.random import generators
from pipecompile.runtime.report import unreported

_changing: weakref.WeakKeyDictionary[nn.Module, tuple[str, ...]] = weakref.WeakKeyDictionary()
"""The names of the buffers that a module's call changes, once it has run."""

_compilers: weakref.WeakKeyDictionary[nn.Module, tuple[dict[str, Any], dict[str, Any]]] = weakref.WeakKeyDictionary()
"""For modules whose recomputed calls are compiled: torch.compile's options, and by method ("": the call) what it made."""


def recompute(call: Any, *args: Any, **kwargs: Any) -> Any:
    """``call(*args, **kwargs)`` of a module, or of a module's method, without keeping what it saves for its backward."""
    module: nn.Module = getattr(call, "__self__", call)
    call = _compiled(call, module)
    if not torch.is_grad_enabled():
        return call(*args, **kwargs)
    return _Recomputation(call, module, args, kwargs).first()


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a stage, recomputed as a whole."""

    @functools.wraps(forward)
    def run(stage: nn.Module, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(stage, *args)
        return _Recomputation(MethodType(forward, stage), stage, args, {}, early=True).first()

    return run


def compile_recomputed(stage: nn.Module, whole: bool, options: Mapping[str, Any]) -> None:
    """``torch.compile`` what of a stage is run twice, within what runs it twice: all of it, or each of its calls.

    Both runs must be those of one graph, so each size has its own, unless the options make one dynamic for all.
    """
    options = {**options, "dynamic": bool(options.get("dynamic"))}
    if whole:
        plain: Any = inspect.unwrap(type(stage).forward)
        stage.forward = MethodType(recomputed(torch.compile(plain, **options)), stage)
    else:
        for module in stage.modules():
            _compilers[module] = (dict(options), {})


def _compiled(call: Any, module: nn.Module) -> Any:
    """The call as its stage has it compiled; itself if it has not."""
    if module not in _compilers:
        return call
    options, known = _compilers[module]
    name = getattr(call, "__name__", "")
    if name not in known:
        reference = weakref.ref(module)

        def run(*args: Any, **kwargs: Any) -> Any:
            here = reference()
            return (getattr(here, name) if name else here)(*args, **kwargs)  # type: ignore[misc]

        known[name] = torch.compile(run, **options)
    return known[name]


class _Recomputation:
    """One run of a call, kept by the tensors that autograd saved in it.

    ``early``: it may run again before its backward does. Of several calls in a stage only the one that the backward has
    reached should be there again.
    """

    def __init__(
        self, call: Any, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], early: bool = False
    ) -> None:
        self._call, self._module, self._args, self._kwargs, self._early = call, module, args, kwargs, early
        self._versions = [tensor._version for tensor in self._tensors()]
        self._random = [(generator, generator.get_state()) for generator in generators()]
        self._autocast = _autocast()
        self._buffers: dict[str, Tensor] = {}
        self._shapes: list[torch.Size] = []
        self._saved: list[Tensor] = []

    def first(self) -> Any:
        unpack = self._unpack_early if self._early else self._unpack
        with _noted(self._module, self._buffers), saved_tensors_hooks(self._pack, unpack):
            return self._call(*self._args, **self._kwargs)

    def _tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self._args, self._kwargs)) if isinstance(leaf, Tensor)]

    def _pack(self, tensor: Tensor) -> int:
        self._shapes.append(tensor.shape)
        return len(self._shapes) - 1

    def _unpack(self, number: int) -> Tensor:
        if not self._saved:
            self._again()
        return self._saved[number]

    def _again(self) -> None:
        if [tensor._version for tensor in self._tensors()] != self._versions:
            raise RuntimeFault(
                f"what {self._name()} was given has been changed in place since, so it cannot be computed again; "
                "compile with recompute='none' for this stage, or do not change that tensor in place"
            )
        args, kwargs = tree_map(_cut_off, (self._args, dict(self._kwargs)))
        saved: list[Tensor] = []
        with ExitStack() as around:
            around.enter_context(unreported())
            around.enter_context(_states(self._random))
            around.enter_context(_swapped(self._module, self._buffers))
            for mode in self._autocast:
                around.enter_context(torch.autocast(**mode))
            around.enter_context(torch.enable_grad())
            around.enter_context(saved_tensors_hooks(lambda tensor: saved.append(tensor.detach()), _never))
            self._call(*args, **kwargs)
        if [tensor.shape for tensor in saved] != self._shapes:
            raise RuntimeFault(
                f"{self._name()} saved other tensors when it was computed again ({len(saved)}, {len(self._shapes)} "
                "before), so its forward depends on more than its arguments; compile with recompute='none' for it"
            )
        self._saved = saved

    def _unpack_early(self, number: int) -> Tensor:
        return self._unpack(number)

    def _name(self) -> str:
        return type(self._module).__name__

    _unpack_early.repeatable = True  # type: ignore[attr-defined]


def _never(_: Any) -> Tensor:
    raise AssertionError("the graph of the second run is never walked")


def _cut_off(leaf: Any) -> Any:
    """The same tensor as a leaf."""
    return leaf.detach().requires_grad_() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


def _autocast() -> list[dict[str, Any]]:
    """The autocast modes around the call, as arguments of torch.autocast."""
    kinds = ["cpu", *([torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else [])]  # type: ignore[union-attr]
    return [
        {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for kind in kinds
    ]


@contextmanager
def _states(wanted: list[tuple[torch.Generator, Tensor]]) -> Iterator[None]:
    """The generators in the wanted states, and afterwards as they were."""
    before = [(generator, generator.get_state()) for generator, _ in wanted]
    for generator, state in wanted:
        generator.set_state(state)
    try:
        yield
    finally:
        for generator, state in before:
            generator.set_state(state)


@contextmanager
def _noted(module: nn.Module, kept: dict[str, Tensor]) -> Iterator[None]:
    """Put into ``kept`` the contents, from before, of the buffers that a call of ``module`` changes."""
    known = _changing.get(module)
    before = dict(module.named_buffers())
    versions = {name: buffer._version for name, buffer in before.items()}
    kept.update({name: before[name].detach().clone() for name in (before if known is None else known)})
    yield
    after = dict(module.named_buffers())
    changed = [n for n, b in before.items() if after.get(n) is not b or b._version != versions[n]]
    if known is None:  # batch_norm changes its statistics without a new version
        unknown = [n for n in before if n not in changed]
        changed += [n for n in unknown if before[n].is_meta or not torch.equal(before[n], kept[n])]
    strange = [name for name in changed if name not in kept]
    if strange:
        raise RuntimeFault(
            f"{type(module).__name__} changed its buffer {strange[0]!r}, which its first call had left alone, so it "
            "cannot be computed again; compile with recompute='none' for this stage"
        )
    if known is None:
        _changing[module] = tuple(changed)
        for name in set(kept) - set(changed):
            del kept[name]


@contextmanager
def _swapped(module: nn.Module, kept: Mapping[str, Tensor]) -> Iterator[None]:
    """The buffers as they were before the first run, and afterwards as they are now."""
    owners = {name: (module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in kept}
    now = {name: owner._buffers[last] for name, (owner, last) in owners.items()}
    for name, (owner, last) in owners.items():
        owner._buffers[last] = kept[name]
    try:
        yield
    finally:
        for name, (owner, last) in owners.items():
            owner._buffers[last] = now[name]
