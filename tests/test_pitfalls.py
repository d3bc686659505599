"""What goes wrong when a model is captured: one small model for each pitfall.

Each is exact with its remedy, or refused by name. What is changed in place has a file of its own (test_in_place).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipecompile.errors import CaptureError, RuntimeFault
from tests.zoo.harness import compiled, run

WIDTH = 16


class Net(nn.Module):
    """Six linear layers; subclasses say what happens between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = self.between(torch.tanh(layer(x)), index)
        return x.square().mean()

    def between(self, x: Tensor, index: int) -> Tensor:
        return x


class TuplesAtCuts(Net):
    def between(self, x: Tensor, index: int) -> Tensor:
        left, right = x.chunk(2, dim=1)
        return torch.cat([right * 2, left], dim=1)


class ReturnsItsInput(Net):
    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.ModuleList([nn.Identity(), nn.Dropout(0.0)])

    def between(self, x: Tensor, index: int) -> Tensor:
        return (
            self.nothing[index % 2](x).contiguous().to(torch.float32).t().contiguous().view(4, -1).view(WIDTH, -1).t()
        )


class CastToItsOwnType(Net):
    """As the norms of language models: torch gives the argument itself, which is read outside again."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x.to(torch.float32)

    def __init__(self) -> None:
        super().__init__()
        self.casts = nn.ModuleList(self.Cast() for _ in range(6))

    def between(self, x: Tensor, index: int) -> Tensor:
        return x + self.casts[index](x)


class NoneOutput(Net):
    """A result is None, one is given twice, and one is the module's own input."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
            y = self.linear(x)
            return y, None, y, x

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(self.Pair() for _ in range(6))

    def between(self, x: Tensor, index: int) -> Tensor:
        first, _, second, same = self.pairs[index](x)
        return first + second + same


class ChangesAResult(Net):
    """The dict that a module gives is changed by its caller, as vision-language models of transformers do."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.linear(x)
            return {"pooled": y.sin(), "hidden": y.cos()}

    def __init__(self) -> None:
        super().__init__()
        self.twos = nn.ModuleList(self.Two() for _ in range(6))

    def between(self, x: Tensor, index: int) -> Tensor:
        given = self.twos[index](x)
        pooled = given.pop("pooled")
        given["pooled"] = [pooled * 2, pooled] if index == 2 else pooled
        return given["hidden"] + 3 * pooled


class Regions(Net):
    def between(self, x: Tensor, index: int) -> Tensor:
        with torch.no_grad():
            scale = x.abs().mean() + 1
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=index % 2 == 0):
            y = x @ self.layers[index].weight
        return y.float() / scale


class TwoKinds(Net):
    """One module, called with two kinds of argument."""

    class Kind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, kind: str) -> Tensor:
            return torch.tanh(self.linear(x)) if kind == "odd" else self.linear(x) * 0.5

    def __init__(self) -> None:
        super().__init__()
        self.kind = self.Kind()

    def between(self, x: Tensor, index: int) -> Tensor:
        return self.kind(x, "odd" if index % 2 else "even")


class OddNames(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"in-1": nn.Linear(WIDTH, WIDTH), "class": nn.Linear(WIDTH, WIDTH)})
        self.register_parameter('"; import os', nn.Parameter(torch.ones(WIDTH)))
        self.register_buffer("/x'", torch.full((WIDTH,), 0.5))

    def between(self, x: Tensor, index: int) -> Tensor:
        x = self.blocks["in-1" if index < 3 else "class"](x)
        return x * getattr(self, '"; import os') + getattr(self, "/x'")


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x * 0.1


class Heavy(nn.Module):
    """More than a stage's share of the work, so that it is opened unless it must stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.inside:
            x = self.then(linear(x))
        return x

    def then(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class WithHeavy(Net):
    heavy: type[Heavy] = Heavy

    def __init__(self) -> None:
        super().__init__()
        self.middle = self.heavy()

    def between(self, x: Tensor, index: int) -> Tensor:
        return self.middle(x) if index == 2 else x


class LeakedByHook(Net):
    """A hook takes a value from the middle of a module that is too small to be opened for balance; the loss reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(6))
        self.seen: list[Tensor] = []
        self.pairs[2][0].register_forward_hook(self.note)

    def note(self, module: nn.Module, args: Any, result: Tensor) -> None:
        self.seen.append(result)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.clear()
        for pair in self.pairs:
            x = pair(x)
        loss = x.square().mean() + self.seen[0].abs().mean()
        self.seen.clear()
        return loss


class CustomInModules(WithHeavy):
    """A custom autograd function inside of a module that can stay whole."""

    class heavy(Heavy):
        def then(self, x: Tensor) -> Tensor:
            return Square.apply(torch.tanh(x))


class Checkpointed(Net):
    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.layers[2].register_forward_pre_hook(self.note)

    def note(self, module: nn.Module, args: Any) -> None:
        self.count += 1

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0 * self.layers[0].weight.sum()
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x.square().mean()


class ReentrantCheckpointed(Checkpointed):
    reentrant = True


class ReplacedBuffer(WithHeavy):
    """A buffer that is another tensor after each call; its module must be called as a whole."""

    class heavy(Heavy):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.ones(WIDTH))

        def then(self, x: Tensor) -> Tensor:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
            return x * self.mean


class MaskWhenExporting(Net):
    """As in transformers: a mask that eager mode leaves to the attention is built where the model is exported."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            x = self.project(x)
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask, is_causal=mask is None)

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleList(self.Attention() for _ in range(6))

    def between(self, x: Tensor, index: int) -> Tensor:
        rows = x[:, None]
        mask = torch.ones(1, 1, dtype=torch.bool).tril() if torch.compiler.is_exporting() else None
        return self.attention[index](rows, mask=mask)[:, 0]


