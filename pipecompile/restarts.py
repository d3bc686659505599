"""Goes on after torchrun has restarted the ranks: from the newest checkpoint of this run, to the step at which it was to end.

DIR/run.json     the step at which the run began, written when it begins
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from pipecompile.errors import CheckpointError
from pipecompile.runtime import from_first_rank
from pipecompile.weights import folder

RUN = "run.json"


@dataclass(frozen=True, slots=True)
class Restart:
    """A run that began at step ``first`` and goes on from ``checkpoint``."""

    first: int
    checkpoint: Path


def begin_run(directory: str | Path, first: int) -> None:
    """Note in the directory of checkpoints at which step this run begins."""

    def write() -> str:
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            folder.write_text(Path(directory) / RUN, json.dumps({"first_step": first}))
        except OSError as error:
            raise CheckpointError(f"{str(directory)!r} cannot be written: {error}; give another directory") from error
        return ""

    from_first_rank(write)


def restarted(directory: str | Path | None) -> Restart | None:
    """Where to go on; None in a run's first attempt, or if it has written no checkpoint yet."""
    if directory is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None

    def read() -> str:
        try:
            first = int(json.loads((Path(directory) / RUN).read_bytes())["first_step"])
        except OSError:  # it failed before it had begun
            return ""
        later = [path for path in folder.complete(Path(directory)) if folder.step_of(path) > first]
        return json.dumps([first, str(later[0])]) if later else ""

    found = from_first_rank(read)
    return Restart(json.loads(found)[0], Path(json.loads(found)[1])) if found else None
