"""Stages under torch.compile, beside the same stages in eager mode."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch

from pipecompile.errors import BuildError
from pipecompile.runtime import connect
from tests.runtime.processes import run
from tests.test_recompute import deep, wide_model
from tests.test_step_options import assert_uneven_is_exact, noisy, told, uneven
from tests.test_training import Tied, compiled, cross_entropy, tokens, words

slow = pytest.mark.skipif(
    "PIPECOMPILE_INDUCTOR" not in os.environ, reason="make inductor: C++ is compiled for a minute"
)


@pytest.fixture(autouse=True)
def _forget() -> Any:
    yield
    torch.compiler.reset()


def test_compiled_stages_train_alike() -> None:
    model = Tied(noisy=True)
    unsplit = copy.deepcopy(model)
    pipe = compiled(model, told, schedule="zb-h1")
    pipe.compile_stages(backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(pipe.step(words()), pipe.reference(unsplit, words()), rtol=1e-5, atol=0)
    for (name, p), theirs in zip(model.named_parameters(), unsplit.parameters()):
        torch.testing.assert_close(p.grad, theirs.grad, rtol=1e-5, atol=1e-6, msg=name)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, unsplit.get_buffer(name), rtol=1e-5, atol=1e-6, msg=name)
    model.eval()
    unsplit.eval()
    torch.testing.assert_close(pipe.evaluate(words()), pipe.reference(unsplit, words()), rtol=1e-5, atol=0)


def test_stages_run_what_the_backend_made() -> None:
    seen: list[int] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        seen.append(len(graph.graph.nodes))
        return graph.forward

    pipe = compiled(Tied())
    pipe.compile_stages(backend=backend)
    pipe.step(words())
    assert len(seen) >= 4


def assert_recomputed_is_exact(schedule: str, mode: str, backend: Any = "aot_eager") -> None:
    """With all microbatches of two sizes alive at once, so that both are compiled between the two runs of the first."""
    model = noisy()
    unsplit = copy.deepcopy(model)
    pipe = compiled(model, tokens, schedule=schedule, recompute=mode)
    pipe.compile_stages(backend=backend)
    for rows in (10, 3, 8):
        assert torch.equal(pipe.step(uneven(rows), ran=[]), pipe.reference(unsplit, uneven(rows)))
        for (name, p), theirs in zip(model.named_parameters(), unsplit.parameters()):
            torch.testing.assert_close(p.grad, theirs.grad, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(pipe.evaluate(uneven(5)), pipe.evaluate(uneven(5)))


@pytest.mark.parametrize(("schedule", "mode"), [("gpipe", "stage"), ("zb-h1", "calls")])
def test_recomputed_stages_are_compiled_within(schedule: str, mode: str) -> None:
    assert_recomputed_is_exact(schedule, mode)


@pytest.mark.parametrize("mode", ["stage", "calls"])
def test_what_is_recomputed_runs_what_the_backend_made(mode: str) -> None:
    made: list[int] = []
    runs: list[int] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        made.append(len(graph.graph.nodes))
        return lambda *args: (runs.append(1), graph.forward(*args))[1]

    pipe = compiled(wide_model()[0], deep, wide_model()[1], recompute=mode)
    pipe.compile_stages(backend=backend, fullgraph=True)
    pipe.step(wide_model()[1])
    before, ran = len(made), len(runs)
    pipe.step(wide_model()[1])
    assert before == len(made) > 0, "nothing is compiled anew, and equal blocks may share a graph"
    assert len(runs) - ran >= 4 * 4 * 2, "each stage runs twice for each microbatch"


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="needs a C\\+\\+ compiler on the CPU, and there is no 'no-such-compiler'"):
        compiled(Tied()).compile_stages()


@slow
@pytest.mark.parametrize(("loss", "schedule"), [(cross_entropy, "zb-h1"), (tokens, "1f1b")])
def test_inductor_trains_alike_at_several_sizes(loss: Any, schedule: str) -> None:
    assert_uneven_is_exact(loss, prepare=lambda pipe: pipe.compile_stages(), schedule=schedule)


@slow
def test_inductor_draws_the_same_numbers_again_and_in_other_cuts() -> None:
    losses = []
    for stages in (4, 4, 2):
        torch.compiler.reset()
        pipe = compiled(Tied(noisy=True), stages=stages)
        pipe.compile_stages()
        losses.append([float(pipe.step(words())) for _ in range(3)])
        assert losses[-1][0] != losses[-1][1]
    assert losses[0] == losses[1]
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def ranks_run_inductor(rank: int) -> str:
    connect(timeout_s=150)
    options: dict[str, Any] = {"schedule": "interleaved-1f1b", "ranks": 2}
    assert_uneven_is_exact(tokens, prepare=lambda pipe: pipe.compile_stages(), **options)
    model = Tied(noisy=True)
    pipe = compiled(model, told, **options)
    pipe.compile_stages()
    pipe.step(words())
    return f"{float(pipe.step(words())):.6f} {float(pipe.metrics['accuracy']):.6f}"


@slow
def test_inductor_in_two_processes() -> None:
    first, second = run(ranks_run_inductor, 2, timeout_s=200)
    assert first == second
    model = Tied(noisy=True)
    pipe = compiled(model, told, stages=2)
    pipe.compile_stages()
    pipe.step(words())
    assert first.startswith(f"{float(pipe.step(words())):.6f} ")
