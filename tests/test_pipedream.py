"""PipeDream and 2BW: which version of the weights each microbatch reads, how many are held, what a user must give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pipecompile
from pipecompile.errors import RuntimeFault, ScheduleError
from pipecompile.ir import Shape, Shared, StageCost
from pipecompile.ir.versions import lines, versions_read
from pipecompile.memory import memory_over_time
from pipecompile.passes.communicate import chain, communicate
from pipecompile.passes.replicas import for_replicas
from pipecompile.passes.schedules import find_schedule, make_timetable
from pipecompile.passes.symbols import SYMBOLS, closed_forms
from pipecompile.passes.torch_csv import write_csv
from pipecompile.passes.verify import verify
from pipecompile.simulate import simulate
from pipecompile.updating import check_mean
from tests.asynchronous import RULES, train
from tests.models import mlp
from tests.runtime.processes import run

SIZES = [(p, m) for p in (1, 2, 4, 8, 16) for m in sorted({*range(1, p + 2), 2 * p - 1, 2 * p, 3 * p + 1, 4 * p})]
UPDATING = tuple(RULES)


def most_held(rows: Any, rank: int, shared: Any = ()) -> list[int]:
    """The most versions of each line of a rank."""
    found = lines(rows, rank, shared)
    most = [0] * len(found)
    for one in rows[rank]:
        for line in found:
            line.step(one)
        most = [max(count, line.held) for count, line in zip(most, found)]
    return most


@pytest.mark.parametrize("name", UPDATING)
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_versions_are_those_of_the_papers_and_of_the_closed_form(name: str, p: int, m: int) -> None:
    timetable = make_timetable(name, Shape(p, p, m))
    rule, _ = RULES[name]
    assert versions_read(timetable.rows) == {(s, t): rule(p, s, t) for s in range(p) for t in range(m)}
    form = closed_forms(find_schedule(name))["versions"]
    for rank in range(p):
        values = {SYMBOLS["p"]: p, SYMBOLS["m"]: m, SYMBOLS["r"]: rank}
        assert most_held(timetable.rows, rank) == [form.subs(values)]


@pytest.mark.parametrize("name", UPDATING)
def test_a_shared_parameter_has_the_versions_of_its_first_stage(name: str) -> None:
    partition = chain(4, shared=(Shared("w", (1, 3), 8),))
    program = verify(communicate(make_timetable(name, Shape(4, 4, 12)), partition), partition)
    held = [most_held(program.rows, rank, [("w", (1, 3))]) for rank in range(4)]
    assert held == {"pipedream": [[4], [3, 3], [2], [1, 2]], "pipedream-2bw": [[2], [2, 2], [2], [2, 2]]}[name]


def test_two_stages_trained_by_hand():
    """loss = (a b x - y)^2 / 2 on two stages: running the rows with stashed weights gives the statement's recurrence."""
    rows = make_timetable("pipedream", Shape(2, 2, 6)).rows
    data, rate = [(1.0, 0.5), (2.0, -1.0), (-1.0, 0.3), (0.5, 2.0), (1.5, 1.0), (-0.7, 0.1)], 0.1
    read = versions_read(rows)
    first, second = ([read[stage, t] for t in range(6)] for stage in range(2))
    a, b = [0.6], [-0.4]
    for t, (x, y) in enumerate(data):
        seen_a, seen_b = a[max(0, t - 1)], b[t]
        error = seen_a * seen_b * x - y
        a.append(a[t] - rate * error * seen_b * x)
        b.append(b[t] - rate * error * seen_a * x)
    run_a, run_b = _run(rows, data, rate, first, second)
    assert (run_a, run_b) == (a, b)


def _run(rows, data, rate, first, second):
    """Both ranks' rows, in an order that their messages allow, with explicit stashes."""
    a, b, hidden, back = [0.6], [-0.4], {}, {}
    at = [0, 0]
    while at != [len(row) for row in rows]:
        for rank, row in enumerate(rows):
            if at[rank] == len(row):
                continue
            one, t = row[at[rank]], row[at[rank]].microbatch
            if one.op == "UPDATE":
                assert one.version == len((a, b)[rank]) - 1, "this walk updates with its backward"
            elif (rank, one.op) == (0, "FORWARD"):
                hidden[t] = a[first[t]] * data[t][0]
            elif (rank, one.op) == (0, "BACKWARD"):
                if t not in back:
                    continue
                a.append(a[-1] - rate * back[t] * data[t][0])
            elif t not in hidden:
                continue
            elif one.op == "BACKWARD":
                seen = b[second[t]]
                error = seen * hidden[t] - data[t][1]
                back[t] = error * seen
                b.append(b[-1] - rate * error * hidden[t])
            at[rank] += 1
    return pytest.approx(a), pytest.approx(b)


