"""Two ranks over NCCL against the unsplit model: ``torchrun --nproc-per-node 2 benchmarks/gpu/ranks.py [--device cpu]``.

Each rank has a GPU. Two steps with each schedule; loss and gradients are compared with gradient accumulation over the
same microbatches on the rank's own copy of the whole model. Exit code 1 at the first that differs.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pipecompile
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if options.device == "cuda":
        if torch.cuda.device_count() <= local:
            parser.error(f"rank {local} has no GPU of its own; --device cpu shows that the script works, over gloo")
        torch.cuda.set_device(local)
    device = torch.device(options.device, local) if options.device == "cuda" else torch.device("cpu")
    connect("nccl" if options.device == "cuda" else "gloo", timeout_s=60)
    failed = 0
    for schedule in SCHEDULES:
        found = differing(schedule, device)
        print(f"rank {dist.get_rank()} {schedule}: {f'{found} differs' if found else 'equal'}", flush=True)
        failed += bool(found)
    dist.barrier()
    dist.destroy_process_group()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
