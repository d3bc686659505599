"""The local runtime gives what gradient accumulation on the unsplit model gives."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipecompile.errors import ProgramError, RuntimeFault
from pipecompile.ir import Instruction, Port, Program, Shape, Spec, StagePlan
from pipecompile.runtime import LocalRuntime, Stage
from tests.runtime import handmade
from tests.runtime.handmade import PLANS, Net, accumulate, batch_of, program_of, stages_of

SUMMED_OVER_STAGES = {"wte.weight", "layers.0.weight", "layers.0.bias"}
"""Gradients to which several stages contribute: equal up to the order of the sum."""


def runtime_of(model: nn.Module, program: Program, **options: Any) -> LocalRuntime:
    return LocalRuntime(program, stages_of(model), PLANS, loss="loss", **options)


def compare(ours: nn.Module, reference: nn.Module) -> None:
    parameters = dict(ours.named_parameters())
    for name, expected in reference.named_parameters():
        got = parameters[name].grad
        assert got is not None
        if name in SUMMED_OVER_STAGES:
            torch.testing.assert_close(got, expected.grad, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(got, expected.grad), name
    buffers = dict(ours.named_buffers())
    for name, buffer in reference.named_buffers():
        assert torch.equal(buffers[name], buffer), name


@pytest.mark.parametrize("microbatches", [1, 4, 6])
@pytest.mark.parametrize(
    ("schedule", "ranks"), [("gpipe", 4), ("1f1b", 4), ("zb-h1", 4), ("interleaved-1f1b", 2), ("interleaved-1f1b", 1)]
)
def test_loss_gradients_and_buffers_over_two_steps(schedule: str, ranks: int, microbatches: int) -> None:
    reference = Net()
    ours = copy.deepcopy(reference)
    runtime = runtime_of(ours, program_of(schedule, ranks, microbatches))
    for seed in (1, 2):  # .grad is not cleared in between: a step adds to it
        batch = batch_of(microbatches, seed)
        value = runtime.step(batch)
        assert torch.equal(value, accumulate(reference, batch, microbatches))
        assert value.shape == ()
        assert not value.requires_grad
        compare(ours, reference)
    assert ours.steps == 2 * microbatches


def test_a_weighted_loss_is_the_quotient_of_the_sums() -> None:
    reference = Net()
    ours = copy.deepcopy(reference)
    runtime = runtime_of(ours, program_of(), weight="weight")
    before = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    for seed in (1, 2):
        batch = batch_of(4, seed)
        reference.zero_grad()
        totals = [reference({"ids": ids}) for ids in batch["ids"].chunk(4)]
        for loss, _ in totals:
            loss.backward()
        loss, weight = sum(loss.detach() for loss, _ in totals), sum(weight for _, weight in totals)
        assert torch.equal(runtime.step(batch), loss / weight)
        for (name, mine), theirs in zip(ours.named_parameters(), reference.parameters()):
            before[name] += theirs.grad / weight
            torch.testing.assert_close(mine.grad, before[name], rtol=1e-6, atol=1e-7, msg=name)


def test_copies_of_a_shared_parameter_get_the_summed_gradient() -> None:
    reference = Net()
    ours, other = copy.deepcopy(reference), copy.deepcopy(reference)
    stages = stages_of(ours)
    stages[3] = stages_of(other)[3]
    runtime = LocalRuntime(program_of(), stages, PLANS, loss="loss")
    for seed in (1, 2):
        runtime.step(batch_of(4, seed))
        accumulate(reference, batch_of(4, seed), 4)
    first, last = ours.wte.weight, other.wte.weight
    torch.testing.assert_close(first.grad, reference.wte.weight.grad, rtol=1e-6, atol=1e-6)
    assert torch.equal(first.grad, last.grad)
    assert first.grad is not last.grad


def test_a_gradient_that_is_none_counts_as_zeros() -> None:
    """Stage 1 ignores what it receives; stage 0 still hears of it, from another rank."""

    class Ignores(Stage):
        def forward(self, batch: Any, hidden: Tensor) -> tuple[Any, ...]:
            return (self.lin.weight.sum() * batch["x"].sum(),)

    class Makes(Stage):
        def forward(self, batch: Any) -> tuple[Any, ...]:
            return (self.pre(batch["x"]),)

    model = nn.ModuleDict({"pre": nn.Linear(2, 2), "lin": nn.Linear(2, 2)})
    hidden = Port("hidden", Spec((1, 2), "float32", True), targets=(1,))
    plans = (
        StagePlan(0, (), (hidden,), modules=("pre",)),
        StagePlan(1, (replace(hidden, source=0, targets=()),), (Port("loss", handmade.spec()),), modules=("lin",)),
    )
    stages = {0: Makes(model, plans[0]), 1: Ignores(model, plans[1])}
    LocalRuntime(program_of(ranks=2, microbatches=2, plans=plans), stages, plans, loss="loss").step(
        {"x": torch.ones(2, 2)}
    )
    assert torch.equal(model["pre"].weight.grad, torch.zeros(2, 2))
    assert torch.equal(model["lin"].weight.grad, torch.full((2, 2), 2.0))


def test_sent_activations_do_not_outlive_their_use() -> None:
    """No operation saves stage 0's output, so it is freed once its reader has made its own."""
    alive: list[int] = []

    class Last(Stage):
        def forward(self, batch: Any, hidden: Tensor) -> tuple[Any, ...]:
            made = sum(1 for kept in (runtime._ranks[0]._slots) if isinstance(kept, Tensor))
            alive.append(made)
            return (hidden.sum(),)

    class Begin(Stage):
        def forward(self, batch: Any) -> tuple[Any, ...]:
            return (batch["x"] + self.bias,)

    model = nn.Module()
    model.register_parameter("bias", nn.Parameter(torch.ones(3)))
    hidden = Port("hidden", Spec((1, 3), "float32", True), targets=(1,))
    plans = (
        StagePlan(0, (), (hidden,), parameters=("bias",)),
        StagePlan(1, (replace(hidden, source=0, targets=()),), (Port("loss", handmade.spec()),)),
    )
    stages = {0: Begin(model, plans[0]), 1: Last(model, plans[1])}
    runtime = LocalRuntime(program_of("gpipe", 2, 4, plans), stages, plans, loss="loss")
    assert runtime.step({"x": torch.zeros(4, 3)}) == 3
    assert alive == [0, 0, 0, 0]
    assert torch.equal(model.bias.grad, torch.ones(3))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"ids": torch.zeros(8, 7, dtype=torch.int64)},
            r"rank 0, instruction 0 \(0F0\), microbatch 0: stage 0 made 'hidden' as float32\[2, 7, 8\], but was "
            r"compiled for float32\[2, 5, 8\]; give batches of the compiled shape",
        ),
        (
            {"ids": torch.full((8, 5), 99)},
            r"rank 0, instruction 0 \(0F0\), microbatch 0: IndexError: index out of range",
        ),
        ({"tokens": torch.zeros(8, 5)}, r"instruction 0 \(0F0\), microbatch 0: KeyError: 'ids'"),
    ],
)
def test_a_step_that_fails_names_the_instruction(change: dict[str, Tensor], problem: str) -> None:
    model = Net()
    runtime = runtime_of(model, program_of())
    with pytest.raises(RuntimeFault, match=problem):
        runtime.step(change)
    reference = Net()
    value = runtime.step(batch_of(4))  # a failed step leaves nothing behind
    assert torch.equal(value, accumulate(reference, batch_of(4), 4))


