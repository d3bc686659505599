"""Questions that only decide whether the code raises: ``assert valid.all()``, ``if not valid.all(): raise ValueError``."""

from __future__ import annotations

import ast
import linecache
from functools import cache


def only_raises(file: str, line: int) -> bool:
    """Whether the line is part of an assertion, or of a condition under which nothing is done but to raise."""
    return any(first <= line <= last for first, last in _places(file))


@cache
def _places(file: str) -> tuple[tuple[int, int], ...]:
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return ()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            found.append((node.lineno, node.end_lineno or node.lineno))
        if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise) and not node.orelse:
            found.append((node.test.lineno, node.test.end_lineno or node.test.lineno))
    return tuple(found)
