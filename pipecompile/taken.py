"""What stages have taken of a model, to notice when the model has something else in its place: stages would go on with
what they took, and what the user sees, saves or trains would be another thing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

from pipecompile.errors import BuildError
from pipecompile.ir import StagePlan

Place = tuple[weakref.ref[nn.Module], str, str, weakref.ref[Any], str]
"""A module of the model, its table and the name in it, what was there, and that one's FQN."""


class Taken:
    """The places in ``model`` of the modules and parameters that ``plans`` name, and of the modules on the way there.

    It keeps nothing of the model alive.
    """

    def __init__(self, model: nn.Module, plans: Iterable[StagePlan]) -> None:
        found: dict[str, Place] = {}
        for plan in plans:
            for fqn, table in (
                *((m, "_modules") for m in plan.modules),
                *((p, "_parameters") for p in plan.parameters),
            ):
                *path, last = fqn.split(".")
                here, way = model, ""
                for step in path:
                    found[way + step] = _place(here, "_modules", step, way + step)
                    here, way = here._modules[step], f"{way}{step}."  # type: ignore[assignment]
                found[fqn] = _place(here, table, last, fqn)
        self._places = tuple(found.values())

    def check(self) -> None:
        """BuildError if one of them was replaced."""
        for parent, table, name, child, fqn in self._places:
            here = parent()
            if here is not None and getattr(here, table).get(name) is not child():
                raise BuildError(
                    f"{fqn!r} of the model was replaced after it was compiled, but the stages still have what was there; "
                    "compile again, or change it in place (load_state_dict() without assign=True, pipe.load_weights())"
                )


def _place(parent: nn.Module, table: str, name: str, fqn: str) -> Place:
    return weakref.ref(parent), table, name, weakref.ref(getattr(parent, table)[name]), fqn
