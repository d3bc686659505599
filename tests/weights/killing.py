"""Saves one checkpoint after another until it is killed (``benchmarks.kill_saves``), and reads what is left."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn

from pipecompile.saving import Share, save_checkpoint
from pipecompile.weights import folder
from pipecompile.weights.checkpoint import open_checkpoint
from pipecompile.weights.layout import Layout, everything

LAYERS, WIDTH = 8, 128


def share(model: nn.Module) -> Share:
    """A model of which each of four stages holds two layers, all in this process."""
    names = [name for name, _ in everything(model)]
    holds = [[name for name in names if int(name.split(".")[0]) // 2 == stage] for stage in range(4)]
    stages = dict.fromkeys(range(4), model)
    return Share(Layout.of(model), holds, stages, 0, 1)


def forever(directory: str, step: int, told: Connection) -> None:
    """Each checkpoint's weights are all equal to its step, which is told when it is saved."""
    torch.set_num_threads(1)
    model = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    while True:
        step += 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
        save_checkpoint(share(model), directory, step, optimizer)
        told.send(step)


def check(directory: Path) -> int:
    """The step of the newest complete checkpoint, after all of its values were read, through the index too."""
    newest = folder.newest(directory)
    model = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
    for place in (newest, directory):
        checkpoint = open_checkpoint(place)
        seen = set()
        for name, tensor in everything(model):
            checkpoint.read([name], tensor)
            seen |= set(tensor.flatten().tolist())
        assert len(seen) == 1, f"{place} mixes values of steps {seen}"
        assert seen == {folder.step_of(newest)} or place == directory
    return folder.step_of(newest)
