"""Where a command prints: with ``--json`` standard output is for the one JSON object, everything else goes to stderr."""

from __future__ import annotations

import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO


@contextmanager
def standard_output(json_only: bool) -> Iterator[TextIO]:
    """The stream for the command's own result; what a model prints meanwhile goes to stderr if ``json_only``."""
    stream = sys.stdout
    if not json_only:
        yield stream
        return
    with redirect_stdout(sys.stderr):
        yield stream


def nobody_reads(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose reader, ``head`` for example, has seen enough and gone."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return bool(poll.poll(0))
