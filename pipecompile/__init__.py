"""pipecompile: a compiler that makes a pipeline-parallel training program out of an unmodified PyTorch model.

    pipe = pipecompile.compile(model, batch, stages=4, microbatches=8)
    loss = pipe.step(batch)            # gradients are in .grad

Names are loaded when first used, so that the parts that need no torch start without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipecompile.api import Pipe, compile, load, pipeline
    from pipecompile.errors import PipecompileError

__all__ = ["Pipe", "PipecompileError", "compile", "load", "pipeline"]
__version__ = "0.1.0"

_HOMES = {"PipecompileError": "pipecompile.errors"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pipecompile' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "pipecompile.api")), name)
