"""Six stock models through ``torch.distributed.pipelining`` in real processes: which trace, which run, whose gradients are right.

    python benchmarks/torch_pipelining.py [--models gpt2,t5] [--stages 2,4] [--json]

Each model is used as torch's documentation says: it gives its output, the loss function is the schedule's, the split
points lie before evenly spaced blocks. 8 samples, 4 microbatches, 1F1B, gloo on CPU. Loss and gradients are compared with
accumulation over the same microbatches on the unsplit model. "Tied" sums the copies of a tied parameter by hand first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B, SplitPoint, pipeline

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.models import MODELS

MICROBATCHES = 4
TOLERANCE = 1e-5
TIMEOUT_S = 120
GRACE_S = 5
"""How long the other ranks may go on after one has failed."""


@dataclass(frozen=True, slots=True)
class Task:
    """A model as torch's pipelining wants it: what goes into the first stage, and a loss of the last stage's output."""

    model: nn.Module
    inputs: dict[str, Tensor]
    target: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    blocks: tuple[str, ...]


class Output(nn.Module):
    """Picks one field of a model's result."""

    def __init__(self, model: nn.Module, field: str) -> None:
        super().__init__()
        self.model = model
        self.field = field

    def forward(self, **inputs: Tensor) -> Tensor:
        return getattr(self.model(**inputs), self.field)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def task(name: str) -> Task:
    model, batch, _ = MODELS[name]()
    if name in ("gpt2", "llama", "t5"):
        model.config.use_cache = False
    layers = {"gpt2": "transformer.h", "llama": "model.layers"}
    if name in layers:
        blocks = tuple(f"model.{layers[name]}.{i}" for i in range(4))
        return Task(
            Output(model, "logits"), {"input_ids": batch["input_ids"]}, batch["labels"], next_token_loss, blocks
        )
    if name == "t5":
        inputs = {"input_ids": batch["input_ids"], "decoder_input_ids": model._shift_right(batch["labels"])}
        blocks = tuple(f"model.{half}.block.{i}" for half in ("encoder", "decoder") for i in range(3))
        return Task(Output(model, "logits"), inputs, batch["labels"], token_loss, blocks)
    if name == "unet2d":
        inputs = {"sample": batch["sample"], "timestep": batch["timestep"]}
        blocks = tuple(
            f"model.{b}" for b in ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")
        )
        return Task(Output(model, "sample"), inputs, batch["noise"], F.mse_loss, blocks)
    if name == "cnn":
        blocks = tuple(f"blocks.{i}" for i in range(4))
        return Task(model, {"images": batch["images"]}, batch["labels"], F.cross_entropy, blocks)
    return Task(model, {"x": batch[0]}, batch[1], F.mse_loss, tuple(f"layers.{i}" for i in range(8)))


def split_points(blocks: tuple[str, ...], stages: int) -> dict[str, SplitPoint]:
    """Before evenly spaced blocks: the first stage also has what comes before block 0."""
    return {blocks[s * len(blocks) // stages]: SplitPoint.BEGINNING for s in range(1, stages)}


def reference(case: Task) -> tuple[float, dict[str, Tensor]]:
    """Mean loss and gradients of the unsplit model, accumulated over the microbatches."""
    total = 0.0
    parts = {name: tensor.chunk(MICROBATCHES) for name, tensor in case.inputs.items()}
    for m, target in enumerate(case.target.chunk(MICROBATCHES)):
        loss = case.loss(case.model(**{name: part[m] for name, part in parts.items()}), target) / MICROBATCHES
        loss.backward()
        total += loss.item()
    named = case.model.named_parameters(remove_duplicate=False)
    gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
    case.model.zero_grad()
    return total, gradients


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm().clamp_min(1e-12))


def work(name: str, stages: int, rank: int, folder: Path) -> None:
    """One rank: notes how far it got in ``rank.json``."""
    note: dict[str, Any] = {"phase": "trace"}
    path = folder / f"{rank}.json"
    try:
        case = task(name)
        expected_loss, expected = reference(case)
        tied = {id(p): fqn for fqn, p in case.model.named_parameters()}
        canonical = {fqn: tied[id(p)] for fqn, p in case.model.named_parameters(remove_duplicate=False)}
        example = {key: tensor.chunk(MICROBATCHES)[0] for key, tensor in case.inputs.items()}
        pipe = pipeline(case.model, (), example, split_spec=split_points(case.blocks, stages))
        note["phase"] = "run"
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=stages)
        stage = pipe.build_stage(rank, torch.device("cpu"))
        schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=case.loss)
        losses: list[Tensor] = []
        inputs = case.inputs if rank == 0 else {}
        schedule.step(**inputs, target=case.target if rank == stages - 1 else None, losses=losses)
        note["phase"] = "done"
        mine = {fqn: p.grad for fqn, p in stage.submod.named_parameters() if p.grad is not None}
        everyone: list[Any] = [None] * stages
        dist.all_gather_object(everyone, mine)
        if rank == stages - 1:
            note |= compare(everyone, expected, canonical)
            note["loss"] = abs(sum(loss.item() for loss in losses) / MICROBATCHES - expected_loss) < TOLERANCE
    except Exception as error:
        note |= {"error": first_line(error), "time": time.time()}
    path.with_suffix(".new").write_text(json.dumps(note))
    path.with_suffix(".new").replace(path)
    os._exit(0)  # a rank that waits for a failed one would hang in the process group's destructor


