"""Python's search for reference cycles, which visits every object again and again while a trace makes a million of them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

OBJECTS = 10_000
"""New objects between two searches; Python's own number is 700, or 2000."""


@contextmanager
def seldom_searched() -> Iterator[None]:
    """While this lasts, cycles are searched for less often, and not among the objects that there are already.

    What a caller has frozen or tuned himself is left as it is: with ``gc.freeze`` called, or the search off, nothing is done.
    """
    if gc.get_freeze_count() or not gc.isenabled():
        yield
        return
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(max(OBJECTS, thresholds[0]), *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
