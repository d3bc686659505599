"""The generator of a device, in use beside the CPU's: whoever puts random states back or looks at them knows of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipecompile.capture.draws import Draws
from pipecompile.capture.tracepoints import Recorder
from pipecompile.errors import RuntimeFault
from pipecompile.runtime import check_current
from pipecompile.weights import random_state
from pipecompile.weights.materialise import materialise


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.Generator:
    """Stands for the generator of the only CUDA device."""
    generator = torch.Generator()
    for name, value in (("is_available", True), ("is_initialized", True), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    return generator


def test_another_device_than_the_current_one_is_refused(device: torch.Generator) -> None:
    check_current(torch.device("cuda"))
    check_current(torch.device("cuda", 0))
    with pytest.raises(RuntimeFault, match=r"stages are on cuda:1, but .* is cuda:0; call torch.cuda.set_device\(1\)"):
        check_current(torch.device("cuda", 1))


class Drawn(nn.Module):
    def __init__(self, device: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, generator=device))


def test_it_ends_where_one_making_of_the_model_leaves_it(device: torch.Generator) -> None:
    device.manual_seed(1)
    expected, after = Drawn(device).weight, device.get_state()
    device.manual_seed(1)
    assert torch.equal(materialise(lambda: Drawn(device), ["weight"]).weight, expected)
    assert torch.equal(device.get_state(), after)


def test_a_checkpoint_has_it(device: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    device.manual_seed(2)
    state, expected = random_state.take(), torch.rand(3, generator=device)
    random_state.give(state)
    assert torch.equal(torch.rand(3, generator=device), expected)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    random_state.give(state)  # a process without a device
    alone = random_state.take()
    assert alone.keys() == state.keys() - {"cuda"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    random_state.give(alone)


def test_a_call_that_draws_from_it_is_seen(device: torch.Generator) -> None:
    draws, recorder = Draws(), Recorder(mark=False)
    with draws.watched(recorder):
        recorder.look("before@0")
        torch.rand(1, generator=device)
        recorder.look("drawing@0")
    assert draws.torch == {"drawing@0"}
