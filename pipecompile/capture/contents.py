"""Sizes that depend on what is in a tensor: how many elements ``x[mask]`` has, known only when it runs.

A value of such a size stays in the stage that makes it. torch's tracing knows the sizes of ``masked_select`` and
``nonzero`` as symbols; for ``ctc_loss`` it needs to be told the shapes of what it gives.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from pipecompile.capture.folders import OURS, TORCH
from pipecompile.capture.remedies import Untraceable
from pipecompile.ir import AtMost

LARGEST = 1 << 30
CHECKS = ("aten._assert", "aten.sym_constrain", "aten.sym_size")
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def size(of: Any) -> int:
    """A size of a trace; AtMost where it depends on contents."""
    if not isinstance(of, torch.SymInt) or of.node.expr.is_Integer:
        return int(of)
    upper = of.node.shape_env.bound_sympy(of.node.expr).upper
    return AtMost(upper if upper.is_Integer and upper < LARGEST else LARGEST)


def is_symbolic(node: torch.fx.Node) -> bool:
    """Whether a node of a trace gives a number that depends on contents."""
    return isinstance(node.meta.get("val"), SYMBOLIC)


def place(node: torch.fx.Node) -> str:
    """The user's file and line behind a node of a trace; empty where torch has not kept it."""
    lines = (node.meta.get("stack_trace") or "").strip().splitlines()
    frames = [f"{at.strip()}: {code.strip()}" for at, code in zip(lines[::2], lines[1::2]) if not _outside(at)]
    return re.sub(r'^File "(.*?)", (line \d+), in [^:]*', r"\1, \2", frames[-1]) if frames else ""


def _outside(frame: str) -> bool:
    """Whether a line of a traceback is not of the user's code."""
    return any(f'File "{folder}' in frame for folder in (OURS, TORCH))


def refuse(node: torch.fx.Node, fqn: str) -> Untraceable:
    found = place(node)
    where = f" ({found})" if found else " of the loss function"
    return Untraceable(
        fqn,
        f": an operation is given a size that depends on what is in a tensor{where}; let it work on the tensor itself, or",
    )


def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    zero_infinity: bool = False,
) -> tuple[Tensor, Tensor]:
    samples = log_probs.shape[1:-1]
    return log_probs.new_empty(samples), log_probs.new_empty((*samples, log_probs.shape[0], 1))


for _overload in ("", ".Tensor"):
    with suppress(RuntimeError):  # torch 2.11 knows the shapes of one of them itself, and takes no others
        torch.library.register_fake(f"aten::_ctc_loss{_overload}", _ctc_loss)
