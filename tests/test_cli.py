"""The command line: compile, verify, run and the commands without a model; ``--json`` prints one object and no more."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipecompile.cli import main
from tests.runtime.processes import run as run_ranks

MODEL = """
import torch
import torch.nn.functional as F
from torch import nn

def model():
    print("a model may print")
    layers = [layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.Dropout(0.1), nn.Tanh())]
    return nn.Sequential(*layers, nn.BatchNorm1d(6))

def batch():
    g = torch.Generator().manual_seed(0)
    return {"x": torch.randn(8, 6, generator=g), "y": torch.randn(8, 6, generator=g)}

def loss(model, batch):
    return F.mse_loss(model(batch["x"]), batch["y"])

def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.3)
"""


@pytest.fixture
def build(tmp_path: Path) -> Path:
    return compiled(tmp_path, stages=4)


def compiled(folder: Path, stages: int) -> Path:
    (folder / "model.py").write_text(MODEL)
    words = [str(folder / "model.py"), "--stages", str(stages), "--microbatches", "4", "--costs", "estimate"]
    assert main([*words, "--out", str(folder / "build")]) == 0
    return folder / "build"


def one_object(text: str) -> dict:
    assert text.count("\n") == 1, text
    return json.loads(text)


def command(*words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | extra
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=120, env=environment, check=False
    )


def test_compile_prints_the_plan_and_writes_the_build(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(build.parent / "model.py"), "--stages", "4", "--microbatches", "4", "--costs", "estimate"]
    assert main([*words, "--out", str(build)]) == 0
    out = capsys.readouterr().out
    assert "Sequential: 4 stages on 4 ranks, 4 microbatches, 1f1b" in out
    assert "forecast:" in out
    files = {str(path.relative_to(build)) for path in build.rglob("*") if path.is_file()}
    stages = {f"stages/stage_{index}.py" for index in range(4)}
    assert files == {"plan.json", "program.json", "program.txt", "manifest.json"} | stages
    program = json.loads((build / "program.json").read_text())
    assert {"version", "schedule", "stages", "ranks", "microbatches", "placement", "programs"} <= set(program)
    assert program["programs"][0][0] == {"op": "FORWARD", "stage": 0, "microbatch": 0}
    assert (build / "program.txt").read_text().startswith("0F0 0SEND_F0>1")


def test_explain_says_why(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(build.parent / "model.py"), "--stages", "4", "--microbatches", "4", "--costs", "estimate"]
    capsys.readouterr()
    assert main([*words, "--out", str(build), "--explain"]) == 0
    out = capsys.readouterr().out
    assert sum(line.startswith("cut ") for line in out.splitlines()) == 3
    assert "float32[2, 6]" in out
    assert "slowest: stage" in out
    assert "the proved bound" in out or "above the bound" in out


def test_compile_json(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    words = [str(build.parent / "model.py"), "--stages", "2", "--costs", "estimate", "--json"]
    assert main([*words, "--out", str(build)]) == 0
    whole = one_object(capsys.readouterr().out)
    assert len(whole["plan"]["stages"]) == 2
    assert whole["plan"]["microbatches"] == 4, "twice the ranks, if that divides the batch"


def test_verify(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["verify", str(build)]) == 0
    out = capsys.readouterr().out
    assert out.count("bit-equal") == 3
    assert "equal to the unsplit model (1f1b, 4 stages, 4 microbatches)" in out
    assert main(["verify", str(build), "--json"]) == 0
    whole = one_object(capsys.readouterr().out)
    assert whole["ok"] is True
    assert len(whole["steps"]) == 3


def test_verify_finds_a_wrong_stage(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = build / "stages/stage_1.py"
    lines = stage.read_text().splitlines()
    last = max(index for index, line in enumerate(lines) if line.strip().startswith("return ("))
    name = lines[last].strip().removeprefix("return (").removesuffix(",)")
    lines.insert(last, f"        {name} = {name} * 1.01")
    stage.write_text("\n".join(lines) + "\n")
    capsys.readouterr()
    assert main(["verify", str(build)]) == 1
    assert "'stages/stage_1.py' was changed" in capsys.readouterr().err
    assert main(["verify", str(build), "--trust", "--json"]) == 1
    whole = one_object(capsys.readouterr().out)
    assert whole["ok"] is False
    assert whole["worst"]


def test_run_in_one_process(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["run", str(build), "--local", "--steps", "15", "--json"]) == 0
    losses = one_object(capsys.readouterr().out)["losses"]
    assert len(losses) == 15
    assert losses[-1] < losses[0]


def test_run_starts_ranks_that_give_the_losses_of_one_process(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build = compiled(tmp_path, stages=2)
    capfd.readouterr()
    assert main(["run", str(build), "--local", "--steps", "3", "--json"]) == 0
    expected = one_object(capfd.readouterr().out)["losses"]
    assert main(["run", str(build), "--steps", "3", "--json"]) == 0
    found = one_object(capfd.readouterr().out)
    assert found["losses"] == pytest.approx(expected, rel=1e-6)
    assert found["ranks"] == 2


def refused(rank: int, build: str) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        return main(["run", build]), said.getvalue()


def test_the_wrong_number_of_processes_is_refused(build: Path) -> None:
    codes, said = zip(*run_ranks(refused, 2, str(build), agent=True))
    assert codes == (1, 1)
    once = "the program has 4 ranks, but 2 processes run; start it with torchrun --nproc-per-node 4, or a multiple"
    assert "".join(said).count(once) == 1, "one says it for both"


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("", "run", "verify", "schedule", "partition"):
        with pytest.raises(SystemExit) as ended:
            main([*([name] if name else []), "--help"])
        assert ended.value.code == 0
        assert "--json" in capsys.readouterr().out
    assert "pipecompile" in command("-m", "pipecompile", "--help").stdout


def test_schedule_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["schedule", "1f1b", "--stages", "2", "--ranks", "2", "--microbatches", "2"]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("0F0 0SEND_F0>1")
    assert main([*words, "--json"]) == 0
    assert one_object(capsys.readouterr().out)["schedule"] == "1f1b"


def test_output_that_nobody_reads_is_no_traceback() -> None:
    words = [sys.executable, "-m", "pipecompile", "schedule", "gpipe", "--stages", "8", "--microbatches", "400"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("foo --stages 4", "unknown schedule 'foo'; choose one of 1f1b, auto, "),
        ("1f1b", "--stages is missing; say how many stages the model has, for example --stages 4"),
        ("1f1b --stages 0", "stages is 0, expected at least 1"),
        ("1f1b --stages 2 --ranks 0", "ranks is 0, expected at least 1"),
        (
            "1f1b --stages 8 --ranks 3",
            "8 stages do not divide over 3 ranks; use a multiple of 3, for example --stages 9",
        ),
        ("gpipe --stages 4 --ranks 2", "use --stages 2 --ranks 2, or use --schedule looped-bfs"),
        ("dualpipe-v --stages 8 --microbatches 2", "not 2 for 8 stages; use --microbatches 8"),
        (
            "1f1b --stages 4 --activations 3",
            "1f1b holds 4 activations on rank 0, more than --activations 3; use --activations 4, or --schedule auto",
        ),
        (
            "auto --stages 8 --ranks 4 --activations 1",
            "--activations 1 leaves no room for one microbatch on a rank of 2 stages; use --activations 2",
        ),
    ],
)
def test_a_schedule_that_cannot_be(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", *words.split()]) == 1
    assert message in capsys.readouterr().err
