"""Which sizes of a microbatch are left open while it is traced, and torch's symbols in terms of them.

Dimension 0 of every tensor is ``batch``. Dimension 1 of tensors of whole numbers, or of rows of vectors where there are
none, is ``sequence``, and so is every other dimension of the same length; a second length is ``sequence_2``.

    {"input_ids": int64[2, 16], "mask": float32[2, 1, 16, 16]}     batch   sequence
                        b  s                   b     s   s

torch takes a size of 1 for another case than all larger ones, so a microbatch of one row is traced with two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from pipecompile.capture import contents
from pipecompile.capture.folders import OURS, TORCH
from pipecompile.capture.places import Places
from pipecompile.ir.size import BATCH, SEQUENCE, Condition, Size, evaluate

FLOORS = ("FloorDiv", "CleanDiv")
MODS = ("Mod", "PythonMod")
COMPARISONS = {"Equality": "==", "Unequality": "!=", "StrictLessThan": "<", "LessThan": "<=",
               "StrictGreaterThan": ">", "GreaterThan": ">="}  # fmt: skip
Labels = Mapping[tuple[int, int], str]
"""The name of each open dimension, by the tensor's place among the batch's leaves and its dimension."""


class Fixed(Exception):
    """A size that was left open and that the model fixes: ``name`` of it (empty if unknown) and why."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name}: {why}")
        self.name, self.why = name, why


class Stopped(Fixed):
    """A trace that did not come to its end, perhaps because of an open size."""


def labels(batch: Any) -> dict[tuple[int, int], str]:
    """The dimensions of a microbatch's tensors that may be open."""
    leaves = [(i, leaf) for i, leaf in enumerate(pytree.tree_leaves(batch)) if isinstance(leaf, torch.Tensor)]
    found = {(i, 0): BATCH for i, leaf in leaves if leaf.ndim}
    rows = [leaf for _, leaf in leaves if leaf.ndim == 2 and not leaf.is_floating_point() and not leaf.is_complex()]
    rows = rows or [leaf for _, leaf in leaves if leaf.ndim == 3]
    lengths = list(dict.fromkeys(leaf.shape[1] for leaf in rows if leaf.shape[1] > 1))
    names = {length: f"{SEQUENCE}_{k + 1}" if k else SEQUENCE for k, length in enumerate(lengths)}
    for i, leaf in leaves:
        last = leaf.ndim - (leaf.ndim == 3 and leaf.is_floating_point())  # of a row of vectors, not the vectors' own
        found |= {(i, d): names[leaf.shape[d]] for d in range(1, last) if leaf.shape[d] in names}
    return found


def values(batch: Any, open_: Labels) -> dict[str, int]:
    """The size of each name, that of ``batch`` first."""
    return {name: int(size) for name, size in symbols(batch, open_).items()}


def symbols(batch: Any, open_: Labels) -> dict[str, Any]:
    """The sizes of the batch that is being traced, by name."""
    leaves = pytree.tree_leaves(batch)
    return {name: leaves[i].shape[d] for (i, d), name in open_.items()}


def traced_with(batch: Any, open_: Labels) -> Any:
    """The batch that is traced: two equal rows in place of one."""
    if values(batch, open_).get(BATCH) != 1:
        return batch
    return pytree.tree_map(lambda t: torch.cat([t, t]) if isinstance(t, torch.Tensor) and t.ndim else t, batch)


def dynamic_shapes(batch: Any, open_: Labels) -> Any:
    """What ``torch.export`` takes as the dynamic shapes of a batch."""
    leaves, structure = pytree.tree_flatten(batch)
    found: list[Any] = [{} if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
    for i, d in open_:
        found[i][d] = Dim.AUTO
    return pytree.tree_unflatten(found, structure)


@dataclass(slots=True)
class Sizes:
    """torch's sizes as ours; ``values`` are those of the microbatch, ``names`` what torch calls each of them.

    ``fixed`` are names that the trace found to be one number, and why.
    """

    values: Mapping[str, int] = field(default_factory=dict)
    names: dict[sympy.Symbol, str] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)
    known: dict[Any, int] = field(default_factory=dict)

    @staticmethod
    def of(inputs: list[Any], open_: Labels, values: Mapping[str, int], places: Places) -> Sizes:
        """``inputs`` are the traced leaves of the batch. Raises Fixed for a size that the trace found to be one number."""
        found = Sizes(values)
        for (i, d), name in open_.items():
            size = inputs[i].shape[d] if isinstance(inputs[i], torch.Tensor) else None
            expression = size.node.expr if isinstance(size, torch.SymInt) else size
            if isinstance(expression, sympy.Symbol):
                if found.names.setdefault(expression, name) != name:
                    raise Fixed(name, f"it must equal {found.names[expression]}")
            elif size is not None:
                found.fixed[name] = _why(inputs[i], expression, places)
        for name, why in found.fixed.items():
            if name in found.names.values() or (name == BATCH and values[name] == 1):
                raise Fixed(name, why)
        return found

    def of_size(self, size: Any) -> int:
        """A size of the trace at the microbatch's values; a Size if it follows from them."""
        if not isinstance(size, torch.SymInt) or not self.names:
            return contents.size(size)
        expression = size.node.expr
        if expression not in self.known:
            self.known[expression] = self._of(expression)
        return self.known[expression]

    def _of(self, expression: Any) -> int:
        if expression.is_Integer:
            return int(expression)
        written = self.text(expression)
        return Size(evaluate(written, self.values), written)

    def text(self, expression: Any) -> str:
        """An expression of torch's symbols as text; Fixed if it takes more than whole numbers."""
        unknown = [s for s in expression.free_symbols if s not in self.names]
        if unknown:
            raise Fixed("", "a size depends on the contents of a tensor")
        return _text(expression.xreplace({s: sympy.Symbol(name, integer=True) for s, name in self.names.items()}))

    def conditions(self, inputs: list[Any]) -> tuple[Condition, ...]:
        """What the model's code asked of sizes, and the largest sizes that torch met; Fixed if the microbatch itself
        does not meet that. What else torch asks, it asks again at any other size.
        """
        found: dict[str, Condition] = {}
        for guard in notes_on_sizes(inputs):
            if guard.expr.free_symbols <= set(self.names) and (_is_limit(guard.expr) or not _in_torch(guard.sloc)):
                text = self.text(guard.expr)
                found.setdefault(text, Condition(text, where(guard.sloc)))
        for condition in found.values():
            if not evaluate(condition.text, self.values):
                raise Fixed(BATCH, f"{condition.where} asks whether {condition.text}")
        return tuple(c for c in found.values() if c.text != "True")