@pytest.mark.parametrize(("name", "versions"), [("pipedream", (3, 2, 1)), ("pipedream-2bw", (2, 2, 2))])
def test_memory_counts_the_versions(name: str, versions: tuple[int, ...]) -> None:
    costs = [StageCost(1, 2, 1, parameter_bytes=100, trainable_bytes=100)] * 3
    partition = chain(3, costs, bytes=0, gradient_bytes=0)
    program = communicate(make_timetable(name, Shape(3, 3, 12)), partition)
    peaks = [max(line) for line in memory_over_time(program, partition, optimizer_factor=2)]
    assert peaks == [400 + 100 * (held - 1) for held in versions]


def test_updates_take_the_optimizers_time() -> None:
    partition = chain(3)
    program = communicate(make_timetable("pipedream", Shape(3, 3, 6)), partition)
    without, with_time = (simulate(program, partition, optimizer_ms=[ms] * 3) for ms in (0.0, 0.5))
    assert with_time.busy_ms == tuple(ms + 6 * 0.5 for ms in without.busy_ms)
    assert without.step_ms == 24
    assert with_time.step_ms == 24 + 6 * 0.5


@pytest.mark.parametrize("name", UPDATING)
def test_the_last_bit_of_a_chain(name: str) -> None:
    """Nothing is summed in another order here, so weights are equal to the last bit."""
    model, batch, loss = mlp()
    unsplit = mlp()[0]
    pipe = pipecompile.compile(
        model, batch, stages=2, microbatches=8, schedule=name, loss=loss, costs="estimate", check=False
    )
    held = {key: stage for stage in range(2) for key in pipe.plan.holds[stage]}
    rule, grouped = RULES[name]
    pipe.step(batch, torch.optim.AdamW(pipe.parameters(), lr=0.01))
    train(unsplit, batch, loss, torch.optim.AdamW(unsplit.parameters(), lr=0.01), 8, held, 2, rule, 2 if grouped else 1)
    for key, p in unsplit.named_parameters():
        assert torch.equal(model.get_parameter(key), p), key
    assert torch.equal(pipe.evaluate(batch), pipe.evaluate(batch)), "evaluation reads the last version"


class Checkpointed(nn.Module):
    """Its inside is computed again in the backward: with the weights of the forward, or gradients are wrong."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(lambda v, layer=layer: torch.tanh(layer(v)), x, use_reentrant=self.reentrant)
        return x


def make_checkpointed(reentrant: bool) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(8, 8), *[Checkpointed(reentrant) for _ in range(2)])
    return first, (torch.randn(8, 8), torch.randn(8, 8))


def distance(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_reads_the_same_version(reentrant: bool) -> None:
    model, batch = make_checkpointed(reentrant)
    unsplit, _ = make_checkpointed(reentrant)
    options = {"schedule": "pipedream", "loss": distance, "costs": "estimate", "check": False}
    pipe = pipecompile.compile(model, batch, stages=2, microbatches=8, **options)
    held = {key: stage for stage in range(2) for key in pipe.plan.holds[stage]}
    pipe.step(batch, torch.optim.SGD(pipe.parameters(), lr=0.5))
    rule, _ = RULES["pipedream"]
    train(unsplit, batch, distance, torch.optim.SGD(unsplit.parameters(), lr=0.5), 8, held, 2, rule, 1)
    for key, p in unsplit.named_parameters():
        assert torch.allclose(model.get_parameter(key), p, rtol=1e-6, atol=1e-7), key


def test_what_a_user_must_give(tmp_path: Any) -> None:
    model, batch, loss = mlp()
    options = {"loss": loss, "costs": "estimate", "check": False}
    pipe = pipecompile.compile(model, batch, stages=2, microbatches=4, schedule="pipedream", **options)
    assert pipe.updates
    with pytest.raises(
        ScheduleError, match=r"pipedream updates weights inside a step; give step\(batch, optimizer\), or"
    ):
        pipe.step(batch)
    foreign = torch.optim.SGD(mlp()[0].parameters(), lr=0.1)
    with pytest.raises(ScheduleError, match=r"none of this pipe's parameters; make it of pipe.parameters\(\)"):
        pipe.step(batch, foreign)
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
    with pytest.raises(ScheduleError, match="pipedream updates weights inside a step, which torch's pipelining has no"):
        write_csv(make_timetable("pipedream", Shape(2, 2, 4)), tmp_path / "x.csv")
    flushing = pipecompile.compile(model, batch, stages=2, microbatches=4, **options)
    assert not flushing.updates
    with pytest.raises(ScheduleError, match=r"1f1b leaves the gradients in .grad; call step\(batch\) alone, then"):
        flushing.step(batch, optimizer)


def masked(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A sum and its weight, which differs from microbatch to microbatch."""
    kept = (batch[1] > 0.2).to(batch[1].dtype)
    return (F.mse_loss(model(batch[0]), batch[1], reduction="none") * kept).sum(), kept.sum()


