"""What a training loop does beside steps: clips the gradients of the whole model, and evaluates without gradients."""

from __future__ import annotations

import ast
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from pipecompile.errors import BuildError, RuntimeFault
from pipecompile.ir import Port, Program, StagePlan
from pipecompile.saving import Share

NOISE = {"dropout": 1, "dropout_": 1, "feature_dropout": 1, "alpha_dropout": 1, "native_dropout": 1,
         "scaled_dot_product_attention": 4}  # fmt: skip
"""Operations that only training makes random, and which argument says how much."""
BY_MODE = ("batch_norm", "native_batch_norm", "rrelu", "rrelu_")
"""Other operations that compute something else in training."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def clip_gradients(
    share: Share,
    masters: Callable[[nn.Parameter], nn.Parameter],
    sum_over_ranks: Callable[[Tensor], Tensor],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
) -> Tensor:
    """Scale this process's gradients, those of its parameters' ``masters``, as ``torch.nn.utils.clip_grad_norm_`` would on the whole model; gives their norm.

    Each parameter's norm is taken by the one stage that writes it, so that a tied parameter counts once; the sum over
    the ranks of a table with one column for each parameter is then the whole table, on every rank the same.
    """
    trained = [p for stage in share.stages.values() for p in stage.parameters() if masters(p).grad is not None]
    parameters = list({id(p): p for p in trained}.values())
    found = {id(p): masters(p).grad for p in parameters}
    norm = _total(_table(share, found, sum_over_ranks, norm_type), norm_type)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeFault(
            f"the norm of order {norm_type} of the gradients is {norm.item()}, so they cannot be clipped; give "
            "error_if_nonfinite=False to scale them by it all the same"
        )
    clip_grads_with_norm_([masters(p) for p in parameters], max_norm, norm)
    return norm


def _table(
    share: Share, gradients: Mapping[int, Tensor | None], sum_over_ranks: Callable[[Tensor], Tensor], norm_type: float
) -> Tensor:
    """For each parameter of the model, in its order, the gradient's norm and 1 + its dtype's place (0: no gradient)."""
    columns = {name: column for column, name in enumerate(dict.fromkeys(share.layout.canonical.values()))}
    written = share.written_names()
    mine = {columns[written[key]]: grad for key, grad in gradients.items() if key in written}
    device = next((p.device for stage in share.stages.values() for p in stage.parameters()), torch.device("cpu"))
    table = torch.zeros(2, len(columns), dtype=torch.float64, device=device)
    norms = {column: torch.linalg.vector_norm(grad, norm_type) for column, grad in mine.items() if grad is not None}
    if norms:
        kinds = [1.0 + FLOATS.index(norm.dtype) for norm in norms.values()]
        table[0, list(norms)] = torch.stack([norm.to(table) for norm in norms.values()])
        table[1, list(norms)] = torch.tensor(kinds, dtype=table.dtype, device=device)
    return sum_over_ranks(table)


def _total(table: Tensor, norm_type: float) -> Tensor:
    """The norm of the norms, in the dtype in which torch would take it of all gradients at once."""
    there = table[1] > 0
    dtypes = [FLOATS[int(kind) - 1] for kind in set(table[1, there].tolist())]
    if not dtypes:
        return torch.zeros((), device=table.device)
    norm: Tensor = torch.linalg.vector_norm(table[0, there].to(reduce(torch.promote_types, dtypes)), norm_type)
    return norm


def forward_only(program: Program, plans: tuple[StagePlan, ...]) -> tuple[Program, tuple[StagePlan, ...]]:
    """The forwards of a program and the messages between them; the order on each rank and channel stays the same."""
    kept = ("FORWARD", "SEND_F", "RECV_F")
    rows = tuple(tuple(one for one in row if one.op in kept) for row in program.rows)
    blind = tuple(replace(p, inputs=_no_gradients(p.inputs), outputs=_no_gradients(p.outputs)) for p in plans)
    return replace(program, rows=rows), blind


def _no_gradients(ports: tuple[Port, ...]) -> tuple[Port, ...]:
    return tuple(replace(port, spec=replace(port.spec, gradient=False)) for port in ports)


def check_compiler(parameters: Iterable[Tensor], backend: Any) -> None:
    """BuildError if torch.compile's default backend would need a C++ compiler that is not there."""
    on_cpu = any(p.device.type == "cpu" for p in parameters)
    wanted = os.environ.get("CXX", "g++")
    if backend == "inductor" and on_cpu and shutil.which(wanted) is None:
        raise BuildError(
            f"torch.compile's backend 'inductor' needs a C++ compiler on the CPU, and there is no {wanted!r}; install "
            "g++, name another compiler in CXX, or use compile_stages(backend='aot_eager')"
        )


def bound_to_mode(sources: Iterable[str]) -> str:
    """The first operation of the stages that computes what the mode at compile time asked for; empty if there is none.

    A module that a stage calls looks at its own mode. The operations of a forward that was opened were written down as
    the trace saw them, with train or eval mode decided.
    """
    for source in sources:
        for call in ast.walk(ast.parse(source)):
            if isinstance(call, ast.Call) and (name := _operation(call.func)) and _decided(name, call):
                return name
    return ""


def _operation(function: ast.expr) -> str:
    """The name of ``aten.name.overload`` or ``F.name``; empty for anything else."""
    steps = ast.unparse(function).split(".")
    return steps[1] if steps[0] in ("aten", "F") and len(steps) > 1 else ""


def _decided(name: str, call: ast.Call) -> bool:
    place = NOISE.get(name)
    if place is None:
        return name in BY_MODE
    named = [keyword.value for keyword in call.keywords if keyword.arg == "dropout_p"]
    amount = [*call.args[place : place + 1], *named]
    return any(not isinstance(value, ast.Constant) or value.value != 0 for value in amount)