def _why(tensor: torch.Tensor, size: Any, places: Places) -> str:
    """Where the trace found that a size is one number, from torch's own notes."""
    for note in notes_on_sizes([tensor]):
        if isinstance(note.expr, sympy.Equality) and size in note.expr.args:
            behind = places.of(note) if _in_torch(note.sloc) else ""
            return f"{behind or where(note.sloc)} takes it as a constant"
    return "the model takes it as a constant"


def notes_on_sizes(inputs: list[Any]) -> list[Any]:
    """torch's notes of what it was asked about sizes."""
    modes = [getattr(leaf, "fake_mode", None) for leaf in inputs]
    environment = next((mode.shape_env for mode in modes if mode is not None), None)
    notes: list[Any] = getattr(environment, "guards", [])
    return notes


def _is_limit(expression: Any) -> bool:
    """Whether it says that a size is at most a number."""
    return isinstance(expression, sympy.Le | sympy.Lt) and expression.lhs.is_Symbol and expression.rhs.is_Integer


def _in_torch(place: Any) -> bool:
    if OURS in str(place):
        return True
    file = getattr(getattr(place, "framework_loc", None), "filename", "")
    return not getattr(place, "maybe_user_loc", None) and file.startswith(TORCH)


def where(place: Any) -> str:
    """``file.py, line 12`` out of torch's note of a place."""
    match = re.search(r"([^\s(/]+(?:/[^\s(/]+)?\.py):(\d+)", str(place))
    return f"{match[1]}, line {match[2]}" if match else "the model"


def contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether memory of these strides has no gaps and the dimensions in their own order."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides)):
        if size != 1 and stride != expected:
            return 0 in shape
        expected *= size
    return True


def _text(whole: Any) -> str:
    """A sympy expression of whole numbers as Python; Fixed for any other."""
    kind = type(whole).__name__
    if whole.is_Integer or whole.is_Symbol or isinstance(whole, sympy.logic.boolalg.BooleanAtom):
        return str(whole)
    parts = [_text(part) for part in whole.args] if not whole.is_Pow else []
    if whole.is_Add:
        positive = sorted(zip(whole.args, parts), key=lambda pair: (pair[0].is_Integer, pair[1].startswith("-")))
        return f"({' + '.join(text for _, text in positive)})".replace("+ -", "- ")
    if whole.is_Mul:
        return _product(whole, parts)
    if whole.is_Pow and whole.exp.is_Integer and 0 < whole.exp < 9:
        return f"({'*'.join([_text(whole.base)] * int(whole.exp))})"
    if kind in FLOORS:
        return f"({_factor(parts[0])}//{_factor(parts[1])})"
    if kind in MODS:
        return f"({_factor(parts[0])} % {_factor(parts[1])})"
    if kind == "PowByNatural" and whole.args[1].is_Integer and 0 < whole.args[1] < 9:
        return f"({'*'.join([parts[0]] * int(whole.args[1]))})"
    if kind in ("CeilToInt", "FloorToInt", "TruncToInt") and type(whole.args[0]).__name__ == "IntTrueDiv":
        above, below = (_factor(_text(part)) for part in whole.args[0].args)
        return f"(-(-{above}//{below}))" if kind == "CeilToInt" else f"({above}//{below})"
    if kind in ("Max", "Min"):
        return f"{kind.lower()}({', '.join(parts)})"
    if kind in COMPARISONS:
        return f"({parts[0]} {COMPARISONS[kind]} {parts[1]})"
    if kind in ("And", "Or"):
        return f"({f' {kind.lower()} '.join(parts)})"
    if kind == "Not":
        return f"(not {parts[0]})"
    raise Fixed("", f"a size is computed with {kind}")


def _factor(text: str) -> str:
    return text if text.isalnum() or text.startswith("(") else f"({text})"


def _product(whole: Any, parts: list[str]) -> str:
    """Factors in order; fractions as one division, which a whole product leaves no rest of."""
    below = math.lcm(*(int(part.q) for part in whole.args if part.is_Rational))
    if below > 1:
        return f"({_factor(_text(whole * below))}//{below})"
    return f"{'*'.join(parts)}" if parts[0] != "-1" else f"-{'*'.join(parts[1:])}"
