"""Replicas of whole models, at two ranks times two replicas: GPT-2 with dropout, and a CNN with BatchNorm."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch

from tests.runtime.processes import run

MICROBATCHES = 2
MODELS = ("gpt2", "cnn") if os.environ.get("PIPECOMPILE_ALL_PROCESSES") else ("gpt2",)
BAR = 1e-5


def check(process: int, name: str) -> dict[str, Any]:
    """This process's largest relative errors over two clipped optimizer steps beside the unsplit model's."""
    import pipecompile
    from pipecompile.compare import differences, gradients, worst
    from pipecompile.runtime import connect
    from tests.models import MODELS

    connect(timeout_s=60)
    model, batch, loss = MODELS[name]()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    model.train()
    unsplit = copy.deepcopy(model)
    pipe = pipecompile.compile(
        model, batch, stages=2, microbatches=MICROBATCHES, loss=loss, costs="estimate", check=False
    )
    batches = [batch, {key: value.roll(1, -1) for key, value in batch.items()}]
    first = {id(p): key for key, p in reversed(list(model.named_parameters()))}
    mine = {first[id(p)] for p in pipe.parameters()}
    steps = [torch.optim.SGD(parameters, lr=0.1) for parameters in (pipe.parameters(), unsplit.parameters())]
    losses, norms, errors = [], [], []
    for _ in range(2):
        for optimizer in steps:
            optimizer.zero_grad()
        value = pipe.step(batches[pipe.replica])
        expected = pipe.reference(unsplit, batches[0], others=batches[1:])
        losses.append((float(value), float(expected)))
        norm = pipe.clip_grad_norm_(0.5)
        norms.append((float(norm), float(torch.nn.utils.clip_grad_norm_(unsplit.parameters(), 0.5))))
        wanted = gradients(unsplit)
        got = {key: value for key, value in gradients(model).items() if key in mine}
        errors.append(worst(list(differences(got, {key: wanted[key] for key in got}, ""))).error)
        for optimizer in steps:
            optimizer.step()
    model.eval()
    return {
        "updating": updating(name),
        "where": (pipe.replica, pipe.rank),
        "sums": str(pipe.program).count("REDUCE_REPLICAS"),
        "losses": losses,
        "norms": norms,
        "error": max(errors),
        "evaluated": float(pipe.evaluate(batches[pipe.replica])),
        "trained": [p.sum().item() for p in pipe.parameters()],
    }


def updating(name: str) -> float:
    """This process's largest relative error after a step of pipedream: each update is that of the replicas' mean.

    In the oracle each replica's microbatch has a forward of its own, as statistics over a batch demand.
    """
    import pipecompile
    from tests.asynchronous import RULES, train
    from tests.models import MODELS

    model, batch, loss = MODELS[name]()
    unsplit = copy.deepcopy(model)
    pipe = pipecompile.compile(
        model, batch, stages=2, microbatches=4, loss=loss, costs="estimate", check=False, schedule="pipedream"
    )
    batches = [batch, {key: value.roll(1, -1) for key, value in batch.items()}]
    pipe.step(batches[pipe.replica], torch.optim.SGD(pipe.parameters(), lr=0.1))
    both = {key: torch.cat([p for pair in zip(*(b[key].chunk(4) for b in batches)) for p in pair]) for key in batch}
    tensors = dict(model.named_parameters())
    held = {key: stage for stage in (1, 0) for key in pipe.plan.holds[stage] if key in tensors}
    rule, _ = RULES["pipedream"]

    def version(stages: int, stage: int, part: int) -> int:
        return rule(stages, stage, part // 2)

    train(unsplit, both, loss, torch.optim.SGD(unsplit.parameters(), lr=0.1), 8, held, 2, version, 2)
    mine = {id(p) for p in pipe.parameters()}
    pairs = [(p, unsplit.get_parameter(key)) for key, p in tensors.items() if id(p) in mine]
    return max(float((got - value).norm() / value.norm()) for got, value in pairs)


@pytest.mark.parametrize("name", MODELS)
def test_two_replicas_train_as_one_process(name: str) -> None:
    answers = run(check, 4, name)
    for process, answer in enumerate(answers):
        assert isinstance(answer, dict), answer
        assert answer["where"] == divmod(process, 2)
        assert answer["sums"] == 2
        assert answer["error"] <= BAR
        assert answer["updating"] <= BAR
        for got, expected in (*answer["losses"], *answer["norms"]):
            assert got == pytest.approx(expected, rel=1e-5)
        assert answer["evaluated"] == answers[0]["evaluated"]
    for rank in (0, 1):
        assert answers[rank]["trained"] == answers[2 + rank]["trained"], "replicas stay equal to the last bit"
