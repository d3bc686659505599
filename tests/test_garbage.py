"""How often Python searches for reference cycles while a model is compiled, and that all is as before afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import pipecompile
from pipecompile.errors import CaptureError
from pipecompile.garbage import OBJECTS, seldom_searched

State = tuple[bool, tuple[int, int, int], int]


def state() -> State:
    return gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Every test begins with nothing frozen and ends in the state that it found."""
    thresholds = gc.get_threshold()
    gc.unfreeze()
    yield
    gc.enable()
    gc.unfreeze()
    gc.set_threshold(*thresholds)


def test_cycles_are_searched_for_less_often_and_never_among_what_was_there() -> None:
    gc.set_threshold(600, 7, 8)
    before = state()
    with seldom_searched():
        assert gc.get_threshold() == (OBJECTS, 7, 8)
        assert gc.get_freeze_count() > 1000
        with seldom_searched():
            assert gc.get_threshold() == (OBJECTS, 7, 8)
    assert state() == before
    gc.set_threshold(2 * OBJECTS, 7, 8)
    with seldom_searched():
        assert gc.get_threshold() == (2 * OBJECTS, 7, 8), "a caller's own number is larger"


def test_all_is_as_before_after_an_error_too() -> None:
    before = state()
    with pytest.raises(ZeroDivisionError), seldom_searched():
        raise ZeroDivisionError
    assert state() == before


@pytest.mark.parametrize("tune", [gc.freeze, gc.disable], ids=["frozen", "off"])
def test_who_has_frozen_objects_or_turned_the_search_off_is_left_alone(tune: Callable[[], None]) -> None:
    tune()
    before = state()
    with seldom_searched():
        assert state() == before
    assert state() == before


class Model(nn.Module):
    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.fails, self.seen = fails, set[tuple[int, int, int]]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(gc.get_threshold())
        if self.fails:
            raise ValueError("no")
        return self.two(self.one(x)).sum()


@pytest.mark.parametrize("fails", [False, True], ids=["compiled", "refused"])
def test_compile_leaves_the_collector_as_it_was(fails: bool) -> None:
    model, before = Model(fails), state()
    refused = pytest.raises(CaptureError) if fails else pytest.MonkeyPatch.context()
    with refused:
        pipecompile.compile(
            model, (torch.randn(4, 4),), stages=2, microbatches=2, costs="estimate", check=False, progress=False
        )
    assert state() == before
    assert {first for first, *_ in model.seen} == {max(OBJECTS, before[1][0])}


def test_a_command_ends_without_a_search() -> None:
    """Functions that are to run at exit do so in the reverse of their order."""
    script = (
        "import atexit, gc; from pipecompile.cli import main; "
        "atexit.register(lambda: print('frozen', gc.get_freeze_count() > 1000)); "
        "main(['schedule', 'gpipe', '--stages', '2', '--ranks', '2', '--microbatches', '2'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "frozen True"
