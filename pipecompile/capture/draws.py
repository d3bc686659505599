"""Which calls draw random numbers themselves, from torch or from outside of it, seen by the generators' states."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pipecompile.capture.state import untouched
from pipecompile.capture.tracepoints import Recorder
from pipecompile.errors import CaptureError

TRIES = 16
"""How many seeds are tried to see whether the loss changes with them."""


@dataclass(slots=True)
class Draws:
    """Keys of the calls that drew ("" outside of all): from torch, and from Python's or numpy's generator."""

    torch: set[str] = field(default_factory=set)
    foreign: set[str] = field(default_factory=set)

    @contextmanager
    def watched(self, recorder: Recorder) -> Iterator[None]:
        """Look at every call's beginning and end; what has changed since the last look is the doing of who ran."""
        last = [_torch_state(), _foreign_state()]

        def look(running: str) -> None:
            now = [_torch_state(), _foreign_state()]
            for before, after, found in zip(last, now, (self.torch, self.foreign)):
                if before != after:
                    found.add(running)
            last[:] = now

        def seed() -> int:
            self.foreign.add(call.key if (call := recorder.innermost) else "")
            return original()

        original, torch.seed = torch.seed, seed
        recorder.look = look
        try:
            yield
        finally:
            look("")
            recorder.look, torch.seed = None, original


def refuse_foreign_draws(step: nn.Module, model: nn.Module, batch: Any, draws: Draws) -> None:
    """CaptureError if numbers that torch does not draw change the loss: a trace would repeat those of one run for ever."""
    if not draws.foreign or any(parameter.is_meta for parameter in model.parameters()):
        return
    losses = set()
    for seed in range(TRIES):
        with torch.no_grad(), untouched(model):
            random.seed(seed)
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed(seed)
            losses.add(float(step(batch)[0]))
    if len(losses) > 1:
        names = sorted(key.rpartition("@")[0] or "the model's own forward" for key in draws.foreign)
        raise CaptureError(
            f"{', '.join(names[:3])} draws random numbers from Python or numpy, or a seed from the system, which decide what is "
            "computed: a stage would repeat those of one run for ever. Turn it off (in a transformers configuration layerdrop=0.0, mask_time_prob=0.0 "
            "and apply_spec_augment=False), or draw with torch"
        )


def _torch_state() -> Any:
    on_device = torch.cuda.default_generators if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    return [generator.get_state().numpy().tobytes() for generator in (torch.default_generator, *on_device)]


def _foreign_state() -> Any:
    """The states of Python's generator and of numpy's old one, if it is there."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return random.getstate()[1]
    _, keys, position, *_ = numpy.random.get_state()
    return random.getstate()[1], keys.tobytes(), position