class FailsWhenExported(Net):
    """As in transformers: a mask is only made in eager mode, and needed in both."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None and not torch.compiler.is_compiling():
            mask = torch.ones(x.shape)
        return super().forward(x * mask[:, :1])


class ReadsOnlyTheType(Net):
    """A table that is given activations, but takes no more than their dtype from them."""

    class Table(nn.Module):
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            return (positions[:, None] * torch.arange(WIDTH, device=x.device)).cos().to(x.dtype)

    def __init__(self) -> None:
        super().__init__()
        self.table = self.Table()

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        table = self.table(x, torch.arange(x.shape[0]))
        for layer in self.layers:
            x = torch.tanh(layer(x)) * table
        return x.square().mean()


class NoiseForAll(Net):
    """Random numbers without a gradient that every layer reads: drawn once, never again by each reader."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape)
        for layer in self.layers:
            x = torch.tanh(layer(x + noise))
        return x.square().mean()


class OddOperations(Net):
    """Operations whose arguments have no form as a method."""

    def between(self, x: Tensor, index: int) -> Tensor:
        weight = self.layers[index].weight.reshape(4, 4, WIDTH).flatten(0, 1)
        return (x.to(torch.float64, memory_format=torch.contiguous_format) @ weight.double()).float()


EXACT = [
    TuplesAtCuts, CastToItsOwnType, ReturnsItsInput, NoneOutput, ChangesAResult, Regions, LeakedByHook, TwoKinds, OddNames, CustomInModules, Checkpointed,
    ReentrantCheckpointed, ReplacedBuffer, MaskWhenExporting, ReadsOnlyTheType, NoiseForAll, OddOperations,
    FailsWhenExported,
]  # fmt: skip


def case(make: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Tensor], None]:
    torch.manual_seed(0)
    return make(), {"x": torch.randn(8, WIDTH)}, None


@pytest.mark.parametrize("make", EXACT, ids=lambda make: make.__name__)
def test_exact(make: Callable[[], nn.Module]) -> None:
    row = run(make.__name__, case(make), 4, 4, "1f1b")
    assert row.ok, row


def sources(make: Callable[[], nn.Module]) -> str:
    pipe = compiled(case(make), 3, 3, "1f1b")
    return "".join(pipe.source(stage) for stage in range(3))


def test_a_mask_that_only_export_makes_is_not_passed() -> None:
    assert "mask" not in sources(MaskWhenExporting)
    assert "tril" not in sources(MaskWhenExporting)


def test_a_table_that_reads_only_a_type_is_made_by_each_stage() -> None:
    plan = compiled(case(ReadsOnlyTheType), 3, 3, "1f1b").plan
    assert len(plan.transfers) == 2, "one value at each cut"
    assert sources(ReadsOnlyTheType).count("cos()") == 2, "the first stage does not read it"


def test_a_cast_that_gives_its_argument_leaves_the_call_closed() -> None:
    assert ".weight" not in sources(CastToItsOwnType)


def test_random_numbers_are_drawn_once() -> None:
    assert sources(NoiseForAll).count("aten.randn") == 1


class ReplacedInTheModel(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(WIDTH))

    def between(self, x: Tensor, index: int) -> Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return x * self.mean


