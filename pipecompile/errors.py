"""The tree of errors: each is named after what went wrong for the user, and its message names the remedy."""

import math


class PipecompileError(Exception):
    """Root of every error that this package raises on purpose."""


class CaptureError(PipecompileError):
    """The model, its batch or its loss could not be traced into a graph."""


class CostError(PipecompileError):
    """Costs are missing, malformed or impossible (negative, NaN)."""


class PartitionError(PipecompileError):
    """The graph cannot be cut as asked."""


class ScheduleError(PipecompileError):
    """A schedule is unknown, or does not allow the shape asked of it."""


class ProgramError(PipecompileError):
    """A program breaks one of the rules that make it safe to run; the message names the instruction."""


class MemoryLimitError(PartitionError):
    """A rank needs more memory than it has; with ``needed`` bytes for each rank a program was found (infinite: unknown)."""

    def __init__(self, message: str, needed: float = math.inf) -> None:
        super().__init__(message)
        self.needed = needed


class BuildError(PipecompileError):
    """A build directory is missing something, was changed, or was made by another version."""


class CheckpointError(PipecompileError):
    """A checkpoint does not fit the model, is damaged, or cannot be written; the message names the tensor."""


class BatchError(PipecompileError):
    """A batch does not fit the program: not divisible, or of another shape than the compiled one."""


class RuntimeFault(PipecompileError):
    """A program failed while it ran; the message names rank, instruction, microbatch and peer."""


class PeerFault(RuntimeFault):
    """A rank lost the connection to another, or waited too long for it (``late``)."""

    def __init__(self, message: str, late: bool = False) -> None:
        super().__init__(message)
        self.late = late


class VerificationError(PipecompileError):
    """The pipeline's loss, a gradient or a buffer differs from the unsplit model's."""


class TraceError(PipecompileError):
    """A trace was asked for that cannot be made or written."""


def must_stay_whole(fqn: str, reason: str, obstacle: str = "") -> str:
    """The message about a module (empty: the model itself) that must be called as a whole, but cannot be."""
    why = obstacle or "values from its inside are read outside of it, or it reads what is not passed to it"
    name = fqn or "the model's own forward"
    if not fqn:
        why = "the whole model would be one stage"
    return (
        f"{name} cannot be split: {reason}, which only survives if the module is called as a whole, "
        f"but {why}; move that code into a module of its own whose inputs and outputs are tensors"
    )


def briefly(error: Exception) -> str:
    """An error's class and the beginning of what it says, for a note."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
