"""Sizes that follow from those of a microbatch: ``batch``, ``sequence``, and what is computed of them.

A ``Size`` is a whole number, its value at the sizes that were captured, with the expression that gives it at any other:
Python's own text of names, whole numbers, ``+ - * // %``, ``max()`` and ``min()``. Arithmetic on one gives plain numbers.
Texts come from files too, so they are walked, never executed.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipecompile.errors import BuildError
from pipecompile.ir.json_text import shortened

BATCH, SEQUENCE = "batch", "sequence"
"""Rows of a microbatch, and how many tokens each has; further lengths are ``sequence_2`` and so on."""
LONGEST = 20_000
OPERATORS: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.USub: operator.neg, ast.Not: operator.not_, ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip


class Size(int):
    """A size at the captured microbatch, with ``text`` saying how it follows from ``batch`` and ``sequence``."""

    text: str

    def __new__(cls, value: int, text: str) -> Size:
        made = super().__new__(cls, value)
        made.text = text
        return made

    def __getnewargs__(self) -> tuple[int, str]:  # type: ignore[override]
        return int(self), self.text

    def at(self, sizes: Mapping[str, int]) -> Size:
        """The same size of a microbatch of other ``sizes``."""
        return Size(evaluate(self.text, sizes), self.text)


@dataclass(frozen=True, slots=True)
class Condition:
    """What the model's code asked of sizes while it was traced, and where: what follows was traced for this answer."""

    text: str
    where: str = ""


def shape_at(shape: Iterable[int], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A shape of a microbatch of other ``sizes``; what is no Size stays."""
    return tuple(size.at(sizes) if isinstance(size, Size) else size for size in shape)


def with_size_texts(whole: Any) -> Any:
    """A structure of dicts, lists and tuples as JSON has it: each Size as its text."""
    if isinstance(whole, Size):
        return whole.text
    if isinstance(whole, dict):
        return {key: with_size_texts(part) for key, part in whole.items()}
    return [with_size_texts(part) for part in whole] if isinstance(whole, list | tuple) else whole


def read_size(whole: Any, sizes: Mapping[str, int]) -> int:
    """A size of a structure that ``with_size_texts`` gave; BuildError if it is malformed."""
    value = evaluate(whole, sizes) if isinstance(whole, str) else whole
    if type(value) is not int:
        raise BuildError(f"{shortened(whole)} is no size, expected a whole number or an expression such as '4*batch'")
    return Size(value, whole) if isinstance(whole, str) else value


def evaluate(text: str, values: Mapping[str, Any]) -> Any:
    """The value of a size or condition where names have ``values`` (numbers, or sympy's symbols).

    BuildError if the text is not one of ours, or names what has no value.
    """

    def walk(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=int() | float() as value):
                return value
            case ast.Name(id=name) if name in values:
                return values[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](walk(left), walk(right))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
                return OPERATORS[type(op)](walk(operand))
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in OPERATORS:
                return OPERATORS[type(op)](walk(left), walk(right))
            case ast.BoolOp(op=op, values=parts):
                return (all if isinstance(op, ast.And) else any)(walk(part) for part in parts)
            case ast.Call(func=ast.Name(id="max" | "min" as name), args=parts, keywords=[]):
                return _extreme(name, [walk(part) for part in parts])
        raise BuildError(f"{text[:200]!r} is no size in {', '.join(values) or 'whole numbers'}; compile again")

    try:
        return walk(_parsed(text))
    except ZeroDivisionError as error:
        raise BuildError(f"{text[:200]!r} divides by zero where {dict(values)}; compile again") from error
    except (RecursionError, OverflowError, ValueError, TypeError) as error:
        raise BuildError(f"{text[:200]!r} has no value where {dict(values)}: {error}; compile again") from error


def _extreme(name: str, parts: list[Any]) -> Any:
    if all(isinstance(part, int | float) for part in parts):
        return max(parts) if name == "max" else min(parts)
    import sympy

    return sympy.Max(*parts) if name == "max" else sympy.Min(*parts)


@lru_cache(maxsize=4096)
def _parsed(text: str) -> ast.AST:
    try:
        if len(text) > LONGEST:
            raise ValueError(f"longer than {LONGEST} characters")
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BuildError(f"{text[:200]!r} is no expression: {error}; compile again") from error
