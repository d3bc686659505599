"""Golden texts: ``golden(name, text)`` compares with ``tests/golden/name``; ``pytest --update-golden`` rewrites them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden texts with what the code gives")


SLOWEST = (
    "test_schedules_processes",
    "test_torchrun",
    "test_pitfalls",
    "test_zoo",
    "test_schedules_train",
    "test_models",
    "test_examples",
    "test_memory",
    "test_cli",
    "test_sizes",
    "test_training_processes",
    "test_rank",
    "test_faults",
    "test_saving",
    "test_coupling",
    "test_training",
)
"""Files that take longest begin first, so that both workers end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: index for index, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.rstrip("\n") + "\n")
        assert path.exists(), f"no golden text {path.name}; make it with pytest --update-golden and read it"
        assert text.rstrip("\n") + "\n" == path.read_text(), f"{path.name} differs; see pytest --update-golden"

    return compare


@pytest.fixture
def little_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that ask for what holds whatever the effort of searching orders."""
    monkeypatch.setattr(import_module("pipecompile.passes.schedules.auto"), "EFFORT", 100_000)
    monkeypatch.setattr(import_module("pipecompile.passes.schedules.blocks"), "TASKS_TRIED", 20_000)
