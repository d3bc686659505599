"""When two modules trace alike: the same classes, configuration, parameters and plain attributes all the way down."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

from pipecompile.capture.structure import PLAIN

DEEPEST = 4
"""How deep in an attribute its parts are compared."""
EMPTY = CellType()


def structure(module: nn.Module, fqn: str) -> str:
    """Equal for modules whose calls with equal arguments trace to equal operations.

    Whole numbers equal to the block's own index (``layer_idx``) count as the same, and so do names of the modules.
    """
    digits = [int(part) for part in fqn.split(".") if part.isdecimal()]
    index = digits[-1] if digits else None
    lines: list[object] = []
    for name, part in module.named_modules():
        lines += [name, f"{type(part).__module__}.{type(part).__qualname__}", part.training, part.extra_repr()]
        lines += [len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks)] if name else []
        owner = _Owner(part, f"{fqn}.{name}".strip("."), index)
        for key, value in sorted(part.__dict__.items()):
            if not key.startswith("_") and key != "training":
                lines.append((key, owner.text(value)))
        for key, tensor in (*part._parameters.items(), *part._buffers.items()):
            lines.append((key, None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)))
    return repr(lines)


@dataclass(frozen=True, slots=True)
class _Owner:
    """The module whose attributes are looked at."""

    module: nn.Module
    fqn: str
    index: int | None

    def text(self, value: Any, depth: int = 0) -> str:
        """Equal for attributes that make two forwards do the same; what cannot be looked into is known by identity."""
        if depth == 0 and type(value) is int and value == self.index:
            return "its index"
        if isinstance(value, str) and value and f".{self.fqn}".endswith(f".{value}"):
            return "its name"
        if isinstance(value, PLAIN):
            return repr(value)
        if isinstance(value, MethodType) and value.__self__ is self.module:
            return f"its {value.__func__.__qualname__}"
        parts = self._parts(value) if depth < DEEPEST else None
        if parts is None:
            return f"{type(value).__qualname__} {id(value)}"
        return f"{type(value).__qualname__}({', '.join(self.text(part, depth + 1) for part in parts)})"

    def _parts(self, value: Any) -> Iterable[Any] | None:
        """What makes up a value; None if that is not known."""
        if isinstance(value, tuple | list):
            return value
        if isinstance(value, dict):
            return (*value, *value.values())
        if isinstance(value, partial):
            return value.func, value.args, value.keywords
        if isinstance(value, FunctionType):
            around = [cell.cell_contents for cell in value.__closure__ or () if cell != EMPTY]
            return value.__code__, value.__defaults__, value.__kwdefaults__, around
        make: Any = type(value).__new__
        if (
            isinstance(value, nn.Module | type) or make is not object.__new__
        ):  # its state is not in its attributes alone
            return None
        return vars(value).items() if hasattr(value, "__dict__") else None
