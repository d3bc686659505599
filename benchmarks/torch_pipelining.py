"""Every family of the zoo through ``torch.distributed.pipelining``: which trace, which run, whose gradients are right.

    python benchmarks/torch_pipelining.py [FAMILY …] [--stages 2,4] [--json | --markdown]

8 samples, 4 microbatches, 1F1B, gloo on CPU, a process for each stage. Each family is tried in two ways (see torch_trial), and
the better result counts. Loss, gradients and buffers are compared with accumulation over the same microbatches on the
unsplit model, as closely as those of pipecompile are. "by hand": right after the copies of tied parameters are summed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.torch_trial import MICROBATCHES, WAYS, attempt
from tests.models import MODELS
from tests.zoo.harness import Case, families

TIMEOUT_S = 90
GRACE_S = 3
"""How long the other ranks may go on after one has failed."""
WORDS = (
    "right",
    "tied gradients wrong",
    "gradients wrong",
    "other loss and gradients",
    "fails in the step",
    "not traced",
)
"""How far a family may come, best first."""


def switch_with_masks() -> Case:
    """Switch Transformers with the masks that transformers leaves out while it is traced, and then reads."""
    model, batch, loss = families()["switch_transformers"]()
    masks = {"attention_mask": "input_ids", "decoder_attention_mask": "labels"}
    return model, batch | {mask: torch.ones_like(batch[ids]) for mask, ids in masks.items()}, loss


EXTRA = {"mlp": MODELS["mlp"], "switch_with_masks": switch_with_masks}
"""Linear layers in a row: what torch's pipelining is at its best for; and a family in a form that is kinder to a trace."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How far a family came in one way."""

    family: str
    stages: int
    way: str
    traces: bool = False
    runs: bool = False
    loss: bool = False
    gradients: bool = False
    tied_summed_by_hand: bool = False
    remark: str = ""

    @property
    def rank(self) -> tuple[bool, ...]:
        return self.gradients and self.loss, self.tied_summed_by_hand, self.loss, self.runs, self.traces

    @property
    def word(self) -> str:
        """In one word."""
        if self.gradients and self.loss:
            return "right"
        if self.runs:
            if not self.loss:
                return "other loss and gradients"
            return "tied gradients wrong" if self.tied_summed_by_hand else "gradients wrong"
        return "fails in the step" if self.traces else "not traced"


def examine(name: str, family: Callable[[], Any], stages: int) -> Outcome:
    """The better of the two ways."""
    best: Outcome | None = None
    for way in WAYS:
        found = try_one(name, family, stages, way)
        if found is not None and (best is None or found.rank > best.rank):
            best = found
        if best and best.gradients and best.loss:
            break
    return best or Outcome(name, stages, "none", remark="no split points at whole blocks")


def try_one(name: str, family: Callable[[], Any], stages: int, way: str) -> Outcome | None:
    """Run a trial in a process group of its own, until it is through, one rank has failed, or the time has run out.

    None if there is nothing to try in this way.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            attempt(family(), way, stages, folder)
            os._exit(0)
        deadline = time.monotonic() + TIMEOUT_S
        while os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
            if any("error" in note for note in notes(folder)):
                deadline = min(deadline, time.monotonic() + GRACE_S)
            time.sleep(0.05)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        trial = read(folder / "trial.json")
        if trial.get("skipped"):
            return None
        return judge(
            Outcome(name, stages, way, trial.get("traces", False), remark=trial.get("error", "")), [*notes(folder)]
        )


def notes(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("rank*.json")):
        yield read(path)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def judge(trial: Outcome, seen: list[dict[str, Any]]) -> Outcome:
    """What the ranks' notes say about a trial."""
    if not trial.traces:
        return trial if trial.remark else Outcome(trial.family, trial.stages, trial.way, remark="tracing does not end")
    errors = [note["error"] for note in sorted(seen, key=lambda note: note.get("time", 0.0)) if "error" in note]
    runs = len(seen) == trial.stages and not errors
    last = next((note for note in seen if "gradients" in note), {})
    found = {key: runs and last[key] for key in ("loss", "gradients", "tied_summed_by_hand")}
    remark = errors[0] if errors else "" if runs else "hangs"
    if runs and not last["loss"]:
        remark = "wrong loss"
    elif runs and not last["gradients"]:
        off = "is missing" if last["missing"] else f"off by {last['worst_error']:.0%}"
        remark = f"{last['worst']} {off}"
    return Outcome(trial.family, trial.stages, trial.way, True, runs, **found, remark=remark)


def show(outcomes: list[Outcome]) -> None:
    table = Table(title=f"torch.distributed.pipelining {torch.__version__}, 1F1B, {MICROBATCHES} microbatches")
    for column in ("family", "S", "way", "traces", "runs", "loss", "gradients", "by hand", "remark"):
        table.add_column(column)
    for outcome in outcomes:
        row = asdict(outcome).values()
        table.add_row(*(("yes" if cell else "no") if isinstance(cell, bool) else str(cell)[:90] for cell in row))
    Console(width=None if sys.stdout.isatty() else 170).print(table)


def markdown(outcomes: list[Outcome], stages: list[int]) -> str:
    """A row for the families that came as far with each number of stages."""
    word = {(outcome.family, outcome.stages): outcome.word for outcome in outcomes}
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(outcome.family for outcome in outcomes):
        rows.setdefault(tuple(word[name, count] for count in stages), []).append(name)
    lines = [
        f"| family | {' | '.join(f'torch, {count} stages' for count in stages)} |",
        f"|{'---|' * (1 + len(stages))}",
    ]
    ordered = sorted(rows.items(), key=lambda row: [WORDS.index(one) for one in row[0]])
    return "\n".join([*lines, *(f"| {', '.join(names)} | {' | '.join(words)} |" for words, names in ordered)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all")
    parser.add_argument("--stages", default="2,4")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    form.add_argument("--markdown", action="store_true", help="print the README's table")
    options = parser.parse_args()
    known = EXTRA if options.families and set(options.families) <= set(EXTRA) else families() | EXTRA
    unknown = [name for name in options.families if name not in known]
    if unknown:
        parser.error(f"no family {unknown[0]!r}; there are {', '.join(known)}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    stages = list(map(int, options.stages.split(",")))
    outcomes = []
    for name in options.families or known:
        for count in stages:
            outcomes.append(examine(name, known[name], count))
            print(outcomes[-1], file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({"torch": torch.__version__, "outcomes": [asdict(outcome) for outcome in outcomes]}))
    elif options.markdown:
        print(markdown(outcomes, stages))
    else:
        show(outcomes)


if __name__ == "__main__":
    main()
