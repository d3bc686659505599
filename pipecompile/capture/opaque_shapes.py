"""The shapes of an opaque call's results at open sizes, from what eager mode gave at a few sizes.

An opaque module is never traced, so it runs once more with a row more, and once with each length one less. Every size of
its results is then a multiple of open sizes, or one number:  [2, 16, 64] [3, 16, 64] [2, 15, 64]  ▶  [batch, sequence, 64]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from pipecompile.capture.eager import Observation
from pipecompile.capture.operations import memory_order
from pipecompile.capture.sizes import Fixed, Labels, values
from pipecompile.capture.structure import Tensor
from pipecompile.ir.size import BATCH, evaluate

Seen = tuple[Mapping[str, int], Observation]


@dataclass(slots=True)
class OpaqueShapes:
    """``seen`` are observations with their sizes, the microbatch's own first; ``symbols`` torch's while it traces."""

    seen: list[Seen]
    symbols: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(batch: Any, open_: Labels, first: Observation, observe: Callable[[Any], Observation]) -> OpaqueShapes:
        """Raises Fixed for a size at which eager mode does not run."""
        found: list[Seen] = [(values(batch, open_), first)]
        for name, other in _others(batch, open_):
            try:
                found.append((values(other, open_), observe(other)))
            except Exception as error:
                sizes = ", ".join(f"{key} {value}" for key, value in values(other, open_).items())
                raise Fixed(name, f"eager mode does not run with {sizes}: {error}") from error
        return OpaqueShapes(found)

    def shape(self, tensor: Tensor, key: str, place: int) -> tuple[list[Any], list[Any]]:
        """Shape and strides, in torch's symbols, of the result at ``place`` of call ``key``."""
        if any(_besides(seen, key) != _besides(self.seen[0][1], key) for _, seen in self.seen):
            raise Fixed("", f"{key.rpartition('@')[0]} gives other numbers, or other results, at other sizes")
        same = [(sizes, _result(seen, key, place)) for sizes, seen in self.seen]
        order = memory_order(tensor.shape, tensor.stride) or tuple(range(len(tensor.shape)))
        if any(t is None or len(t.shape) != len(order) or _order(t) != _order(tensor) for _, t in same):
            raise Fixed("", f"{key.rpartition('@')[0]} gives other results at other sizes")
        shape = [
            evaluate(self._text([(sizes, t.shape[d]) for sizes, t in same if t], key), self.symbols)
            for d in range(len(order))
        ]
        strides = [math.prod(shape[inner] for inner in order[order.index(d) + 1 :]) for d in range(len(order))]
        return shape, strides

    def _text(self, seen: list[tuple[Mapping[str, int], int]], key: str) -> str:
        """The multiple of open sizes that a size was each time."""
        names = list(seen[0][0])
        for count in range(len(names) + 1):
            for chosen in itertools.combinations(names, count):
                factors = {size // math.prod(sizes[n] for n in chosen) for sizes, size in seen}
                factor = factors.pop()
                if not factors and all(factor * math.prod(s[n] for n in chosen) == size for s, size in seen):
                    return "*".join([str(factor), *chosen])
        raise Fixed("", f"{key.rpartition('@')[0]} gives results of sizes that are no multiples of the microbatch's")


def _result(seen: Observation, key: str, place: int) -> Tensor | None:
    leaves = pytree.tree_leaves(seen.calls[key].result) if key in seen.calls else []
    found = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return found[place] if place < len(found) else None


def _besides(seen: Observation, key: str) -> Any:
    """What a call gave with a mark in place of each tensor."""
    if key not in seen.calls:
        return None
    leaves, structure = pytree.tree_flatten(seen.calls[key].result)
    return [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure


def _order(tensor: Tensor) -> tuple[int, ...]:
    """The order in memory; an own one for tensors with gaps, which are never made again."""
    found = memory_order(tensor.shape, tensor.stride)
    dense = math.prod(tensor.shape) == sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride)) + 1
    return found if dense else (-1,)


def _others(batch: Any, open_: Labels) -> Iterator[tuple[str, Any]]:
    """The batch with a row more, and with each length one less."""
    leaves, structure = pytree.tree_flatten(batch)
    for name in dict.fromkeys(open_.values()):
        changed = list(leaves)
        for (i, d), label in open_.items():
            if label != name:
                continue
            leaf = changed[i]
            more = torch.cat([leaf, leaf[:1]]) if name == BATCH else leaf.narrow(d, 0, leaf.shape[d] - 1)
            changed[i] = more.contiguous()
        yield name, pytree.tree_unflatten(changed, structure)
