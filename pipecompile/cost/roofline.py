"""Time by the roofline: each kernel takes as long as its arithmetic or its memory traffic, whichever is longer.

Kernels are counted while operations run on meta tensors, which have shapes and no contents. FLOPs come from torch's own
formulas (``torch.utils.flop_counter``), traffic is every tensor read and written once, views are free. What has no meta
kernel, and attention, which on meta falls apart into kernels that no device runs, is charged as one fused kernel.

    ms = max(flops / peak, bytes / bandwidth) + launch          (Williams, Waterman, Patterson 2009)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from pipecompile.ir import Spec
from pipecompile.machine import Machine


@dataclass(frozen=True, slots=True)
class Kernel:
    """What one kernel computes and moves."""

    flops: float
    bytes: int
    dtype: str

    def ms(self, machine: Machine) -> float:
        compute = machine.compute_ms(self.flops, self.dtype)
        return max(compute, machine.move_ms(self.bytes)) + machine.launch_us / 1e3


class Roofline(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists the kernels that run while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _is_free(func):
            formula = flop_registry.get(func.overloadpacket)
            flops = formula(*args, **(kwargs or {}), out_val=result) if formula else 0
            self.charge(flops, tensors((args, kwargs)), tensors(result))
        return result

    def charge(self, flops: float, read: Iterable[Tensor], written: Iterable[Tensor]) -> None:
        """Add one kernel."""
        made = list(written)
        moved = {id(tensor): _bytes(tensor) for tensor in (*read, *made)}
        dtype = next((tensor.dtype for tensor in made if tensor.is_floating_point()), torch.float32)
        self.kernels.append(Kernel(flops, sum(moved.values()), str(dtype).removeprefix("torch.")))


def _is_free(func: Any) -> bool:
    """Operations that move no data: views, and new memory without contents."""
    name = func.overloadpacket.__name__
    return (
        bool(func.is_view)
        or name in ("detach", "_unsafe_view", "lift_fresh")
        or name.startswith(("empty", "new_empty"))
    )


def _bytes(tensor: Tensor) -> int:
    """What is moved of a tensor: of a sparse one (the gradient of an embedding with sparse=True) its rows and their places."""
    if tensor.layout == torch.sparse_coo:
        return tensor._indices().nbytes + tensor._values().nbytes
    return tensor.nbytes


def tensors(whole: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(whole) if isinstance(leaf, Tensor)]


class Fused(torch.autograd.Function):
    """One kernel forward and one backward that give tensors of known specs, and keep what they read and made.

    ``flops`` are those of the forward and of the backward.
    """

    @staticmethod
    def forward(ctx: Any, counter: Roofline, flops: tuple[float, float], specs: Sequence[Spec], *read: Tensor) -> Any:
        made = [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for spec in specs]
        counter.charge(flops[0], read, made)
        ctx.counter, ctx.flops = counter, flops[1]
        ctx.save_for_backward(*read, *(tensor for tensor in made if tensor.is_floating_point()))
        ctx.mark_non_differentiable(*(tensor for tensor, spec in zip(made, specs) if not spec.gradient))
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        inputs = ctx.saved_tensors
        wanted = [torch.empty_like(x) if need else None for x, need in zip(inputs, ctx.needs_input_grad[3:])]
        ctx.counter.charge(ctx.flops, [*inputs, *gradients], [x for x in wanted if x is not None])
        return (None, None, None, *wanted)


def attention_flops(query: Tensor, key: Tensor, value: Tensor) -> tuple[float, float]:
    """FLOPs of fused attention, forward and backward; tensors of (.., heads, length, size), heads may be grouped."""
    batch = max(math.prod(x.shape[:-3]) for x in (query, key, value))
    heads = query.shape[-3] if query.dim() > 2 else 1
    q, k, v = ((batch, heads, *x.shape[-2:]) for x in (query, key, value))
    forward: int = sdpa_flop_count(q, k, v)  # type: ignore[no-untyped-call]
    backward: int = sdpa_backward_flop_count((*q[:-1], v[-1]), q, k, v)  # type: ignore[no-untyped-call]
    return forward, backward
