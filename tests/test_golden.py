"""Golden texts of whole compilations: where a model is cut, what each rank runs, what each stage's source says.

Every node costs what its traced operations write, so that nothing measured decides. ``pytest --update-golden`` rewrites.
"""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipecompile.compiled import Compiled, Options
from pipecompile.compiler import compile_model
from pipecompile.cost import NodeCost
from pipecompile.ir import Graph
from pipecompile.runtime import split
from tests.compiled import compiled as compiled_of
from tests.conftest import GOLDEN
from tests.models import MODELS, Case

MICROBATCHES = 4


class Ladder(nn.Module):
    """Each rung reads the rung below and the one below that: every cut has a value that goes past a stage."""

    def __init__(self) -> None:
        super().__init__()
        self.rungs = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        below = before = x
        for rung in self.rungs:
            below, before = torch.relu(rung(below) + before), below
        return below


def ladder() -> Case:
    torch.manual_seed(0)
    return Ladder(), {"x": torch.randn(8, 8), "y": torch.randn(8, 8)}, ladder_loss


def ladder_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch["x"]), batch["y"])


class Tied(nn.Module):
    """An encoder and decoder with one weight, a counter that every step changes, and a mask that both halves read."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(8, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        mask = x > 0
        hidden = self.norm(self.encode(x * mask))
        self.steps.add_(1)
        return (hidden @ self.encode.weight) * mask


def tied() -> Case:
    torch.manual_seed(0)
    return Tied(), (torch.randn(8, 8),), tied_loss


def tied_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[0])


CASES: dict[str, tuple[Callable[[], Case], Options]] = {
    "gpt2": (MODELS["gpt2"], Options(4, 4, MICROBATCHES)),
    "llama": (MODELS["llama"], Options(2, 2, MICROBATCHES, "gpipe")),
    "t5": (MODELS["t5"], Options(4, 2, MICROBATCHES, "interleaved-1f1b")),
    "unet2d": (MODELS["unet2d"], Options(3, 3, MICROBATCHES)),
    "ladder": (ladder, Options(3, 3, MICROBATCHES)),
    "tied": (tied, Options(2, 2, MICROBATCHES)),
}


def price(graph: Graph) -> Mapping[str, NodeCost]:
    """A nanosecond for each element that is written; the backward takes twice as long."""

    def elements(node: Any) -> int:
        return sum(math.prod(value.spec.shape) for part in node.inside or (node,) for value in part.outputs)

    return {
        node.name: NodeCost(elements(node) / 1e6, elements(node) / 5e5, 4 * elements(node))
        for node in graph.nodes
        if node.name not in graph.replicated
    }


@functools.cache
def compiled(name: str) -> Compiled:
    make, options = CASES[name]
    if name in MODELS:
        return compiled_of(name, options, price)
    model, batch, loss = make()
    return compile_model(model, split(batch, MICROBATCHES)[0], loss, price, options)


@pytest.mark.parametrize("name", CASES)
def test_texts(name: str, golden: Callable[[str, str], None]) -> None:
    result = compiled(name)
    golden(f"{name}/partition.txt", str(result.split.partition))
    golden(f"{name}/program.txt", str(result.program))
    for index, source in enumerate(result.sources):
        golden(f"{name}/stage_{index}.py", source)


def test_compiling_again_gives_the_same_texts() -> None:
    first = compiled("ladder")
    compiled.cache_clear()
    again = compiled("ladder")
    assert again.sources == first.sources
    assert str(again.program) == str(first.program)
    assert str(again.split.partition) == str(first.split.partition)


def test_stages_are_formatted() -> None:
    """As `ruff format` would, with every import used and every name known."""
    files = sorted(map(str, GOLDEN.glob("*/stage_*.py")))
    assert len(files) == sum(options.stages for _, options in CASES.values())
    for command in (["format", "--diff"], ["check", "--select", "E9,F4,F63,F82"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length", "120", *files]
        done = subprocess.run(ruff, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
        assert done.returncode == 0, done.stdout + done.stderr
