"""Models ask torch whether they are being exported, and some then take a way that does not work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

QUESTIONS = ("is_compiling", "is_dynamo_compiling", "is_exporting")


@contextmanager
def told_that_it_is_not_exported() -> Iterator[None]:
    """While this lasts, a model that is traced goes the way that it goes in eager mode."""
    saved = {name: getattr(torch.compiler, name) for name in QUESTIONS if hasattr(torch.compiler, name)}
    for name in saved:
        setattr(torch.compiler, name, lambda: False)
    try:
        yield
    finally:
        for name, question in saved.items():
            setattr(torch.compiler, name, question)
