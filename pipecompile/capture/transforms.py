"""Transforms of functions, ``torch.vmap`` and those of ``torch.func``: a module that uses one is left whole.

Inside of a transform tensors stand for something else (a row of a batch, a number that is differentiated), so the
operations of a trace are not those of the batch, and the module calls in there are not seen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipecompile.errors import CaptureError


def running() -> int | None:
    """The number of the transform that is running, None outside of any: torch tells it in a private place only."""
    level: Callable[[], int | None] | None = getattr(getattr(torch._C, "_functorch", None), "maybe_current_level", None)
    return level() if level is not None else None


class Transformed(Exception):
    """The forward of the module ``fqn`` (empty: the model's own, or the loss) uses a transform, at ``place``."""

    def __init__(self, fqn: str, place: str) -> None:
        self.fqn, self.place = fqn, place

    @property
    def note(self) -> str:
        return f"left whole, never cut, and run as it is, because it uses torch.vmap or torch.func ({self.place})"

    def refusal(self, loss: Callable[..., object]) -> CaptureError:
        """``loss`` is the loss function, whose lines torch does not keep."""
        code = getattr(loss, "__code__", None)
        first = f": {code.co_filename}, line {code.co_firstlineno}" if code else ""
        who = "the model's own forward" if self.place else "the loss function"
        return CaptureError(
            f"{who} uses torch.vmap or torch.func ({self.place or f'somewhere in {who}{first}'}), which a trace does not "
            "follow; move that line into a module of its own, which is then left whole and runs as it is"
        )
