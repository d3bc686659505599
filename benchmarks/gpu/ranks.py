"""Two ranks on CUDA against the unsplit model: ``python -m benchmarks.gpu.ranks [--backend gloo] [--device cpu]``.

Over NCCL each rank has a GPU of its own; over gloo both share the first one, and messages go through pinned buffers. Two
steps with each schedule; loss and gradients are compared with gradient accumulation over the same microbatches on the
rank's own copy of the whole model. Exit code 1 if something differs.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pipecompile
from benchmarks.gpu.setting import Result, arguments, checked, tell
from pipecompile.runtime import connect

MICROBATCHES, ROWS, WIDTH = 4, 8, 256
SCHEDULES = ("gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x.square().mean()


def differing(schedule: str, device: torch.device) -> str:
    """What differs from the unsplit model after two steps with a schedule; empty if nothing does."""
    torch.manual_seed(0)
    model = Net().to(device)
    reference = copy.deepcopy(model)
    batch = (torch.randn(ROWS * MICROBATCHES, WIDTH).to(device),)
    stages = 4 if schedule in ("interleaved-1f1b", "zb-v") else 2
    pipe = pipecompile.compile(
        model, batch, stages=stages, ranks=2, microbatches=MICROBATCHES, schedule=schedule, costs="estimate"
    )
    for _ in range(2):
        loss = pipe.step(batch)
        expected = torch.zeros((), device=device)
        for x in batch[0].chunk(MICROBATCHES):
            part = reference(x) / MICROBATCHES
            part.backward()
            expected += part.detach()
        if not torch.allclose(loss, expected, rtol=1e-5):
            return f"loss {loss.item()}, expected {expected.item()}"
    compared = 0
    for (name, got), wanted in zip(model.named_parameters(), reference.parameters()):
        if got.grad is not None and wanted.grad is not None:
            compared += 1
            if (got.grad - wanted.grad).abs().max() > 1e-5 * wanted.grad.abs().max():
                return f"gradient of {name}"
    return "" if compared else "no gradient to compare"


def run(device: str, backend: str, schedules: tuple[str, ...] = SCHEDULES) -> Result:
    """One row for each schedule; every rank of two must call this at the same time."""
    local = int(os.environ.get("LOCAL_RANK", "0")) if backend == "nccl" else 0
    if device == "cuda":
        torch.cuda.set_device(local)
    place = torch.device(device, local) if device == "cuda" else torch.device("cpu")
    connect(backend, timeout_s=60)
    rows = []
    for schedule in schedules:
        began = time.perf_counter()
        found = differing(schedule, place)
        row = {"backend": backend, "schedule": schedule, "rank": dist.get_rank(), "differs": found}
        rows.append(row | {"seconds": time.perf_counter() - began})
    return {"rows": rows, "ok": not any(row["differs"] for row in rows)}


def start(options: list[str]) -> int:
    """Two processes of this script under torchrun; the exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*command, "-m", "benchmarks.gpu.ranks", *options], check=False).returncode


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument(
        "--backend", choices=("nccl", "gloo"), help="nccl on two GPUs, gloo on one (default: what fits)"
    )
    options = checked(parser)
    devices = torch.cuda.device_count() if options.device == "cuda" else 0
    backend = options.backend or ("nccl" if devices > 1 else "gloo")
    if backend == "nccl" and devices < 2:
        parser.error(f"NCCL needs a GPU for each of two ranks, and there are {devices}; --backend gloo shares one")
    if "RANK" not in os.environ:
        return start(["--device", options.device, "--backend", backend, *["--json"] * options.json])
    result = run(options.device, backend)
    code = tell(result, options) if dist.get_rank() == 0 else int(not result["ok"])
    dist.barrier()
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
