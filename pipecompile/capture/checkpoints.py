"""Activation checkpoints that a forward makes: their functions are called straight through, and the trace notes where.

Both forms of ``torch.utils.checkpoint.checkpoint`` are covered by what they call. A region that a module's own
``__call__`` begins (``gradient_checkpointing_enable`` of transformers) belongs to that module: calling the module as a
whole keeps it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils import checkpoint

from pipecompile.capture.tracepoints import Recorder

TAG = "checkpoint:"


@contextmanager
def straight_through(recorder: Recorder) -> Iterator[None]:
    """While this lasts, checkpointed functions run once, between two markers of ``recorder``."""
    reentrant = checkpoint.CheckpointFunction.__dict__.get("apply")
    generator = checkpoint._checkpoint_without_reentrant_generator

    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        with recorder.region(_own_module(), args):
            return function(*args)

    def without_reentrant(function: Callable[..., Any], *rest: Any, **kwargs: Any) -> Iterator[None]:
        with recorder.region(_own_module(), (*rest, kwargs)):
            yield

    patched: Any = checkpoint
    patched.CheckpointFunction.apply = apply
    patched._checkpoint_without_reentrant_generator = without_reentrant
    try:
        yield
    finally:
        if reentrant is None:
            del patched.CheckpointFunction.apply
        else:
            patched.CheckpointFunction.apply = reentrant
        patched._checkpoint_without_reentrant_generator = generator


def _own_module() -> nn.Module | None:
    """The module whose own ``__call__``, not yet its forward, runs the checkpoint; None if a forward does."""
    frame = sys._getframe(1)
    while frame is not None:
        name, module = frame.f_code.co_name, frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            if name == "__call__":
                return module
            if name == "forward" or name == "_call_impl":
                return None
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None
