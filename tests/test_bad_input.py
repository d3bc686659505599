"""Every mistake of a user that is known: the message gives the value, what was expected, and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipecompile
from pipecompile.cli import main
from pipecompile.errors import (
    BatchError,
    BuildError,
    CaptureError,
    CostError,
    MemoryLimitError,
    PartitionError,
    PipecompileError,
    ScheduleError,
)

BATCH = torch.arange(32.0).reshape(8, 4) / 32


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def mean_square(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().mean()


def compile(model: nn.Module | None = None, **options: Any) -> pipecompile.Pipe:
    chosen = {"stages": 2, "microbatches": 2, "costs": "estimate", "loss": mean_square} | options
    return pipecompile.compile(model or net(), BATCH, **chosen)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"microbatches": 3}, BatchError, "has 8 rows in dim 0, which do not divide into 3 microbatches; use a batch of 6"),
        ({"microbatches": 0}, ScheduleError, "microbatches is 0, expected at least 1"),
        ({"ranks": 0}, ScheduleError, "ranks is 0, expected at least 1"),
        ({"stages": 9}, PartitionError, "9 stages asked for, .* at most 5 stages are possible"),
        ({"schedule": "foo"}, ScheduleError, "unknown schedule 'foo'; choose one of 1f1b, auto, .*gpipe"),
        (
            {"stages": 3, "ranks": 2, "schedule": "interleaved-1f1b"},
            ScheduleError,
            "3 stages do not divide over 2 ranks; use a multiple of 2",
        ),
        ({"loss": lambda model, batch: model(batch)}, CaptureError, r"the loss is \(4, 4\), expected .* one element; reduce"),
        ({"loss": None}, CaptureError, r"returned Tensor of shape \(4, 4\), .* write a function loss\(model, batch\)"),
        ({"memory": 200}, MemoryLimitError, r"1096 bytes for each rank would do \(1.1 KiB, for rank 1\), 896 more than its 200; less than 320 would not, for .*; give more memory, use more ranks"),
        ({"memory": "80XB"}, CostError, "'80XB' is not a number of bytes; expected .* for example 80GiB"),
        ({"opaque": ("foo.*",)}, CaptureError, "opaque='foo.*' names no module of Sequential; modules are 0, 1, 2"),
        ({"costs": "mesure"}, CostError, "no cost file .mesure.; costs are .measure., .estimate., or a JSON file"),
        ({"machine": "foo"}, CostError, "no machine 'foo'; expected one of cpu, .*h100"),
    ],
)  # fmt: skip
def test_compile(options: dict[str, Any], error: type[PipecompileError], message: str) -> None:
    with pytest.raises(error, match=message):
        compile(**options)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x[x > 0].numel() > 3:
            return x * 2
        return x


def test_a_model_that_cannot_be_traced() -> None:
    with pytest.raises(CaptureError) as caught:
        compile(nn.Sequential(nn.Linear(4, 4), Branch(), nn.Linear(4, 4)))
    message = str(caught.value)
    line = next(
        n
        for n, text in enumerate(Path(__file__).read_text().splitlines(), 1)
        if text.strip() == "if x[x > 0].numel() > 3:"
    )
    assert message.startswith(f"1 cannot be traced ({__file__}, line {line}: if x[x > 0].numel() > 3:)")
    assert "opaque=['1']" in message
    assert caught.value.__cause__ is not None
    model = nn.Sequential(nn.Linear(4, 4), Branch(), nn.Linear(4, 4))
    assert compile(model, opaque=["1"]).step(BATCH).isfinite(), "the remedy helps"


def test_a_model_that_fails_by_itself() -> None:
    with pytest.raises(
        CaptureError, match=r"the model fails by itself, before any tracing .*make loss\(model, batch\) run"
    ):
        compile(nn.Sequential(nn.Linear(5, 4)))


class Frozen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_a_loss_without_parameters() -> None:
    with pytest.raises(CaptureError, match=r"does not depend on any trainable parameter; check requires_grad"):
        compile(Frozen())


class Counting(nn.Module):
    """Adds a running count to what every layer gives: all layers read and change one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            self.count.add_(1)
            x = layer(x) + self.count
        return x


def test_a_buffer_changed_in_two_stages() -> None:
    with pytest.raises(PartitionError, match=r"buffer 'count' is changed and read by .* parts, .* a buffer of its own"):
        compile(Counting(), stages=6)
    assert compile(Counting(), stages=2).step(BATCH).isfinite(), "what stays together can be cut elsewhere"


def test_a_batch_of_another_shape() -> None:
    pipe = compile()
    expected = r"but the pipeline was compiled for float32\[8, 4\] \(2 microbatches\); give it that, or compile again"
    with pytest.raises(BatchError, match=rf"batch is float32\[8, 5\], {expected}"):
        pipe.step(torch.randn(8, 5))
    with pytest.raises(BatchError, match=rf"batch is float64\[8, 4\], {expected}"):
        pipe.step(BATCH.double())
    with pytest.raises(BatchError, match=rf"batch is str, {expected}"):
        pipe.step("nothing")


def test_a_build_changed_by_hand(tmp_path: Path) -> None:
    compile().save(tmp_path / "build")
    file = tmp_path / "build/stages/stage_0.py"
    file.write_text(file.read_text() + "\n# mine\n")
    with pytest.raises(
        BuildError, match=r"'stages/stage_0.py' was changed since it was compiled; compile again, or pass --trust"
    ):
        pipecompile.load(tmp_path / "build", net())
    assert pipecompile.load(tmp_path / "build", net(), trust=True).step(BATCH).isfinite()


@pytest.mark.parametrize(("name", "trust"), [("manifest.json", False), ("plan.json", True)])
def test_a_build_of_another_version(tmp_path: Path, name: str, trust: bool) -> None:
    compile().save(tmp_path / "build")
    file = tmp_path / "build" / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 99}))
    with pytest.raises(BuildError, match=r"has version 99, .* compile again"):
        pipecompile.load(tmp_path / "build", net(), trust=trust)


def test_a_build_of_another_model(tmp_path: Path) -> None:
    compile().save(tmp_path / "build")
    with pytest.raises(BuildError, match=r"the model Linear has no module '0', .* load the build with the model"):
        pipecompile.load(tmp_path / "build", nn.Linear(2, 2))


def test_a_folder_that_is_no_build(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"has no manifest.json, so it is not a build; make one with pipecompile"):
        pipecompile.load(tmp_path, net())
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BuildError):
        compile().save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import torch\n", "has no function model(); add one that returns the nn.Module"),
        ("def model(): ...\n", "has no function batch(); add one that returns a whole batch, a dict or a tuple"),
        ("1 / 0\n", "fails when it is run: ZeroDivisionError: division by zero"),
    ],
)
def test_a_model_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, message: str) -> None:
    path = tmp_path / "file.py"
    path.write_text(source)
    assert main([str(path), "--stages", "2", "--out", str(tmp_path / "build")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "build").exists()


def test_a_model_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.py"), "--stages", "2"]) == 1
    assert "none.py' cannot be read: No such file or directory; give the path of one" in capsys.readouterr().err


def test_verify_wants_a_model_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compile().save(tmp_path / "build")
    assert main(["verify", str(tmp_path / "build")]) == 1
    assert "was made in Python, not of a model file; use pipecompile.load" in capsys.readouterr().err
