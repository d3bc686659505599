"""Executes programs: stages, microbatches, transports and the executor. Knows the values of ``ir`` and the errors only."""

from pipecompile.runtime.device import device_of
from pipecompile.runtime.local import LocalRuntime
from pipecompile.runtime.microbatches import split
from pipecompile.runtime.stage import Stage

__all__ = ["LocalRuntime", "Stage", "device_of", "split"]