def masked_mean(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    value, weight = masked(model, batch)
    return value / weight


def beside_the_oracle(loss: Any, mean: Any, **options: Any) -> float:
    """The largest difference of a weight between two stages of a pipeline and the oracle, both with hooks."""
    model, batch = make_checkpointed(reentrant=False)
    unsplit, _ = make_checkpointed(reentrant=False)
    pipe = pipecompile.compile(
        model,
        batch,
        stages=2,
        microbatches=8,
        schedule="pipedream",
        loss=loss,
        costs="estimate",
        check=False,
        **options,
    )
    held = {key: stage for stage in range(2) for key in pipe.plan.holds[stage]}
    seen: tuple[list[float], list[float]] = [], []
    for which, notes in zip((model, unsplit), seen):
        for p in which.parameters():
            p.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
            p.register_post_accumulate_grad_hook(lambda p, notes=notes: notes.append(float(p.grad.norm())))
    pipe.step(batch, torch.optim.SGD(pipe.parameters(), lr=0.5))
    rule, _ = RULES["pipedream"]
    train(unsplit, batch, mean, torch.optim.SGD(unsplit.parameters(), lr=0.5), 8, held, 2, rule, 1)
    mine = {id(p) for p in pipe.parameters()}
    if len(mine) == len(list(model.parameters())):
        assert sorted(seen[0]) == pytest.approx(sorted(seen[1]), rel=1e-4, abs=1e-7)
    whole = dict(unsplit.named_parameters())
    return max(float((p - whole[key]).detach().abs().max()) for key, p in model.named_parameters() if id(p) in mine)


CASES: dict[str, dict[str, Any]] = {
    "hooks": {"loss": distance, "mean": distance},
    "a sum over a weight": {"loss": masked, "mean": masked_mean},
    "stages computed again": {"loss": distance, "mean": distance, "recompute": "stage"},
    "calls computed again": {"loss": masked, "mean": masked_mean, "recompute": "calls"},
}


@pytest.mark.parametrize("case", CASES)
def test_hooks_weights_and_recomputation_are_those_of_one_microbatch(case: str) -> None:
    assert beside_the_oracle(**CASES[case]) <= 1e-7


def in_processes(rank: int) -> dict[str, float]:
    from pipecompile.runtime import connect

    connect(timeout_s=60)
    return {case: beside_the_oracle(**options) for case, options in CASES.items()}


def test_the_same_in_two_processes() -> None:
    for answer in run(in_processes, 2):
        assert isinstance(answer, dict), answer
        assert all(error <= 1e-7 for error in answer.values()), answer


def test_a_loss_whose_weight_comes_too_late_is_refused() -> None:
    model, batch, _ = mlp()
    options = {"stages": 2, "microbatches": 4, "costs": "estimate", "check": False}
    with pytest.raises(
        ScheduleError, match="whose first backward runs before the weight of all of them is known; give a"
    ):
        pipecompile.compile(model, batch, schedule="pipedream-2bw", loss=masked, **options)
    pipe = pipecompile.compile(model, batch, schedule="pipedream", loss=masked, **options)
    with pytest.raises(ScheduleError, match="over 2 replicas, but divides by the weight of its own one; give a loss"):
        check_mean(pipe.program, pipe.plan, replicas=2)
    first, last = pipe.plan.stages
    weight = next(port for port in last.outputs if port.name == pipe.plan.weight)
    rest = tuple(port for port in last.outputs if port != weight)
    moved = replace(first, outputs=(*first.outputs, weight)), replace(last, outputs=rest)
    with pytest.raises(ScheduleError, match="stage 1 makes the loss and stage 0 the weight, on another rank; compute"):
        check_mean(pipe.program, replace(pipe.plan, stages=moved), replicas=1)


def test_a_hook_that_would_see_a_mean_is_refused() -> None:
    model, batch, loss = mlp()
    pipe = pipecompile.compile(
        model, batch, stages=2, microbatches=4, schedule="pipedream-2bw", loss=loss, costs="estimate", check=False
    )
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
    hook = pipe.parameters()[0].register_hook(lambda gradient: None)
    with pytest.raises(RuntimeFault, match=r"a parameter of shape \(32, 32\) has a hook, .*; take the hook off, or"):
        pipe.step(batch, optimizer)
    hook.remove()
    pipe.step(batch, optimizer)


def test_replicas_run_the_same_program() -> None:
    program = communicate(make_timetable("pipedream", Shape(2, 2, 4)), chain(2))
    assert for_replicas(program, 2) == program, "an update sums over replicas itself"
