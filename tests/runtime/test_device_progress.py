"""Where a device is, is seen from outside, and where it gets no further, all ranks end with its place."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from pipecompile.errors import RuntimeFault
from pipecompile.ir import Instruction
from pipecompile.runtime import connect
from pipecompile.runtime.device import device_among
from pipecompile.runtime.device_progress import DeviceWatch, Progress, waiting_places
from pipecompile.runtime.ends import Ends
from pipecompile.runtime.executor import Step
from pipecompile.runtime.links import empty
from pipecompile.runtime.marks import OUTSIDE, PLACE, ROUND
from tests.runtime.handmade import Net, accumulate, batch_of
from tests.runtime.processes import run
from tests.runtime.test_rank import MICROBATCHES, runtime_of


class Event:
    """Has passed if the device that records it still works."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.at = self.device.recorded = self.device.recorded + 1

    def query(self) -> bool:
        return self.at <= self.device.works_until

    def synchronize(self) -> None:
        while not self.query():
            time.sleep(0.01)

    def elapsed_time(self, later: Event) -> float:
        return float(later.at - self.at)


class Device:
    """A device that does at once what it is given, until it hangs; stands for torch.cuda."""

    def __init__(self, works_until: int = 10**9) -> None:
        self.works_until, self.recorded = works_until, 0

    def Event(self, enable_timing: bool = False) -> Event:
        return Event(self)

    def Stream(self) -> Device:
        return self

    def current_stream(self) -> Device:
        return self

    def stream(self, stream: Device) -> Device:
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> None: ...

    def wait_stream(self, stream: Device) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def record_event(self) -> Event:
        event = Event(self)
        event.record()
        return event


def steps_of(row: list[Instruction]) -> list[Step]:
    return [Step(lambda operand: None, None, 0, position, one) for position, one in enumerate(row)]


ROW = [Instruction("RECV_F", 1, 0, 0, ("x",)), Instruction("FORWARD", 1, 0), Instruction("RECV_B", 1, 0, 2, ("x",))]


def test_the_place_is_the_first_instruction_that_is_not_over() -> None:
    device = Device(works_until=0)
    progress = Progress(device)
    progress.begin()
    assert progress.look() == (-1, True)
    for _ in ROW:
        progress.reach()
    for device.works_until, place in ((1, 0), (2, 1), (3, 2)):
        assert progress.look() == (place, True)
    device.works_until = 4
    assert progress.look() == (3, False)
    assert progress.times(steps_of(ROW), 1.0) == [
        (one, 1.0 - (3 - i) / 1e3, 1.0 - (2 - i) / 1e3) for i, one in enumerate(ROW)
    ]


@pytest.mark.parametrize(("works_until", "late"), [(1, True), (2, False), (3, True)])
def test_only_a_wait_can_be_late(works_until: int, late: bool) -> None:
    words, faults, told = [0, OUTSIDE], [], threading.Event()

    class Owner:
        def fault(self, late: bool) -> None:
            faults.append(late)
            told.set()

    owner = Owner()
    watch = DeviceWatch(Device(works_until), words, waiting_places(ROW), 0.2, lambda: False, owner.fault)
    watch.start()
    words[ROUND] = 1
    watch.begin()
    watch.launch(steps_of(ROW))
    assert told.wait(0.6) == late
    assert faults == [True] * late
    assert words[PLACE] == works_until - 1
    watch.stop.set()
    watch.leave()
    assert words[PLACE] == OUTSIDE


def staged(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    """Runtimes of this process take their tensors for a device's."""
    cpu = torch.device("cpu")
    ends = Ends("staged", cpu, device, lambda spec: empty(spec, cpu))
    monkeypatch.setattr(Ends, "of", staticmethod(lambda _: ends))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)


def train(rank: int) -> tuple[list[float], dict[str, Tensor], int]:
    connect(timeout_s=30)
    staged(pytest.MonkeyPatch(), Device())
    model, runtime = runtime_of(rank, "interleaved-1f1b", 2, timeout_s=30, shared_memory=False)
    ran: list[Any] = []
    losses = [runtime.step(batch_of(MICROBATCHES, seed), ran).item() for seed in (1, 2)]
    return losses, {name: p.grad.tolist() for name, p in model.named_parameters() if p.grad is not None}, len(ran)


def test_staged_messages_between_processes() -> None:
    reference = Net()
    losses = [accumulate(reference, batch_of(MICROBATCHES, seed), MICROBATCHES).item() for seed in (1, 2)]
    expected = {name: p.grad for name, p in reference.named_parameters()}
    for answer in run(train, 2):
        assert isinstance(answer, tuple), answer
        got, gradients, ran = answer
        assert got == pytest.approx(losses, rel=1e-6)
        assert ran > 2 * MICROBATCHES
        for name, gradient in gradients.items():
            torch.testing.assert_close(torch.tensor(gradient), expected[name], rtol=1e-6, atol=1e-6, msg=name)


def test_a_rank_without_parameters_is_on_the_kind_of_device_that_others_have() -> None:
    store = HashStore()
    for process, kind in ((0, ""), (2, "meta")):
        store.set(f"here/device/{process}", kind)
    assert device_among([torch.nn.Tanh()], store, "here", 1, 3) == torch.device("meta")
    assert device_among([torch.nn.Tanh(), torch.nn.BatchNorm1d(2)], store, "here", 1, 3) == torch.device("cpu")
    store.set("here/device/2", "")
    assert device_among([torch.nn.Tanh()], store, "here", 1, 3) == torch.device("cpu")


def hang(rank: int) -> str:
    """The device of rank 1 hangs in its first forward, while its host goes on."""
    connect(timeout_s=30)
    device = Device()
    staged(pytest.MonkeyPatch(), device)
    _, runtime = runtime_of(rank, "1f1b", 4, timeout_s=1.0, shared_memory=False)
    runtime.step(batch_of(MICROBATCHES))
    if rank == 1:
        device.works_until = device.recorded + 3  # the step begins; a message is copied; its receive is over
    try:
        runtime.step(batch_of(MICROBATCHES))
    except RuntimeFault as error:
        return str(error)
    return "no error"


def test_a_device_that_hangs_is_told_with_its_own_place() -> None:
    for answer in run(hang, 4, agent=True):
        assert str(answer).startswith("rank 1, instruction 1 (1F0), microbatch 0: it lives, but has not come further")
