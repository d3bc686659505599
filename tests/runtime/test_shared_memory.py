"""Messages through shared memory arrive as they were, and a lost or late partner is named."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from pipecompile.errors import RuntimeFault
from pipecompile.ir import Spec
from pipecompile.ir.lifetimes import arrivals, most_on_the_way
from pipecompile.runtime.links import Specs
from pipecompile.runtime.shared_memory import SharedReceiver, SharedSender, host, meet
from tests.runtime.handmade import program_of

LAST = (Spec((2, 3, 4, 5), "float32", True, order=(0, 2, 3, 1)), Spec((), "int64"))
MESSAGES: list[Specs] = [
    (Spec((3, 5), "float32", True), Spec((7,), "bool"), Spec((), "none"), Spec((2, 0), "float32")),
    (Spec((), "bfloat16"),),
    LAST,
    LAST,
]


def values(step: int) -> list[list[Tensor | None]]:
    """Messages of a step."""
    torch.manual_seed(step)
    lying = torch.randn(2, 4, 5, 3).permute(0, 3, 1, 2)
    return [
        [torch.randn(5, 3).t(), torch.randn(7) > 0, None, torch.empty(2, 0)],
        [torch.tensor(0.5 + step, dtype=torch.bfloat16)],
        [lying, torch.tensor(7 * step)],
        [torch.randn(2, 3, 4, 5), torch.tensor(-1)],
    ]


def pair(slots: int = 2, timeout_s: float = 20.0, spin: bool = False) -> tuple[SharedSender, SharedReceiver]:
    """Both ends of the channel 0>1 F, made at the same time."""
    store, timeout = HashStore(), timedelta(seconds=timeout_s)
    channel = (0, 1, "F")
    ends: dict[int, Any] = {}

    def make(rank: int) -> None:
        found = meet([channel] if rank == 0 else [], [channel] if rank else [], store, "test", rank, timeout)
        end = SharedReceiver if rank else SharedSender
        ends[rank] = end(found[channel], 1 - rank, MESSAGES, slots, timeout, spin)

    both = [threading.Thread(target=make, args=(rank,)) for rank in (0, 1)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(20)
    return ends[0], ends[1]


@pytest.mark.parametrize("spin", [False, True])
def test_messages_arrive_as_they_were(spin: bool) -> None:
    sender, receiver = pair(spin=spin)
    for step in range(3):
        sender.begin()
        receiver.begin()
        for sent, specs in zip(values(step), MESSAGES):
            sender.send(sent)
            received = receiver.receive()
            for mine, spec, got in zip(sent, specs, received, strict=True):
                if mine is None:
                    assert got is None
                    continue
                assert got is not None
                assert torch.equal(got, mine)
                assert got.dtype == mine.dtype
                lying = got.permute(spec.order) if spec.order else got
                assert lying.is_contiguous(), "it lies as it was compiled"
        receiver.end()


def test_what_was_received_belongs_to_the_receiver() -> None:
    """A slot is written again: the tensor that came out of it before stays."""
    sender, receiver = pair(slots=1)
    sender.begin()
    receiver.begin()
    kept = []
    for sent in values(1):
        sender.send(sent)
        kept.append(receiver.receive())
    assert torch.equal(kept[2][0], values(1)[2][0])
    assert torch.equal(kept[0][0], values(1)[0][0])


def test_a_step_waits_until_the_one_before_has_been_taken() -> None:
    sender, receiver = pair(slots=4)
    sender.begin()
    receiver.begin()
    for sent in values(1):
        sender.send(sent)
    begun = threading.Event()
    waiter = threading.Thread(target=lambda: (sender.begin(), begun.set()), daemon=True)
    waiter.start()
    for _ in MESSAGES:
        receiver.receive()
    assert not begun.wait(0.05), "the slots could still be read"
    receiver.end()
    assert begun.wait(10)


@pytest.mark.parametrize(
    ("act", "rank"), [(lambda s, r: r.receive(), 0), (lambda s, r: s.send(values(1)[0]), 1)], ids=["receive", "send"]
)
def test_a_broken_connection_names_its_rank(act: Callable[[SharedSender, SharedReceiver], Any], rank: int) -> None:
    sender, receiver = pair()
    sender.begin()
    receiver.begin()
    (receiver if rank else sender).close()
    with pytest.raises(RuntimeFault, match=f"the connection to rank {rank} broke: a process has ended or failed"):
        act(sender, receiver)


def test_a_late_message_names_its_rank() -> None:
    _, receiver = pair(timeout_s=0.2)
    receiver.begin()
    with pytest.raises(RuntimeFault, match=r"waited 0\.2 s for rank 0: stuck, gone or slow; allow more time"):
        receiver.receive()


def test_a_receiver_that_does_not_take_is_late() -> None:
    """The socket is full: even then a send ends within the timeout."""
    sender, receiver = pair(timeout_s=0.2)
    sender.begin()

    def fill() -> None:
        for _ in range(100_000):
            sender._tell()

    with pytest.raises(RuntimeFault, match=r"waited 0\.2 s for rank 1"):
        fill()
    receiver.close()


def test_nothing_is_left_in_the_file_system() -> None:
    before = set(os.listdir("/dev/shm"))
    ends = pair()
    assert set(os.listdir("/dev/shm")) == before
    del ends


def test_processes_of_one_host_know_each_other() -> None:
    assert host() == host() != ""


def test_without_shared_memory_there_is_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert host() == ""


@pytest.mark.parametrize(("schedule", "most"), [("gpipe", 6), ("1f1b", 4)])
def test_slots_are_as_many_as_messages_on_the_way(schedule: str, most: int) -> None:
    """1F1B hears of the oldest before it sends another; GPipe hears nothing until all forwards are over."""
    program = program_of(schedule, 4, 6)
    found = most_on_the_way(program, arrivals(program))
    assert found[0, 1, "F"] == most


def test_a_sender_may_end_before_its_last_step_is_taken() -> None:
    sender, receiver = pair(slots=4)
    sender.begin()
    receiver.begin()
    for sent in values(1):
        sender.send(sent)
    sender.close()
    for _ in MESSAGES:
        receiver.receive()
    receiver.end()
    receiver.begin()
    with pytest.raises(RuntimeFault, match="the connection to rank 0 broke"):
        receiver.receive()
