"""The closed forms of the schedules as sympy expressions, and what number of microbatches meets a wish.

p ranks, v stages a rank, m microbatches, r a rank; F, I, W ms of a rank's whole share of a forward, an input half, a
weight half; a and g bytes of a value between two stages and of its gradient. Of each schedule:

    idle         ms without work between a rank's first and last computation, on the rank that has most
    bubble       the share of idle in that time
    activations  the most in flight on rank r, each of one stage and microbatch
    versions     the most versions of the weights that rank r holds (where it is not always one)
    messages     between ranks, in a step, for a chain of stages         bytes   in these
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import sympy

from pipecompile.errors import ScheduleError
from pipecompile.passes.schedules import Schedule, vee

QUANTITIES = ("idle", "bubble", "activations", "versions", "messages", "bytes")
SYMBOLS = {name: sympy.Symbol(name, positive=True, integer=name in "pvmag") for name in ("p", "v", "m", *"FIWag")}
SYMBOLS["r"] = sympy.Symbol("r", nonnegative=True, integer=True)
COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
}
FAR = 100_000
"""No search looks at more microbatches than this."""


def closed_forms(found: Schedule) -> dict[str, Any]:
    """Each quantity's expression; ScheduleError if the schedule has none."""
    forms = found.forms
    if forms is None:
        raise ScheduleError(f"{found.name} has no closed form, its order depends on costs; print it with --timeline")
    p, v, m = (SYMBOLS[name] for name in "pvm")
    idle = _parsed(forms.idle)
    work = m * _parsed("F + I + W")
    crossings = 2 * p - 2 if found.placement is vee else p * v - 1
    whole = {
        "idle": idle,
        "bubble": sympy.factor(idle / (idle + work)),
        "activations": _parsed(forms.activations),
        "versions": _parsed(forms.versions),
        "messages": 2 * m * crossings,
        "bytes": m * crossings * (SYMBOLS["a"] + SYMBOLS["g"]),
    }
    return {name: form.subs(v, found.per_rank) if found.per_rank else form for name, form in whole.items()}


def holds(found: Schedule, quantity: str) -> Any:
    """Where a quantity's form is true: a sympy condition."""
    assert found.forms is not None
    if quantity in ("idle", "bubble"):
        return _parsed(found.forms.idle_holds)
    if quantity in ("messages", "bytes") and found.placement is not vee and found.per_rank != 1:
        return SYMBOLS["p"] > 1  # one rank sends itself nothing
    return _parsed(found.forms.activations_hold) if quantity == "activations" else sympy.true


def describe(found: Schedule) -> str:
    """All forms as text, one a line, with where they hold."""
    forms = closed_forms(found)
    lines = [f"{found.name}: p ranks, {found.per_rank or 'v'} stage{'s'[: found.per_rank != 1]} a rank, m microbatches"]
    for name, form in forms.items():
        if name == "versions" and form == 1:
            continue
        condition = holds(found, name)
        where = "" if condition == sympy.true else f"    where {condition}"
        lines.append(f"{name:<11} =  {form}{where}")
    return "\n".join(lines)


def solve(found: Schedule, wish: str, ranks: int, per_rank: int) -> tuple[int, int | None]:
    """The first range of microbatches, from and to (None: for ever), that meets a wish such as ``bubble <= 0.1``.

    At F = I = W, for rank 0, where the form holds; a and g count 1. ScheduleError if the wish is malformed, or never met.
    """
    match = re.fullmatch(
        rf"\s*({'|'.join(QUANTITIES)})\s*(<=|<|>=|>)\s*([0-9]+(?:\.[0-9]*)?(?:e-?[0-9]{{1,2}})?)\s*", wish
    )
    if not match:
        raise ScheduleError(
            f"cannot solve {wish!r}; expected a quantity ({', '.join(QUANTITIES)}), <=, <, >= or >, and a number, "
            "for example 'bubble <= 0.1'"
        )
    quantity, sign, limit = match.groups()
    given = {"p": ranks, "v": per_rank, "r": 0, "F": 1, "I": 1, "W": 1, "a": 1, "g": 1}
    values = {SYMBOLS[name]: value for name, value in given.items()}
    m = SYMBOLS["m"]
    form = sympy.lambdify(m, closed_forms(found)[quantity].subs(values), modules=["math", {"Min": min, "Max": max}])
    valid = sympy.lambdify(m, holds(found, quantity).subs(values), modules=["math", {"Mod": operator.mod}])

    def met(count: int) -> bool:
        return bool(valid(count)) and COMPARE[sign](form(count), float(limit))

    first = next((count for count in range(1, FAR) if met(count)), None)
    if first is None:
        raise ScheduleError(
            f"no number of microbatches below {FAR:,} gives {wish.strip()} with {found.name} on {ranks} ranks"
        )
    last = next((count - 1 for count in range(first + 1, FAR) if bool(valid(count)) and not met(count)), None)
    return first, last


def _parsed(text: str) -> Any:
    if text == "True":
        return sympy.true
    names = {name: getattr(sympy, name) for name in ("Min", "Max", "Eq", "Mod", "Piecewise", "ceiling", "floor")}
    return sympy.sympify(text, locals={**SYMBOLS, **names})
