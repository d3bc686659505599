"""All stages on one device beside plain gradient accumulation: ``python -m benchmarks.gpu.local_runtime [--device cpu]``.

A GPT-2 (124M parameters on a GPU, a narrow one on the CPU), 4 stages, 8 microbatches, both on the same model in turn, the
device idle before and after each step; the figure is the median of paired ratios. Exit code 1 if it is above 1.03, or if
the losses differ. ``--width`` and ``--layers`` change the CPU's model: 384 and 4 make stages of 10 ms and more.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import pipecompile
from benchmarks.gpu.setting import Batch, Result, arguments, checked, make, tell

STAGES, MICROBATCHES, BAR = 4, 8, 1.03
WARM_UP = 3


def accumulate(model: nn.Module, batch: Batch) -> Tensor:
    """A step without a pipeline."""
    value = torch.zeros((), device=batch["labels"].device)
    for parts in zip(*(tensor.chunk(MICROBATCHES) for tensor in batch.values())):
        loss = model(**dict(zip(batch, parts))).loss / MICROBATCHES
        loss.backward()
        value += loss.detach()
    return value


def timed(model: nn.Module, step: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    """Seconds of a step, and its loss."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    model.zero_grad()
    wait()
    began = time.perf_counter()
    loss = step()
    wait()
    return time.perf_counter() - began, loss


def run(device: str, steps: int = 20, width: int = 0, layers: int = 0) -> Result:
    """One row for each pair of steps; milliseconds."""
    model, batch = make("gpt2", device, MICROBATCHES, layers, width)
    pipe = pipecompile.compile(
        model, batch, stages=STAGES, microbatches=MICROBATCHES, costs="estimate", check=False, progress=False
    )
    rows = []
    for step in range(steps + WARM_UP):
        first, second = (
            timed(model, run, device) for run in (lambda: pipe.step(batch), lambda: accumulate(model, batch))
        )
        (ours, ours_loss), (plain, plain_loss) = first, second
        torch.testing.assert_close(ours_loss, plain_loss, rtol=1e-5, atol=1e-6)
        if step >= WARM_UP:
            rows.append({"pipeline_ms": ours * 1e3, "accumulation_ms": plain * 1e3, "ratio": ours / plain})
    median = statistics.median(row["ratio"] for row in rows)
    return {"rows": rows, "median": median, "bar": BAR, "ok": median <= BAR}


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=0)
    parser.add_argument("--layers", type=int, default=0)
    options = checked(parser)
    torch.set_num_threads(1)
    return tell(run(options.device, options.steps, options.width, options.layers), options)


if __name__ == "__main__":
    sys.exit(main())