def first_line(error: BaseException) -> str:
    """What started it: the first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:120]


def compare(
    everyone: list[dict[str, Tensor]], expected: dict[str, Tensor], canonical: dict[str, str]
) -> dict[str, Any]:
    """The worst gradient as torch leaves it, and after the copies of tied parameters are summed by hand."""
    alone: dict[str, float] = {}
    summed: dict[str, Tensor] = {}
    for gradients in everyone:
        for fqn, gradient in gradients.items():
            alone[fqn] = max(alone.get(fqn, 0.0), relative_error(gradient, expected[fqn]))
            summed[canonical[fqn]] = summed.get(canonical[fqn], 0) + gradient
    missing = {fqn for fqn in expected if canonical[fqn] not in summed}
    alone |= dict.fromkeys(missing, 1.0)
    by_hand = {fqn: relative_error(gradient, expected[fqn]) for fqn, gradient in summed.items()}
    worst = max(alone, key=lambda fqn: alone[fqn])
    return {
        "gradients": alone[worst] < TOLERANCE,
        "worst": worst.removeprefix("model."),
        "worst_error": alone[worst],
        "tied_summed_by_hand": not missing and max(by_hand.values()) < TOLERANCE,
    }


@dataclass(frozen=True, slots=True)
class Outcome:
    model: str
    stages: int
    traces: bool
    runs: bool
    loss: bool
    gradients: bool
    tied_summed_by_hand: bool
    remark: str


def examine(name: str, stages: int) -> Outcome:
    """Start the ranks, wait for all, for one to fail, or for the time to run out."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, __file__, "--worker", name, str(stages)]
        ranks = [
            subprocess.Popen([*command, str(rank), place], env=environment, stderr=subprocess.DEVNULL)
            for rank in range(stages)
        ]
        deadline = time.monotonic() + TIMEOUT_S
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            if any("error" in note for note in notes(folder)):
                deadline = min(deadline, time.monotonic() + GRACE_S)
            time.sleep(0.1)
        for rank in ranks:
            rank.kill()
            rank.wait()
        return judge(name, stages, list(notes(folder)))


def notes(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.json")):
        yield json.loads(path.read_text())


def judge(name: str, stages: int, seen: list[dict[str, Any]]) -> Outcome:
    errors = [note["error"] for note in sorted(seen, key=lambda note: note.get("time", 0.0)) if "error" in note]
    traces = bool(seen) and all(note["phase"] != "trace" for note in seen)
    runs = len(seen) == stages and all(note["phase"] == "done" for note in seen) and not errors
    last = next((note for note in seen if "gradients" in note), {})
    remark = errors[0] if errors else "" if len(seen) == stages else "hangs"
    if runs and not last["gradients"]:
        remark = f"gradient of {last['worst']} off by {last['worst_error']:.0%}"
    return Outcome(
        name,
        stages,
        traces,
        runs,
        runs and last["loss"],
        runs and last["gradients"],
        runs and last["tied_summed_by_hand"],
        remark,
    )


def show(outcomes: list[Outcome]) -> None:
    table = Table(title=f"torch.distributed.pipelining {torch.__version__}, 1F1B, {MICROBATCHES} microbatches")
    for column in ("model", "stages", "traces", "runs", "loss", "gradients", "tied summed", "remark"):
        table.add_column(column)
    for outcome in outcomes:
        row = asdict(outcome).values()
        table.add_row(*(("yes" if cell else "no") if isinstance(cell, bool) else str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--stages", default="2,4")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    outcomes = [
        examine(name, int(stages)) for name in options.models.split(",") for stages in options.stages.split(",")
    ]
    if options.json:
        print(json.dumps({"torch": torch.__version__, "outcomes": [asdict(outcome) for outcome in outcomes]}))
    else:
        show(outcomes)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        torch.set_num_threads(1)
        work(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
    main()
