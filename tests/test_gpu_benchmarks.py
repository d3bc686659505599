"""The scripts for GPUs run: on the CPU, which shows that they work and not how fast a GPU is."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from benchmarks.gpu import costs, local_runtime, memory, ranks
from benchmarks.gpu.__main__ import commands
from tests.runtime.processes import run


def test_local_runtime() -> None:
    found = local_runtime.run("cpu", steps=1)
    assert len(found["rows"]) == 1
    assert found["median"] == found["rows"][0]["ratio"] > 0


@pytest.fixture
def few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times do not matter here."""
    measuring = import_module("pipecompile.cost.measure")  # the package has a function of that name
    monkeypatch.setattr(measuring, "BUDGET_S", 0.0)
    monkeypatch.setattr(measuring, "PATIENCE_S", 0.0)


@pytest.mark.usefixtures("few_runs")
@pytest.mark.filterwarnings("ignore:the machine is busy")
def test_memory() -> None:
    found = memory.run("cpu", ("zb-h1",), ("gpt2",), layers=4)
    assert [row["rank"] for row in found["rows"]] == [0, 1, 2, 3]
    for row in found["rows"]:
        assert 1 <= row["ratio"] <= 1.15, "small stages hold little beside their messages"


@pytest.mark.usefixtures("few_runs")
@pytest.mark.filterwarnings("ignore:the machine is busy")
def test_costs() -> None:
    found = costs.run("cpu", "cpu", ("gpt2",))
    assert {row["call"] for row in found["rows"]} >= {"GPT2Block", "Embedding"}
    assert min(row["ratio"] for row in found["rows"]) <= found["median"]


def two_ranks(rank: int) -> Any:
    return ranks.run("cpu", "gloo", ("zb-v",))


def test_ranks() -> None:
    for answer in run(two_ranks, 2):
        assert isinstance(answer, dict), answer
        assert answer["ok"], answer
        assert [row["schedule"] for row in answer["rows"]] == ["zb-v"]


def test_what_a_machine_can_run() -> None:
    assert set(commands("cuda", 1, "")) == {"local_runtime", "memory", "ranks over gloo"}
    assert set(commands("cuda", 2, "h100")) == {
        "local_runtime",
        "memory",
        "costs",
        "ranks over gloo",
        "ranks over nccl",
    }
