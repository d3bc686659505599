"""CSV files: torch's own engine loads and runs ours, we read theirs, and a malformed cell is named."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipecompile.cli import main
from pipecompile.errors import ScheduleError
from pipecompile.ir import Shape
from pipecompile.passes.communicate import chain, communicate
from pipecompile.passes.schedules import find_schedule, make_timetable, schedule_names
from pipecompile.passes.torch_csv import read_csv, write_csv
from pipecompile.passes.verify import verify
from tests.runtime.processes import run

MICROBATCHES, STAGES, RANKS = 6, 4, 2


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(STAGES)]


def on_torchs_engine(rank: int, paths: list[str]) -> list[int]:
    """Run each file's schedule on torch's engine; the stages of this rank whose gradients are the unsplit model's."""
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

    dist.init_process_group("gloo")
    torch.manual_seed(1)
    batch, target = torch.randn(12, 8), torch.randn(12, 8)
    plain = layers()
    for x, y in zip(batch.chunk(MICROBATCHES), target.chunk(MICROBATCHES)):
        nn.functional.mse_loss(nn.Sequential(*plain)(x), y).div(MICROBATCHES).backward()
    exact = []
    for path in paths:
        mine = sorted({int(cell[0]) for cell in Path(path).read_text().splitlines()[rank].split(",")})
        whole = layers()
        stages = [PipelineStage(whole[s], s, STAGES, torch.device("cpu")) for s in mine]
        engine = _PipelineScheduleRuntime(stages, MICROBATCHES, loss_fn=nn.functional.mse_loss)
        engine._load_csv(path)
        engine.step(*((batch,) if 0 in mine else ()), target=target if STAGES - 1 in mine else None, losses=[])
        for s in mine:
            for ours, true in zip(whole[s].parameters(), plain[s].parameters(), strict=True):
                torch.testing.assert_close(ours.grad, true.grad)
        exact += mine
    return exact


def test_torch_runs_what_we_write(tmp_path):
    """Loops and a V, whole and split backwards, on torch's engine in two processes: gradients of the unsplit model.

    The engine of torch 2.11 sends to itself where a rank has two stages next to each other, which gloo refuses.
    """
    names = ("interleaved-1f1b",) if version("torch").startswith("2.11.") else ("interleaved-1f1b", "zb-v")
    timetables = [make_timetable(name, Shape(STAGES, RANKS, MICROBATCHES)) for name in names]
    paths = [str(tmp_path / f"{name}.csv") for name in names]
    for timetable, path in zip(timetables, paths):
        write_csv(timetable, path)
    answers = run(on_torchs_engine, RANKS, paths)
    assert answers == [[s for one in timetables for s in one.shape.stages_of(rank)] for rank in range(RANKS)]


@pytest.mark.parametrize("name", [name for name in schedule_names() if name != "auto" and find_schedule(name).flushes])
def test_what_we_write_we_read(name, tmp_path):
    each = find_schedule(name).per_rank or 2
    timetable = make_timetable(name, Shape(3 * each, 3, 6))
    write_csv(timetable, tmp_path / "a.csv")
    again = read_csv(tmp_path / "a.csv")
    assert (again.schedule, again.shape, again.rows) == ("a", timetable.shape, timetable.rows)


def test_what_torch_writes_we_read(tmp_path):
    """Idle cells, overlapped pairs, messages and sharding, as torch's engine dumps them."""
    lines = (
        "0UNSHARD,0F0,0SEND_F0,,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1,0REDUCE_GRAD",
        "1UNSHARD,1RECV_F0,1F0,1RECV_F1,(1F1;1B0)OVERLAP_F_B,1SEND_B0,1I1,1W1,1SEND_B1",
    )
    (tmp_path / "theirs.csv").write_text("\n".join(lines) + "\n")
    timetable = read_csv(tmp_path / "theirs.csv")
    assert str(timetable) == "0F0 0F1 0B0 0B1\n1F0 1F1 1B0 1I1 1W1"
    verify(communicate(timetable, chain(2)), chain(2))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0F0,0B0\n1F0,1X0\n", r"bad\.csv, line 2, cell 2: '1X0' is not a computation; expected a stage, F, B, I or W"),
        ("0F0,(0F1;hm)OVERLAP_F_B\n", r"line 1, cell 2: '\(0F1;hm\)OVERLAP_F_B' is not a computation"),
        ("0F0,0B0\n0F1,0B1\n", r"bad\.csv, line 2: stage 0 is on line 1 too"),
        ("0F0,0B0\n2F0,2B0\n", "has stage 2 but no stage 1; number stages from 0"),
        ("", "has no computation; expected one line a rank"),
        ("0F0,0B0\n\n", r"bad\.csv, line 2 has no computation; give one line for each rank, and no other"),
    ],
)
def test_a_malformed_file(text, words, tmp_path):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ScheduleError, match=words):
        read_csv(tmp_path / "bad.csv")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ScheduleError, match="cannot be read as text"):
        read_csv(tmp_path / "none.csv")


def test_the_command_writes_and_reads(tmp_path, capsys):
    path = str(tmp_path / "zb.csv")
    assert main(["schedule", "zb-h1", "--stages", "3", "--microbatches", "4", "--torch-csv", path]) == 0
    first = capsys.readouterr().out
    assert main(["schedule", "--from-csv", path]) == 0
    assert capsys.readouterr().out == first
    (tmp_path / "short.csv").write_text("0F0,0B0\n1F0\n")
    assert main(["schedule", "--from-csv", str(tmp_path / "short.csv")]) == 1
    assert "rank 1 has 1F0 for stage 1 and microbatch 0; expected 1F0 and 1B0" in capsys.readouterr().err
