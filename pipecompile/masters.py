"""Master parameters: float32 copies of narrow parameters, which the optimizer trains with their main gradients.

step         p.main_grad ──▶ master.grad          (the same tensor)
optimizer    master ◀── master.grad
             p ◀── master, rounded                behind the optimizer's step; what was changed by hand, when the next
                                                  step, evaluate or saving begins
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from pipecompile.errors import BuildError
from pipecompile.ir import Graph
from pipecompile.runtime import forget_main_gradient, gradient, keep_main_gradient, set_gradient

NARROW = (torch.bfloat16, torch.float16)


def read_dtype(dtype: torch.dtype | None) -> str:
    """The name of a dtype for main gradients, empty for none; BuildError unless it is float32."""
    if dtype not in (None, torch.float32):
        raise BuildError(f"gradient_dtype is {dtype}, expected torch.float32 or None; masters are kept in float32")
    return "float32" if dtype else ""


def with_masters(graph: Graph, dtype_name: str) -> Graph:
    """The graph that says which of its parameters are trained as masters of the named dtype (empty: none)."""
    narrow = [str(dtype).removeprefix("torch.") for dtype in NARROW]
    attributes = {
        fqn: replace(info, master=dtype_name if info.spec.gradient and info.spec.dtype in narrow else "")
        for fqn, info in graph.attributes.items()
    }
    return replace(graph, attributes=attributes)


def _has_master(parameter: Tensor, dtype_name: str) -> bool:
    """Whether a parameter is trained as a master of the named dtype (empty: none is)."""
    return bool(dtype_name) and parameter.requires_grad and parameter.dtype in NARROW


@contextmanager
def main_gradients(parameters: Iterable[Tensor], dtype_name: str) -> Iterator[None]:
    """While this lasts, narrow parameters have main gradients of the named dtype (empty: none)."""
    narrow = [p for p in parameters if _has_master(p, dtype_name)]
    for p in narrow:
        keep_main_gradient(p, getattr(torch, dtype_name))
    try:
        yield
    finally:
        for p in narrow:
            forget_main_gradient(p)


@functools.cache
def watch_optimizers() -> None:
    """From now on, in this process, an optimizer's step is a BuildError where it would pass over a parameter because its
    gradient is the master's, and rounds masters that it has changed."""
    register_optimizer_step_pre_hook(_refuse_narrow)
    register_optimizer_step_post_hook(_round_masters)


def _round_masters(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if (write_back := getattr(p, "write_back", None)) is not None:
            write_back()


def _refuse_narrow(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if p.grad is None and getattr(p, "main_grad", None) is not None:
            raise BuildError(
                f"the optimizer has a {str(p.dtype).removeprefix('torch.')} parameter of shape {tuple(p.shape)} itself, but "
                "gradient_dtype sums its gradient for a float32 master, so it would not be trained; make the optimizer of "
                "pipe.master_parameters()"
            )


class Masters:
    """The masters of ``parameters``: one in the named dtype for each that is narrow and trained, others stand for themselves."""

    def __init__(self, parameters: Iterable[nn.Parameter], dtype_name: str) -> None:
        self._masters: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self._seen: dict[int, int] = {}
        for p in parameters:
            forget_main_gradient(p)
            if _has_master(p, dtype_name):
                watch_optimizers()
                dtype = getattr(torch, dtype_name)
                keep_main_gradient(p, dtype)
                master: Any = nn.Parameter(p.detach().to(dtype))
                master.write_back = functools.partial(self._write_back, id(p))
                self._masters[id(p)] = (p, master)
                self._seen[id(p)] = p._version

    def of(self, parameter: nn.Parameter) -> nn.Parameter:
        """What an optimizer trains for ``parameter``."""
        return self._masters.get(id(parameter), (parameter, parameter))[1]

    def by_parameter(self) -> dict[int, nn.Parameter]:
        """The masters by the id() of their parameters."""
        return {key: master for key, (_, master) in self._masters.items()}

    def before_step(self) -> None:
        """Parameters get the values of their masters, and go on with the gradients that these hold."""
        self.write_back()
        for p, master in self._masters.values():
            set_gradient(p, master.grad)

    def after_step(self) -> None:
        for p, master in self._masters.values():
            master.grad = gradient(p)

    def write_back(self) -> None:
        """Round masters into their parameters; one whose parameter was given another value takes that."""
        for key in self._masters:
            self._write_back(key)

    @torch.no_grad()
    def _write_back(self, key: int) -> None:
        p, master = self._masters[key]
        if p._version != self._seen[key]:
            master.copy_(p)
        else:
            p.copy_(master)
        self._seen[key] = p._version

    @torch.no_grad()
    def read_again(self) -> None:
        """Masters take the values of their parameters."""
        for key, (p, master) in self._masters.items():
            master.copy_(p)
            self._seen[key] = p._version
