"""Blocks that need not be traced: those seen before, and those that the user calls opaque.

A model repeats one block many times. The first is traced; each later one of the same class, configuration and
arguments is passed over as one opaque operation with the results that eager mode gave, and the reader puts the first
one's operations there under the block's own names. An opaque module is passed over as well, and stays one operation.

    trace   embed  layers.0{ norm attn mlp }  layers.1[opaque]  layers.2[opaque]  head
    graph   embed  layers.0{ norm attn mlp }  layers.1{ … }     layers.2{ … }     head
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pipecompile.capture import transforms
from pipecompile.capture.likeness import structure
from pipecompile.capture.remedies import Untraceable
from pipecompile.capture.structure import PLAIN, Tensor, Unrenderable, rebuild, tensors
from pipecompile.capture.tracepoints import Recorder, Tracepoint

torch.library.define("pipecompile::opaque", "(Tensor[] tensors, int call, SymInt[] sizes, str results) -> Tensor[]")
OPAQUE = torch.ops.pipecompile.opaque.default
torch.fx.node.has_side_effect(OPAQUE)


def _make_results(given: list[torch.Tensor], call: int, sizes: list[Any], results: str) -> list[torch.Tensor]:
    """Tensors as ``results`` tells in JSON, [dimensions, dtype, device] of each; ``sizes`` are shapes and strides in a row."""
    numbers = iter(sizes)
    return [
        torch.empty_strided(
            [next(numbers) for _ in range(dimensions)],
            [next(numbers) for _ in range(dimensions)],
            dtype=getattr(torch, dtype),
            device=device,
        )
        for dimensions, dtype, device in json.loads(results)
    ]


torch.library.impl("pipecompile::opaque", "CompositeExplicitAutograd", _make_results)
torch.library.register_fake("pipecompile::opaque", _make_results)


Shape = tuple[Sequence[Any], Sequence[Any]]
"""Sizes and strides of a tensor while it is traced."""


class NeedsFullTrace(Exception):
    """A block that was passed over touches what is outside of it, so that every block must be traced."""


@dataclass(slots=True)
class Blocks:
    """Passes over blocks while a model is traced. ``eager`` are the calls that eager mode made, ``opaque`` FQNs.

    Calls whose keys are in ``changing`` change what they are given, and are not passed over as repetitions.
    ``open`` gives the shape while tracing of a result of an opaque call, from what eager mode gave, its key and place.
    """

    recorder: Recorder
    eager: Mapping[str, Tracepoint]
    opaque: frozenset[str]
    repeats: bool
    open: Callable[[Tensor, str, int], Shape] = lambda tensor, key, place: (tensor.shape, tensor.stride)
    changing: frozenset[str] = frozenset()
    templates: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def passed_over(self, model: nn.Module, changed_buffers: tuple[str, ...]) -> Iterator[None]:
        """While this lasts, opaque modules and repeated blocks of ``model`` give results without running."""
        structures = repeated(model, changed_buffers) if self.repeats else {}
        modules = dict(model.named_modules())
        instead = {fqn: self._pass_over(modules[fqn], fqn) for fqn in modules if fqn in self.opaque}
        for fqn, like in structures.items():
            instead.setdefault(fqn, self._pass_over_repeats(modules[fqn], fqn, like))
        saved = {fqn: modules[fqn].__dict__.get("forward") for fqn in instead}
        for fqn, forward in instead.items():
            modules[fqn].__dict__["forward"] = forward
        try:
            yield
        finally:
            for fqn, forward in saved.items():
                if forward is None:
                    del modules[fqn].__dict__["forward"]
                else:
                    modules[fqn].__dict__["forward"] = forward

    def _pass_over(self, module: nn.Module, fqn: str) -> Callable[..., Any]:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if transforms.running() is not None:
                return original(*args, **kwargs)
            call = self.recorder.calls[self.recorder.stack[-1]]
            seen = self.eager.get(call.key)
            if seen is None or not _complete(seen.result):
                around = self.recorder.calls[call.parent].fqn if call.parent >= 0 else ""
                raise Untraceable(
                    around,
                    f": {fqn}, which is left whole, returns something besides tensors, numbers and containers of them, or "
                    "is called otherwise than in eager mode; let it return a tensor, a tuple or a dict, or",
                )
            given = [tensor for _, tensor in tensors((args, kwargs))]
            like = [self.open(part, call.key, place) for place, part in enumerate(_tensors(seen.result))]
            return _results(seen, [*given, *module.parameters(), *module.buffers()], self.recorder.stack[-1], like)

        return forward

    def _pass_over_repeats(self, module: nn.Module, fqn: str, like: str) -> Callable[..., Any]:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if transforms.running() is not None:
                return original(*args, **kwargs)
            index = self.recorder.stack[-1]
            call = self.recorder.calls[index]
            seen = self.eager.get(call.key)
            shape = _argument_key(args, kwargs)
            if call.fqn != fqn or seen is None or not shape or not _complete(seen.result) or call.key in self.changing:
                return original(*args, **kwargs)
            template = self.templates.setdefault(f"{like} {shape} {_mode()}", index)
            if template == index:
                return original(*args, **kwargs)
            self.recorder.repeat(index, template)
            shapes = [(t.shape, t.stride()) for _, t in self.recorder.calls[template].result]
            return _results(seen, [tensor for _, tensor in tensors((args, kwargs))], index, shapes)

        return forward


def _results(seen: Tracepoint, given: list[torch.Tensor], index: int, shapes: Sequence[Shape]) -> Any:
    """What eager mode returned, its tensors made by the opaque operation with ``shapes``."""
    flat, spec = pytree.tree_flatten(seen.result)
    told = [[len(t.shape), t.dtype, t.device] for t in _tensors(seen.result)]
    sizes = [size for shape, strides in shapes for size in (*shape, *strides)]
    made = iter(OPAQUE(given, index, sizes, json.dumps(told)))
    return pytree.tree_unflatten([next(made) if isinstance(leaf, Tensor) else leaf for leaf in flat], spec)


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _complete(result: Any) -> bool:
    """Whether a remembered result can be made again: tensors and plain constants only."""
    return result is not None and all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in pytree.tree_leaves(result))


def _mode() -> str:
    return f"{torch.is_grad_enabled()} {torch.is_autocast_enabled('cpu')} {torch.is_autocast_enabled('cuda')}"


def _argument_key(args: Any, kwargs: Any) -> str:
    """What must be equal for two calls to trace alike, empty if that cannot be told."""
    order: dict[int, int] = {}

    def leaf(whole: Any) -> Any:
        if isinstance(whole, torch.Tensor):
            same = order.setdefault(id(whole), len(order))
            return f"{tuple(whole.shape)} {whole.stride()} {whole.dtype} {whole.device} {same}"
        return whole

    try:
        return repr(rebuild((args, kwargs), leaf))
    except Unrenderable:
        return ""


def repeated(model: nn.Module, changed_buffers: tuple[str, ...]) -> dict[str, str]:
    """The structure of each module that has children and a twin elsewhere, by FQN.

    Modules with hooks on them or inside of them, with buffers that the step changes, or that share parameters with the outside are
    left out.
    """
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    found: dict[str, list[str]] = {}
    for fqn, module in model.named_modules():
        if not fqn or not any(True for _ in module.children()):
            continue
        prefix = f"{fqn}."
        tied = any(len(names) > 1 for p in module.parameters() if (names := owners[id(p)]))
        if (
            tied
            or any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
            or any(b.startswith(prefix) for b in changed_buffers)
        ):
            continue
        found.setdefault(structure(module, fqn), []).append(fqn)
    return {fqn: like for like, fqns in found.items() if len(fqns) > 1 for fqn in fqns}
