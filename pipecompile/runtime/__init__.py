"""Executes programs: stages, microbatches, transports and the executor. Knows the values of ``ir`` and the errors only."""

from pipecompile.runtime.microbatches import split
from pipecompile.runtime.stage import Stage

__all__ = ["Stage", "split"]
