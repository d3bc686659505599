"""Activation checkpoints that a forward makes: their functions are called straight through, and the trace notes where.

Both forms of ``torch.utils.checkpoint.checkpoint`` are covered by what they call. A region that a module's own
``__call__`` begins (``gradient_checkpointing_enable`` of transformers) belongs to that module: calling the module as a
whole keeps it. Options that can be written down go with the region, a ``context_fn`` cannot: its module stays whole.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils import checkpoint

from pipecompile.capture.tracepoints import Recorder

TAG = "checkpoint:"
"""Begins a region's tag; its number and its options as source follow: ``checkpoint:3, preserve_rng_state=False``."""
DEFAULTS = {"preserve_rng_state": True, "determinism_check": "default", "debug": False, "early_stop": True}
Note = Callable[[nn.Module | None, str], None]


@contextmanager
def straight_through(recorder: Recorder, note: Note | None = None) -> Iterator[None]:
    """While this lasts, checkpointed functions run once, between two markers of ``recorder``.

    ``note`` is told of what cannot be written down, and whose ``__call__`` it is (None: a forward's).
    """
    reentrant = checkpoint.CheckpointFunction.__dict__.get("apply")
    generator = checkpoint._checkpoint_without_reentrant_generator
    signature = inspect.signature(generator)

    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        with recorder.region(_own_module(), args, _options({"preserve_rng_state": preserve})):
            return function(*args)

    def without_reentrant(*args: Any, **kwargs: Any) -> Iterator[None]:
        given = signature.bind(*args, **kwargs).arguments
        owner = _own_module()
        if note and given.get("context_fn", checkpoint.noop_context_fn) is not checkpoint.noop_context_fn:
            note(owner, "it checkpoints activations with a context_fn")
        with recorder.region(owner, (given.get("args", ()), given.get("kwargs", {})), _options(given)):
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


def _options(given: Mapping[str, Any]) -> str:
    """The options that are not as usual, as source that follows other arguments."""
    unusual = {name: given[name] for name, usual in DEFAULTS.items() if given.get(name, usual) != usual}
    return "".join(f", {name}={json.dumps(v) if isinstance(v, str) else bool(v)}" for name, v in unusual.items())


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