@pytest.mark.parametrize("make", [Checkpointed, ReentrantCheckpointed])
def test_a_checkpointed_layer_is_run_again_in_the_backward(make: type[Checkpointed]) -> None:
    model, batch, loss = case(make)
    pipe = compiled((model, batch, loss), 3, 3, "1f1b")
    before = model.count
    pipe.step(batch)
    assert model.count - before == 2 * pipe.plan.microbatches
    saved = sum("checkpoint(checkpointed, use_reentrant=False)" in pipe.source(stage) for stage in range(3))
    assert saved == 3


class CheckpointOptions(Checkpointed):
    """Blocks alike, so that all but the first are repetitions of it, each checkpointed with options."""

    options: dict[str, Any] = {"preserve_rng_state": False, "determinism_check": "none"}

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0 * self.layers[0].weight.sum()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, **self.options)
        return x.square().mean()


def test_checkpoint_options_and_regions_are_kept_apart() -> None:
    case_ = case(CheckpointOptions)
    row = run("options", case_, 3, 3, "1f1b")
    assert row.ok, row
    pipe = compiled(case_, 3, 3, "1f1b")
    written = 'checkpoint(checkpointed, use_reentrant=False, preserve_rng_state=False, determinism_check="none")'
    assert sum(pipe.source(stage).count(written) for stage in range(3)) == 6, "one region for each block"


class CheckpointContext(CheckpointOptions):
    options = {"context_fn": lambda: (contextlib.nullcontext(), contextlib.nullcontext())}


class CustomInTheModel(Net):
    def between(self, x: Tensor, index: int) -> Tensor:
        return Square.apply(x)


class HookInTheModel(Net):
    def between(self, x: Tensor, index: int) -> Tensor:
        x.register_hook(lambda gradient: gradient * 2)
        return x


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (CustomInTheModel, "custom autograd function Square"),
        (HookInTheModel, "registers a hook on a tensor"),
        (CheckpointContext, "checkpoints activations with a context_fn"),
        (ReplacedInTheModel, "replaces its buffer mean instead of changing it in place"),
    ],
)
def test_refused_by_name(make: Callable[[], nn.Module], why: str) -> None:
    model, batch, loss = case(make)
    with pytest.raises(CaptureError, match=why) as caught:
        compiled((copy.deepcopy(model), batch, loss), 3, 3, "1f1b")
    assert "the model's own forward cannot be split" in str(caught.value)
    assert "move that code into a module of its own" in str(caught.value)


class AsksForAValue(Net):
    """Control flow that depends on the batch: compiled for the answer, which every step checks."""

    def forward(self, x: Tensor, flag: Tensor) -> Tensor:
        scale = 2.0 if flag.sum() > 0 else 0.5
        for layer in self.layers:
            x = torch.tanh(layer(x)) * scale
        return x.square().mean()


def asking() -> tuple[nn.Module, dict[str, Tensor], None]:
    torch.manual_seed(0)
    return AsksForAValue(), {"x": torch.randn(8, WIDTH), "flag": torch.ones(8)}, None


def test_a_decision_about_the_batch_is_exact_while_it_holds() -> None:
    row = run("asking", asking(), 3, 3, "1f1b")
    assert row.ok, row


def test_a_decision_that_changes_is_refused_by_line() -> None:
    case = asking()
    pipe = compiled(case, 3, 3, "1f1b")
    with pytest.raises(
        RuntimeFault, match=r"test_pitfalls.py, line \d+ asks for a value that is now False, but was True"
    ):
        pipe.step(case[1] | {"flag": -torch.ones(8)})


class InnerCheckpointContext(WithHeavy):
    """A context_fn that stays, because its module can be called as a whole."""

    count = 0

    class heavy(Heavy):
        def contexts(self) -> tuple[Any, Any]:
            InnerCheckpointContext.count += 1
            return contextlib.nullcontext(), contextlib.nullcontext()

        def forward(self, x: Tensor) -> Tensor:
            for linear in self.inside:
                x = checkpoint(linear, x, use_reentrant=False, context_fn=self.contexts)
            return x


def test_a_context_function_of_a_checkpoint_is_kept() -> None:
    case_ = case(InnerCheckpointContext)
    pipe = compiled(case_, 3, 3, "1f1b")
    before = InnerCheckpointContext.count
    pipe.step(case_[1])
    assert InnerCheckpointContext.count - before == 6 * 4
    row = run("context", case_, 3, 3, "1f1b")
    assert row.ok, row
