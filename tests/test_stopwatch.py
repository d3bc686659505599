"""A device's times are those of the device, not of the host that launches."""

from __future__ import annotations

import pytest
import torch

from pipecompile.cost.stopwatch import Stopwatch
from pipecompile.cost.trial import Clock

LAUNCH_MS, SYNCHRONISE_MS = 0.25, 2.0


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.device.host += LAUNCH_MS
        self.at = max(self.device.host, self.device.free)

    def synchronize(self) -> None:
        self.device.host = max(self.device.host, self.at) + SYNCHRONISE_MS

    def elapsed_time(self, later: Event) -> float:
        return later.at - self.at


class Device:
    """Kernels run one after the other, each no earlier than it is launched; stands for torch.cuda."""

    def __init__(self) -> None:
        self.host = self.free = 0.0

    def Event(self, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)

    def launch(self, ms: float) -> None:
        self.host += LAUNCH_MS
        self.free = max(self.host, self.free) + ms


def test_long_kernels_take_their_own_time() -> None:
    device = Device()
    watch = Stopwatch(device)

    def call() -> str:
        for _ in range(4):
            device.launch(3.0)
        return "made"

    assert watch.time(call, call) == (12.0, "made")
    assert watch.time(call, lambda: None)[0] > 12.0, "an idle device waits for the first launch"


def test_short_kernels_take_as_long_as_their_launches() -> None:
    device = Device()

    def call() -> None:
        for _ in range(8):
            device.launch(0.0625)

    ms, _ = Stopwatch(device).time(call, call)
    assert 8 * LAUNCH_MS <= ms <= 9 * LAUNCH_MS


def test_a_backward_is_run_twice_and_its_graph_goes_with_the_second() -> None:
    device = Device()
    x = torch.ones(3, requires_grad=True)
    y = (x * x).sum()
    _, (gradient,) = Clock(torch.device("cpu"), Stopwatch(device)).backward([y], [torch.ones(())], [x])
    assert gradient.tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x)
