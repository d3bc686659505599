"""The state of torch's, Python's and numpy's random generators as JSON."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch


def take() -> dict[str, Any]:
    raw = bytes(torch.get_rng_state().tolist())
    version, numbers, rest = random.getstate()
    drawn: Any = numpy.random.get_state()
    kind, keys, *others = drawn
    return {
        "torch": base64.b64encode(raw).decode(),
        "python": [version, list(numbers), rest],
        "numpy": [kind, keys.tolist(), *others],
    }


def give(state: Mapping[str, Any]) -> None:
    """Set what ``take`` gave. Raises KeyError, TypeError or ValueError for anything else."""
    raw = bytearray(base64.b64decode(state["torch"], validate=True))
    version, numbers, rest = state["python"]
    random.setstate((version, tuple(numbers), rest))
    if "numpy" in state:  # older checkpoints have none
        numpy.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.frombuffer(raw, dtype=torch.uint8))
