"""Stages under torch.compile, beside the same stages in eager mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from pipecompile.errors import BuildError
from tests.test_step_options import told
from tests.test_training import Tied, compiled, words


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


def test_recomputed_stages_are_not_compiled() -> None:
    with pytest.raises(BuildError, match=r"stage 0 is recomputed, which does not go with torch.compile"):
        compiled(Tied(), recompute="stage").compile_stages()


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="needs a C\\+\\+ compiler on the CPU, and there is no 'no-such-compiler'"):
        compiled(Tied()).compile_stages()
