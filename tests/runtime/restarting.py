"""A training job that is killed as ``KILLS`` says: the model file of a build, and under torchrun a loop of its own.

``KILLS`` is a JSON list of [attempt, process, what, count, delay]: in that attempt that process kills itself, as the system
would, ``delay`` seconds after its ``count``-th "step" or "save" has begun, or before the ``count``-th time that it flushes,
renames or removes a file ("file").
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from pipecompile import part
from pipecompile.runtime import RankRuntime

STEPS, EVERY, ROWS = 10, 3, 8
WIDTH, WORDS = 16, 32


class Net(nn.Module):
    """Reads words and scores them with the same table; dropout on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.BatchNorm1d(WIDTH), nn.Dropout(0.2)) for _ in range(6)
        )
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, words: Tensor, following: Tensor) -> Tensor:
        hidden = self.table(words)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return nn.functional.cross_entropy(self.head(hidden).float(), following)


def model() -> nn.Module:
    return Net()


def narrow() -> nn.Module:
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(0)
    return Net().bfloat16()


def batch() -> dict[str, Tensor]:
    return {name: torch.randint(WORDS, (ROWS,)) for name in ("words", "following")}


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def batch_of(step: int, replica: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + replica)
    return {name: torch.randint(WORDS, (ROWS,), generator=generator) for name in ("words", "following")}


def arm() -> None:
    """Make this process kill itself where it is to."""
    attempt, process = (int(os.environ.get(name, -1)) for name in ("TORCHELASTIC_RESTART_COUNT", "RANK"))
    for when, who, what, count, delay in json.loads(os.environ.get("KILLS", "[]")):
        if (when, who) != (attempt, process):
            continue
        if what == "step":
            _watch(RankRuntime, "step", count, delay)
        elif what == "save":
            _watch(part, "save_checkpoint", count, delay)
        else:
            calls = [count]
            for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (shutil, "rmtree")):
                _watch(owner, name, calls, 0.0)


def _watch(owner: Any, name: str, count: Any, delay: float) -> None:
    """At the ``count``-th call of a function, which several may share as a list, this process has ``delay`` seconds to live."""
    whole = getattr(owner, name)
    left = count if isinstance(count, list) else [count]

    def counted(*operands: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            if delay:
                threading.Thread(target=_end, args=(delay,), daemon=True).start()
            else:
                _end(0.0)
        return whole(*operands, **options)

    setattr(owner, name, counted)


def _end(delay: float) -> None:
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)


def train(build: str, folder: str) -> None:
    """Masters, clipping and a schedule of rates in a loop that goes on where its last checkpoint was written.

    Each process adds to a file of its own what it sees: the step, the loss, the norm of the gradients, the rate.
    """
    import pipecompile
    from pipecompile.runtime import backend_here, connect
    from pipecompile.weights.folder import complete

    connect(backend_here(), timeout_s=60)
    process, place = int(os.environ["RANK"]), Path(folder)
    pipe = pipecompile.load(build, narrow())
    trained = torch.optim.SGD(pipe.master_parameters(), lr=0.2, momentum=0.9)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(trained, T_max=STEPS)
    if complete(place):
        pipe.load_checkpoint(place, trained)
        rates.load_state_dict(json.loads((place / f"rates-{pipe.steps}.json").read_text()))
    with (place / f"seen-{process}.txt").open("a", buffering=1) as seen, pipe.together():
        while pipe.steps < STEPS:
            loss = float(pipe.step(batch_of(pipe.steps, pipe.replica)))
            norm = float(pipe.clip_grad_norm_(1.0))
            trained.step()
            trained.zero_grad()
            seen.write(json.dumps([pipe.steps - 1, loss, norm, rates.get_last_lr()[0]]) + "\n")
            rates.step()
            if pipe.steps % EVERY == 0 or pipe.steps == STEPS:
                if process == 0:
                    (place / f"rates-{pipe.steps}.json").write_text(json.dumps(rates.state_dict()))
                pipe.save_checkpoint(place, trained)
    torch.distributed.destroy_process_group()


arm()
if __name__ == "__main__":
    train(*sys.argv[1:])