def test_a_weighted_step_that_fails_leaves_gradients_as_they_were() -> None:
    model = Net()
    before = torch.ones_like(model.layers[3].weight)
    model.layers[3].weight.grad = before
    with pytest.raises(RuntimeFault, match="IndexError"):
        runtime_of(model, program_of(), weight="weight").step({"ids": torch.full((8, 5), 99)})
    assert model.layers[3].weight.grad is before


def test_a_batch_that_does_not_divide() -> None:
    """Its microbatches have 2, 2, 2 and 1 rows, and the plans are of 2 rows alone."""
    with pytest.raises(
        RuntimeFault, match=r"made 'hidden' as float32\[1, 5, 8\], but was compiled for float32\[2, 5, 8\]"
    ):
        runtime_of(Net(), program_of()).step({"ids": torch.zeros(7, 5, dtype=torch.int64)})


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ((None,), "made 'deep' as None, but was compiled for float32"),
        (("text",), "made 'deep' as 'text', but was compiled for float32"),
        ((), r"stage 2 gave 0 values, expected a tuple of 1 \('deep'\); compile the model again"),
        ([1], "stage 2 gave a list, expected a tuple of 1"),
    ],
)
def test_a_stage_that_gives_something_else(output: Any, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    stages = stages_of(model)
    monkeypatch.setattr(stages[2], "forward", lambda *_: output)
    with pytest.raises(RuntimeFault, match=problem):
        LocalRuntime(program_of(), stages, PLANS, loss="loss").step(batch_of(4))


def test_a_loss_without_gradient() -> None:
    model = Net()
    runtime = runtime_of(model, program_of())
    with torch.no_grad(), pytest.raises(RuntimeFault, match=r"loss of stage 3 needs no gradient.*step outside of"):
        runtime.step(batch_of(4))


def test_frozen_parameters_stay_without_gradient() -> None:
    reference = Net()
    for layer in (reference.layers[0], reference.wte, reference.layers[3]):
        layer.requires_grad_(False)
    ours = copy.deepcopy(reference)
    value = runtime_of(ours, program_of()).step(batch_of(4))
    assert torch.equal(value, accumulate(reference, batch_of(4), 4))
    assert ours.layers[0].weight.grad is None
    assert torch.equal(ours.layers[1].weight.grad, reference.layers[1].weight.grad)


def edited(program: Program, rank: int, edit: Any) -> Program:
    rows = list(program.rows)
    rows[rank] = tuple(edit(list(rows[rank])))
    return replace(program, rows=tuple(rows))


def without(op: str) -> Any:
    return lambda row: [one for one in row if one.op != op]


@pytest.mark.parametrize(
    ("rank", "edit", "problem"),
    [
        (0, lambda row: row[::-1], r"needs the forward of stage 0 for stage 0, microbatch 3, which is not there yet"),
        (1, without("RECV_F"), r"1F0 \(rank 1\) needs the value 'hidden' of stage 0 for stage 1, microbatch 0"),
        (1, without("RECV_B"), r"1B0 \(rank 1\) needs the gradient of 'middle' of stage 2 for stage 1"),
        (2, without("SEND_B"), r"0RECV_B0<2 has no counterpart on the other rank"),
        (
            3,
            lambda row: [replace(one, values=("sky",)) if one.op == "SEND_B" else one for one in row],
            r"3SEND_B0>0 carries 'sky', but stage 0 makes hidden, wide.*compile the program and the stages together",
        ),
        (1, lambda row: [replace(one, peer=9) if one.peer == 2 else one for one in row], "there is no stage 9"),
    ],
)
def test_programs_that_cannot_run_are_refused(rank: int, edit: Any, problem: str) -> None:
    with pytest.raises(ProgramError, match=problem):
        runtime_of(Net(), edited(program_of("gpipe"), rank, edit))


def test_sends_and_receives_in_different_orders_are_refused() -> None:
    def last_first(row: list[Instruction]) -> list[Instruction]:
        return sorted(row, key=lambda one: (one.op != "RECV_F", -one.microbatch if one.op == "RECV_F" else 0))

    with pytest.raises(ProgramError, match=r"rank 0 sends 0SEND_F0>1.*where rank 1 expects 1RECV_F3<0"):
        runtime_of(Net(), edited(program_of("gpipe"), 1, last_first))


def test_ranks_that_wait_for_each_other_are_refused() -> None:
    """Both ranks receive before they send."""
    hidden = Port("hidden", Spec((), "float32", True), targets=(1,))
    back = Port("back", Spec((), "float32", True), targets=(2,))
    plans = (
        StagePlan(0, (), (hidden,)),
        StagePlan(1, (Port("hidden", hidden.spec, source=0),), (back,)),
        StagePlan(2, (Port("back", back.spec, source=1),), (Port("loss", hidden.spec),)),
        StagePlan(3, (), ()),
    )
    f = [Instruction("FORWARD", stage, 0) for stage in range(3)]
    rows = (
        (Instruction("RECV_F", 2, 0, 1, ("back",)), f[0], Instruction("SEND_F", 0, 0, 1, ("hidden",)), f[2]),
        (Instruction("RECV_F", 1, 0, 0, ("hidden",)), f[1], Instruction("SEND_F", 1, 0, 2, ("back",))),
    )
    program = Program("hand", Shape(4, 2, 1, (0, 1, 0, 1)), rows)
    with pytest.raises(ProgramError, match="wait for each other: rank 0 at 2RECV_F0<1, rank 1 at 1RECV_F0<0"):
        LocalRuntime(program, dict.fromkeys(range(4), nn.Module()), plans, loss="loss")


def test_missing_stages_plans_and_losses_are_named() -> None:
    model, program = Net(), program_of()
    with pytest.raises(ProgramError, match=r"rank 2 runs stage 2, but was given stages \[0, 1, 3\]"):
        LocalRuntime(program, dict.fromkeys((0, 1, 3), model), PLANS, loss="loss")
    with pytest.raises(ProgramError, match=r"plans for stages \[0, 1\], but the program has stages 0 to 3"):
        LocalRuntime(program, stages_of(model), PLANS[:2], loss="loss")
    with pytest.raises(ProgramError, match=r"stages \[\] give 'lost'; one stage must"):
        LocalRuntime(program, stages_of(model), PLANS, loss="lost")


@pytest.mark.parametrize(("schedule", "ranks"), [("gpipe", 4), ("zb-h1", 4), ("interleaved-1f1b", 2)])
def test_one_microbatch_is_alive_at_a_time(schedule: str, ranks: int) -> None:
    model = Net()
    runtime = runtime_of(model, program_of(schedule, ranks, 4))
    alive, most = 0, 0

    class Held(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            nonlocal alive
            alive -= 1
            return gradient

    model.layers[0].register_forward_hook(lambda module, args, out: Held.apply(out))
    runtime.step(batch_of(4))
    assert (alive, most) == (0, 1)
    ran: list[Any] = []
    runtime.step(batch_of(4), ran)
    assert most > 1, "a step that is watched runs as its ranks would"
