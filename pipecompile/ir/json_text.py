"""JSON that others may have written, read into values by their declared types: whatever is wrong has a place and a remedy.

    parse("…")  ──▶ objects and lists of JSON      as_type(Transfer, {…}, "plan.json: transfers[2]")  ──▶ Transfer(…)

Refused are what JSON's own parser lets pass: a key that stands twice, text that is not UTF-8, control characters
and numbers that no size or time has. O(characters).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import lru_cache
from types import UnionType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from pipecompile.errors import BuildError, PipecompileError

LARGEST = 1 << 53
"""No number of a file is as large: up to here whole numbers survive as floats, which other programs read JSON into."""
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_WORDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}


class _Refused(ValueError):
    """What is against our rules, though not against the parser's."""


def parse(content: str | bytes, where: str, error: type[PipecompileError] = BuildError, remedy: str = "") -> Any:
    """The objects of a JSON text; ``error`` names ``where`` (a file), the line and the ``remedy``."""
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        whole = json.loads(text, object_pairs_hook=_object)
        _check_leaves(whole)
        return whole
    except UnicodeDecodeError as cause:
        problem = f"byte {cause.start} is {content[cause.start]!r}, which is not UTF-8"
    except RecursionError:
        problem = "it is nested too deep"
    except json.JSONDecodeError as cause:
        problem = f"{cause.msg} at line {cause.lineno}, column {cause.colno}"
    except _Refused as cause:
        problem = str(cause)
    except ValueError:  # more digits than Python converts
        problem = f"it has a number of too many digits, expected one below {LARGEST}"
    raise error(f"{where} cannot be read as JSON: {problem}{remedy and '; '}{remedy}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise _Refused(f"key {shortened(twice)} stands twice in one object")
    return found


def _check_leaves(whole: Any) -> None:
    left = [whole]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str) and _UNPRINTABLE.search(value):
            raise _Refused(f"{shortened(value)} has control characters")
        elif type(value) is int and abs(value) >= LARGEST:
            raise _Refused(f"{shortened(value)} is too large, expected a number below {LARGEST}")


def shortened(value: Any) -> str:
    """A value for a message: its beginning."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep, too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads objects of JSON as values of declared types; ``special`` has another way for some of them.

    ``defaults``: fields that have one may be left out.
    Every mistake is an ``error`` that names its place, the value, what was expected, and the ``remedy``.
    """

    error: type[PipecompileError] = BuildError
    remedy: str = "compile again"
    special: Mapping[Any, Callable[[Any, str], Any]] = field(default_factory=dict)
    defaults: bool = False

    def refuse(self, where: str, problem: str) -> NoReturn:
        raise self.error(f"{where} {problem}; {self.remedy}")

    def as_type(self, kind: Any, whole: Any, where: str) -> Any:
        """``whole`` as a ``kind``: a dataclass, tuple, Mapping, number, text or truth, or Any."""
        if kind in self.special:
            return self.special[kind](whole, where)
        if isinstance(kind, type) and is_dataclass(kind):
            return kind(**self.fields_of(kind, whole, where))
        origin, parts = get_origin(kind), get_args(kind)
        if origin is UnionType:  # of something and None
            return None if whole is None else self.as_type(parts[0], whole, where)
        if origin is tuple:
            return self._tuple(parts, whole, where)
        if origin is Mapping:
            found = self.object(whole, where)
            return {key: self.as_type(parts[1], one, f"{where}[{key!r}]") for key, one in found.items()}
        return self._plain(kind, whole, where)

    def fields_of(self, kind: Any, whole: Any, where: str, ignored: tuple[str, ...] = ()) -> dict[str, Any]:
        """The arguments that make a dataclass; each key must be one of its fields, or ``ignored``."""
        hints, without_default = _hints(kind)
        needed = without_default if self.defaults else tuple(hints)
        found = self.object(whole, where)
        strange = next((key for key in found if key not in hints and key not in ignored), None)
        if strange is not None:
            self.refuse(where, f"has an unknown key {shortened(strange)}, expected {', '.join(hints)}")
        lost = next((name for name in needed if name not in found and name not in ignored), None)
        if lost is not None:
            self.refuse(where, f"has no {lost!r}, expected {', '.join(hints)}")
        read = [key for key in found if key in hints and key not in ignored]
        return {key: self.as_type(hints[key], found[key], f"{where}.{key}") for key in read}

    def object(self, whole: Any, where: str) -> dict[str, Any]:
        if not isinstance(whole, dict):
            self.refuse(where, f"is {shortened(whole)}, expected an object")
        return whole

    def list(self, whole: Any, where: str) -> list[Any]:
        if not isinstance(whole, list | tuple):
            self.refuse(where, f"is {shortened(whole)}, expected a list")
        return list(whole)

    def _tuple(self, parts: tuple[Any, ...], whole: Any, where: str) -> tuple[Any, ...]:
        found = self.list(whole, where)
        kinds = [parts[0]] * len(found) if parts[1:] == (...,) else list(parts)
        if len(kinds) != len(found):
            self.refuse(where, f"has {len(found)} parts, expected {len(kinds)}")
        return tuple(self.as_type(kind, one, f"{where}[{k}]") for k, (kind, one) in enumerate(zip(kinds, found)))

    def _plain(self, kind: Any, whole: Any, where: str) -> Any:
        if kind is Any:
            return whole
        if kind is float and type(whole) is int and abs(whole) < LARGEST:
            return float(whole)
        if type(whole) is not kind or (kind is float and not math.isfinite(whole)):
            self.refuse(where, f"is {shortened(whole)}, expected {_WORDS[kind]}")
        return whole


@lru_cache
def _hints(kind: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The types of a dataclass's fields, and the names of those that have no default."""
    hints = get_type_hints(kind)
    needed = [one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING]
    return {one.name: hints[one.name] for one in fields(kind)}, tuple(needed)
