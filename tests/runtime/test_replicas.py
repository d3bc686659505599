"""Two replicas of two ranks give what one process gives that accumulates over both batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipecompile.passes.replicas import for_replicas
from pipecompile.runtime import RankRuntime, connect
from tests.runtime.handmade import PLANS, Net, accumulate, batch_of, program_of, stages_of
from tests.runtime.processes import run

MICROBATCHES = 4
FROZEN = "layers.2.bias"
UNUSED = "layers.1.spare"


def prepared() -> Net:
    """A model with a frozen parameter, one that no gradient reaches, and one with an older gradient."""
    model = Net()
    model.get_parameter(FROZEN).requires_grad_(False)
    model.layers[1].spare = torch.nn.Parameter(torch.ones(3))
    model.layers[3].weight.grad = torch.ones_like(model.layers[3].weight)
    return model


def train(process: int, schedule: str, weight: str, shared_memory: bool) -> dict[str, Any]:
    """Two steps, in which each replica has its own batches."""
    connect(timeout_s=30)
    program = for_replicas(program_of(schedule, 2, MICROBATCHES), 2)
    replica, rank = divmod(process, 2)
    model = prepared()
    if replica:
        with torch.no_grad():
            model.layers[0].weight.add_(1)  # replicas start as the first one
    mine = {s: stage for s, stage in stages_of(model).items() if s in program.shape.stages_of(rank)}
    runtime = RankRuntime(
        program, rank, mine, PLANS, loss="loss", weight=weight, timeout_s=30, shared_memory=shared_memory
    )
    losses = [runtime.step(batch_of(MICROBATCHES, 10 * step + replica)).item() for step in (1, 2)]
    held = {name for stage in mine.values() for name, _ in stage.named_parameters(remove_duplicate=False)}
    return {
        "losses": losses,
        "gradients": {
            name: None if p.grad is None else p.grad.tolist() for name, p in model.named_parameters() if name in held
        },
        "buffers": {name: buffer.tolist() for name, buffer in model.named_buffers()},
        "norms": runtime.sum_over_ranks(torch.ones(1)).item(),
    }


@pytest.mark.parametrize(
    ("schedule", "weight", "shared_memory"),
    [("interleaved-1f1b", "", True), ("zb-v", "", False), ("interleaved-1f1b", "weight", True)],
)
def test_two_replicas_of_two_ranks(schedule: str, weight: str, shared_memory: bool) -> None:
    whole, losses = prepared(), []
    for step in (1, 2):
        batches = [batch_of(MICROBATCHES, 10 * step + replica)["ids"] for replica in (0, 1)]
        if weight:
            sums = [whole({"ids": ids}) for batch in batches for ids in batch.chunk(MICROBATCHES)]
            value = sum(loss for loss, _ in sums) / sum(count for _, count in sums)
            value.backward()
        else:
            value = accumulate(whole, {"ids": torch.cat(batches)}, 2 * MICROBATCHES)
        losses.append(value.item())
    answers = run(train, 4, schedule, weight, shared_memory)
    seen: set[str] = set()
    near = {"rtol": 1e-2, "atol": 1e-3} if weight else {"rtol": 1e-5, "atol": 1e-5}  # bfloat16 rounds what was scaled
    for answer in answers:
        assert isinstance(answer, dict), answer
        assert answer["losses"] == pytest.approx(losses, rel=1e-6)
        assert answer["norms"] == 2, "sums over ranks stay within a replica"
        for name, gradient in answer["gradients"].items():
            expected = whole.get_parameter(name).grad
            assert (gradient is None) == (expected is None) == (name in (FROZEN, UNUSED)), name
            if gradient is not None:
                torch.testing.assert_close(torch.tensor(gradient), expected, msg=name, **near)
        seen |= answer["gradients"].keys()
    assert seen == dict(whole.named_parameters()).keys()
    for rank in (0, 1):
        assert answers[rank]["gradients"] == answers[2 + rank]["gradients"], "replicas agree to the last bit"
    for replica in (0, 1):  # running statistics are each replica's own
        alone = prepared()
        for step in (1, 2):
            accumulate(alone, batch_of(MICROBATCHES, 10 * step + replica), MICROBATCHES)
        home = 2 * replica + program_of(schedule, 2, 1).shape.placement[1]
        torch.testing.assert_close(torch.tensor(answers[home]["buffers"]["norm.running_mean"]), alone.norm.running_mean)
