"""Under torchrun as it is: replicas, two agents that meet, and a restart after a rank was killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipecompile.cli import main
from pipecompile.opened import open_build
from tests.runtime.processes import free_port

MODEL = """
import itertools, os, signal, time
import torch
from pipecompile import saving
from torch import nn

class Mine(nn.Module):
    calls = 0

    def forward(self, hidden):
        Mine.calls += 1
        if Mine.calls == int(os.environ.get("INTERRUPTED_AT", 0)):
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(100)
        return hidden * 1.5

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(32, 24)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Dropout(0.1)) for _ in range(6))
        self.mine = Mine()
        self.head = nn.Linear(24, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return nn.functional.cross_entropy(self.head(self.mine(hidden)).flatten(0, 1), ids.flatten())

def killed_in_the_third_save(*words, whole=saving.write_tensors, count=itertools.count(1)):
    if next(count) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    whole(*words)

if os.environ.get("KILLED") == os.environ.get("RANK") and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    saving.write_tensors = killed_in_the_third_save

def model(): return Net()
COUNT = iter(range(1000))
def batch(): return {"ids": (torch.arange(64).reshape(8, 8) + next(COUNT)) % 32}
def optimizer(parameters): return torch.optim.AdamW(parameters, lr=0.01)
"""
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("builds")
    (place / "net.py").write_text(MODEL)
    options = ["--stages", "2", "--microbatches", "4", "--costs", "estimate", "--out", str(place / "build")]
    assert main([str(place / "net.py"), *options]) == 0
    return place / "build"


def start(*command: object, **environment: str) -> subprocess.Popen[str]:
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    words = [sys.executable, "-m", *map(str, command)]
    return subprocess.Popen(words, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]
    return out, errors


def test_two_replicas_by_the_command_line(build: Path, tmp_path: Path) -> None:
    """Each step takes the next two batches; what is saved is what one process trains."""
    command = (
        "pipecompile",
        "run",
        build,
        "--replicas",
        2,
        "--steps",
        3,
        "--json",
        "--save",
        tmp_path,
        "--trace",
        tmp_path / "trace.json",
    )
    found: dict[str, Any] = json.loads(ended(start(*command))[0])
    assert (found["ranks"], found["replicas"]) == (2, 2)
    pipe, model, file = open_build(build, local=True)
    optimizer = file.optimizer(model.parameters())
    for step, loss in enumerate(found["losses"]):
        optimizer.zero_grad()
        expected = pipe.reference(model, file.batch(), step, others=[file.batch()])
        assert loss == pytest.approx(float(expected), rel=1e-5)
        optimizer.step()
    files = sorted(path.name for path in (tmp_path / "step-00000003").glob("optimizer-*.safetensors"))
    assert files == ["optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"]
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    pipe.load_weights(tmp_path)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), trained[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def whole(build: Path) -> list[float]:
    """The losses of ten steps, of two torchruns with a rank each."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "nodes"]
    agent = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--local-addr", "localhost", *meeting]
    agents = [start(*agent, "-m", "pipecompile", "run", build, "--steps", "10", "--json") for _ in range(2)]
    (out,) = [out for out in [ended(each)[0] for each in agents] if out]
    losses: list[float] = json.loads(out)["losses"]
    return losses


def test_two_agents_that_meet(build: Path, whole: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(build), "--local", "--json", "--steps", "10"]) == 0
    assert whole == pytest.approx(json.loads(capsys.readouterr().out)["losses"], rel=1e-5)


def test_a_restart_goes_on_as_if_nothing_had_happened(build: Path, whole: list[float], tmp_path: Path) -> None:
    """Rank 1, killed in the save after step 9, is started again: the run goes on from the checkpoint of step 6."""
    agent = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    training = ["-m", "pipecompile", "run", build, "--steps", "10", "--json", "--save", tmp_path, "--save-every", "3"]
    out, errors = ended(start(*agent, *training, KILLED="1"))
    found = json.loads(out)
    assert (found["first_step"], found["restarted_at"]) == (0, 6)
    assert found["losses"] == whole, "to the last bit"
    said = [line for line in errors.splitlines() if line.startswith("pipecompile: ")]
    assert len(said) == 1, errors
    assert said[0].startswith("pipecompile: rank 1, outside of a step: its process has ended: killed,")


def test_an_interrupted_run_says_so_and_no_more(build: Path) -> None:
    """The signal of Ctrl-C comes to the process that the user has started, while both ranks wait or compute."""
    run = start("pipecompile", "run", build, "--steps", "1000", INTERRUPTED_AT="9")
    _, errors = run.communicate(timeout=100)
    assert run.returncode == 130
    assert errors == "pipecompile: interrupted\n"
