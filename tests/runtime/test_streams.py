"""What the streams of a device do with a program's messages: every two uses of one memory are ordered, whoever makes them."""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from pipecompile.errors import RuntimeFault
from pipecompile.ir import COMPUTE, Program
from pipecompile.ir.lifetimes import interleave
from pipecompile.runtime import channels, split
from pipecompile.runtime.channels import Channels, Meeting
from pipecompile.runtime.ends import Ends
from pipecompile.runtime.executor import Executor
from pipecompile.runtime.links import empty
from pipecompile.runtime.messages import by_index
from pipecompile.runtime.replicas import World
from pipecompile.runtime.stream_channels import StreamChannels, posts
from pipecompile.runtime.stream_links import QUEUES, backend_here, check_queues, over_nccl
from pipecompile.runtime.wiring import wire
from tests.runtime.handmade import PLANS, Net, accumulate, batch_of, program_of, stages_of
from tests.runtime.recorder import Recorder

MICROBATCHES = 4
CPU = torch.device("cpu")


def channels_of(program: Program, rank: int, kind: str, recorder: Recorder) -> Channels:
    """A rank's channels on the recorded device, in the process of all ranks."""
    store = HashStore()
    for other in range(program.shape.ranks):
        store.set(f"here/host/{other}", "")

    def allocate(spec: Any) -> Any:
        with recorder.host_memory():
            return empty(spec, CPU)

    meeting = Meeting(store, "here", timedelta(seconds=20), World(rank, program.shape.ranks, 1), share=False)
    ends = Ends(kind, CPU, recorder.devices[rank], allocate)
    make = StreamChannels if kind == "stream" else Channels
    return make(program, rank, by_index(PLANS, program), CPU, meeting, (), ends)


def drive(
    schedule: str,
    ranks: int,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    ignored: tuple[str, ...] = (),
    one_stream: bool = False,
) -> tuple[Recorder, list[Net]]:
    """Two steps of all ranks on recorded devices: what was seen, and each rank's model with its gradients."""
    program = program_of(schedule, ranks, MICROBATCHES)
    recorder = Recorder(ranks, kind == "stream", ignored, one_stream)
    monkeypatch.setattr(channels.dist, "new_group", recorder.new_group)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: recorder.record_stream(t, s))
    models = [copy.deepcopy(Net()) for _ in range(ranks)]
    mail, executors = [], []
    for rank, model in enumerate(models):
        recorder.rank = rank
        mail.append(channels_of(program, rank, kind, recorder))
        row = wire(program, rank, stages_of(model), by_index(PLANS, program), "loss")
        executors.append(Executor(row, mail[-1], {"REDUCE_GRAD": lambda op: None}, 1, True))
    recorder.running = True
    with recorder:
        for seed in (1, 2):
            step(program, recorder, mail, executors, seed)
    recorder.running = False
    return recorder, models


def step(program: Program, recorder: Recorder, mail: list[Channels], executors: list[Executor], seed: int) -> None:
    for recorder.rank, (channel, executor) in enumerate(zip(mail, executors)):
        executor.begin(split(batch_of(MICROBATCHES, seed), MICROBATCHES))
        channel.begin()
    for recorder.rank, position in interleave(program):
        one = executors[recorder.rank].steps[position]
        one.handler(one.operand)
    for recorder.rank, (channel, executor) in enumerate(zip(mail, executors)):
        channel.end()
        executor.end()


@pytest.mark.parametrize("kind", ["stream", "staged"])
@pytest.mark.parametrize(
    ("schedule", "ranks"),
    [("gpipe", 4), ("1f1b", 4), ("interleaved-1f1b", 2), ("zb-v", 2)],
)
def test_every_two_uses_of_memory_are_ordered(
    schedule: str, ranks: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, models = drive(schedule, ranks, kind, monkeypatch)
    assert recorder.races == []
    assert recorder.pairs
    assert not recorder.deadlock()
    reference = Net()
    for seed in (1, 2):
        accumulate(reference, batch_of(MICROBATCHES, seed), MICROBATCHES)
    parts = [dict(model.named_parameters()) for model in models]
    for name, expected in reference.named_parameters():
        found = [part[name].grad for part in parts if part[name].grad is not None]
        torch.testing.assert_close(sum(found), expected.grad, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("kind", "ignored"),
    [
        ("stream", "wait for recv"),
        ("stream", "wait for send"),
        ("staged", "wait_event"),
        ("staged", "synchronize"),
        ("staged", "record_stream"),
        ("staged", "wait for recv"),
        ("staged", "wait for send"),
    ],
)
def test_each_wait_that_is_left_out_is_a_race(kind: str, ignored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, _ = drive("1f1b", 4, kind, monkeypatch, (ignored,))
    assert recorder.races


def test_one_communicator_for_all_channels_would_be_a_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, _ = drive("1f1b", 4, "stream", monkeypatch, one_stream=True)
    assert recorder.deadlock()


def test_a_receive_is_posted_before_the_computation_that_precedes_it() -> None:
    program = program_of("1f1b", 4, 2)
    row = [one for one in program.rows[2] if one.op != "REDUCE_GRAD"]
    shown, planned = [], iter(posts(row, program.shape.placement))
    for one in (None, *row):
        if one is not None:
            shown.append(str(one))
        if one is None or one.op not in COMPUTE:
            shown += [f"post {source}>{target}{kind}" for source, target, kind in next(planned)]
    assert " ".join(shown) == (
        "post 0>2F post 0>2F post 1>2F 2RECV_F0<0 2RECV_F1<0 2RECV_F0<1 post 1>2F 2F0 2RECV_F1<1 2SEND_F0>3 post 3>2B "
        "2F1 2SEND_F1>3 2RECV_B0<3 post 3>2B 2B0 2SEND_B0>0 2SEND_B0>1 2RECV_B1<3 2B1 2SEND_B1>0 2SEND_B1>1"
    )


def test_streams_that_share_a_queue_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(QUEUES, raising=False)
    check_queues(7)
    with pytest.raises(
        RuntimeFault, match="over 8 channels and groups, but CUDA_DEVICE_MAX_CONNECTIONS gives the device 8"
    ):
        check_queues(8)
    monkeypatch.setenv(QUEUES, "32")
    check_queues(31)
    with pytest.raises(
        RuntimeFault, match="32 channels and groups, but a device has 32 hardware queues; compile with fewer"
    ):
        check_queues(32)


@pytest.mark.parametrize(
    ("devices", "processes", "expected"), [(0, 2, "gloo"), (1, 2, "gloo"), (2, 2, "cpu:gloo,cuda:nccl")]
)
def test_nccl_where_each_process_has_a_device(
    devices: int, processes: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert backend_here() == expected
    assert chosen == ([1] if "nccl" in expected else [])


@pytest.mark.parametrize(
    ("config", "kind"), [("cuda:nccl", "stream"), ("cpu:gloo,cuda:nccl", "stream"), ("cpu:gloo,cuda:gloo", "staged")]
)
def test_ends_fit_device_and_group(config: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: config)
    assert Ends.of(torch.device("cuda", 0)).kind == kind
    assert over_nccl(torch.device("cuda", 0)) == (kind == "stream")
    assert Ends.of(CPU).kind == "host"
