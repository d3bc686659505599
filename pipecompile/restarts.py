"""Goes on after torchrun has restarted the ranks: from the newest checkpoint of this run, to the step at which it was to end.

DIR/run.json     the step at which the run began, and the losses of its steps up to the last checkpoint at least
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from pipecompile.runtime import from_first_rank
from pipecompile.saving import on_first_rank
from pipecompile.weights import folder

RUN = "run.json"


@dataclass(frozen=True, slots=True)
class Restart:
    """A run that began at step ``first``, had these ``losses``, and goes on from ``checkpoint``."""

    first: int
    losses: list[float]
    checkpoint: Path


def note_run(directory: str | Path, first: int, losses: list[float]) -> None:
    """Note in the directory of checkpoints at which step this run has begun, and its losses up to now."""

    def write() -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        folder.replace_text(Path(directory) / RUN, json.dumps({"first_step": first, "losses": losses}))

    on_first_rank(write)


def restarted(directory: str | Path | None) -> Restart | None:
    """Where to go on; None in a run's first attempt, or if it has written no checkpoint yet."""
    if directory is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None

    def read() -> str:
        try:
            run = json.loads((Path(directory) / RUN).read_bytes())
        except OSError:  # it failed before it had begun
            return ""
        first = int(run["first_step"])
        later = [path for path in folder.complete(Path(directory)) if folder.step_of(path) > first]
        return json.dumps([first, run["losses"], str(later[0])]) if later else ""

    found = from_first_rank(read)
    if not found:
        return None
    first, losses, checkpoint = json.loads(found)
    return Restart(first, losses[: folder.step_of(Path(checkpoint)) - first], Path(checkpoint))
