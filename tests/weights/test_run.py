"""``pipecompile run``: saved, resumed with other stages, and never with the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipecompile.cli import main
from pipecompile.opened import open_share
from tests.runtime.processes import run as run_ranks

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(32, 24)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Dropout(0.1)) for _ in range(6))
        self.head = nn.Linear(24, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), ids.flatten())

def model(): return Net()
COUNT = iter(range(1000))
def batch(): return {"ids": (torch.arange(64).reshape(8, 8) + next(COUNT)) % 32}
def optimizer(parameters): return torch.optim.AdamW(parameters, lr=0.01)
"""


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("builds")
    (place / "net.py").write_text(MODEL)
    for stages in (2, 4):
        command = [
            str(place / "net.py"),
            "--stages",
            str(stages),
            "--microbatches",
            "4",
            "--costs",
            "estimate",
            "--json",
        ]
        assert main([*command, "--out", str(place / f"b{stages}")]) == 0
    return place


def train(capsys: pytest.CaptureFixture[str], build: Path, *options: object) -> list[float]:
    capsys.readouterr()
    assert main(["run", str(build), "--local", "--json", *map(str, options)]) == 0
    losses: list[float] = json.loads(capsys.readouterr().out)["losses"]
    return losses


@pytest.mark.parametrize(("first", "second"), [("b4", "b2"), ("b2", "b4")])
def test_a_run_goes_on_with_other_stages(
    builds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], first: str, second: str
) -> None:
    whole = train(capsys, builds / first, "--steps", 6)
    assert train(capsys, builds / first, "--steps", 3, "--save", tmp_path, "--save-every", 2) == whole[:3]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]
    assert train(capsys, builds / first, "--steps", 3, "--resume", tmp_path) == whole[3:]
    after = train(capsys, builds / second, "--steps", 3, "--resume", tmp_path, "--save", tmp_path)
    assert after == pytest.approx(whole[3:], rel=1e-6), "other stages may sum a gradient in another order"
    assert (tmp_path / "step-00000006").exists()
    assert train(capsys, builds / second, "--steps", 1, "--load", tmp_path) != whole[:1]


def ranks(rank: int, build: str, directory: str) -> list[str]:
    """Train, save and go on in processes; the tensors of this rank that have memory."""
    from pipecompile.runtime import connect

    connect(timeout_s=30)
    pipe, file = open_share(build)
    optimizer = file.optimizer(pipe.parameters())
    for _ in range(3):
        torch.manual_seed(pipe.steps)
        pipe.step(file.batch())
        optimizer.step()
        optimizer.zero_grad()
    pipe.save_checkpoint(directory, optimizer)
    return sorted(name for stage in pipe.stages.values() for name, p in stage.named_parameters() if not p.is_meta)


def test_processes_save_what_one_process_resumes(
    builds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(capsys, builds / "b2", "--steps", 5)
    answers: list[Any] = run_ranks(ranks, 2, str(builds / "b2"), str(tmp_path))
    assert all(isinstance(answer, list) for answer in answers), answers
    assert set(answers[0]) & set(answers[1]) <= {"embedding.weight", "head.weight"}
    after = train(capsys, builds / "b4", "--steps", 2, "--resume", tmp_path)
    assert after == pytest.approx(whole[3:], rel=1e-6)


def test_a_run_with_masters_goes_on_with_other_stages(
    builds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = MODEL.replace("return Net()", "return Net().bfloat16()").replace(
        "self.embedding.weight\n", "nn.Parameter(self.head.weight.data)\n"
    )
    assert narrow.count("bfloat16") == narrow.count("nn.Parameter(") == 1
    (tmp_path / "net.py").write_text(narrow)
    options = ("--microbatches", "4", "--costs", "estimate", "--gradient-dtype", "float32", "--json")
    for stages in ("2", "4"):
        assert main([str(tmp_path / "net.py"), "--stages", stages, *options, "--out", str(tmp_path / stages)]) == 0
    assert main(["verify", str(tmp_path / "4"), "--json"]) == 0
    whole = train(capsys, tmp_path / "4", "--steps", 6)
    assert whole[0] != whole[1]
    assert train(capsys, tmp_path / "4", "--steps", 3, "--save", tmp_path / "ck") == whole[:3]
    assert train(capsys, tmp_path / "2", "--steps", 3, "--resume", tmp_path / "ck") == whole[3:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps 0 --save-every 0 is no run; expected at least 1 step"),
        (["--save-every", "2"], "directory for the checkpoints with --save DIR"),
        (
            ["--resume", "nothing"],
            "'nothing' has no complete checkpoint; give the directory that pipecompile run --save",
        ),
        (["--load", "nothing.safetensors"], "cannot be read: No such file"),
    ],
)
def test_what_cannot_be_run(builds: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert main(["run", str(builds / "b2"), "--local", *options]) == 1
    assert message in capsys.readouterr().err
