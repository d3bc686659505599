"""Models that a trace cannot follow: named whole, with a remedy that helps when it is copied."""

from __future__ import annotations

import ast
import copy
import re
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipecompile
from pipecompile import Pipe
from pipecompile.capture import transforms
from pipecompile.errors import CaptureError, RuntimeFault
from tests.zoo.harness import compiled, run

WIDTH = 16


class Net(nn.Module):
    """Six blocks: a linear layer and the parts that ``kinds`` make."""

    def __init__(self, *kinds: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = [{"linear": nn.Linear(WIDTH, WIDTH)} | {kind.__name__: kind() for kind in kinds} for _ in range(6)]
        self.blocks = nn.ModuleList(nn.ModuleDict(part) for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            for part in block.values():
                x = torch.tanh(part(x))
        return x.square().mean()


class Numpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.from_numpy(numpy.tanh(x.detach().numpy().mean(1, keepdims=True)))


class Rows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        rows = (x.sum(1) > 0).nonzero().flatten()
        return x.index_add(0, rows, x[rows]) if rows.numel() > 1 else x


class Split(nn.Module):
    """Groups of rows by an argmax: their sizes are asked for as a list."""

    def forward(self, x: Tensor) -> Tensor:
        choice = x[:, :3].argmax(1)
        sizes = F.one_hot(choice, 3).sum(0).tolist()
        order = choice.argsort(stable=True)
        parts = [part * (k + 1) for k, part in enumerate(x[order].split(sizes))]
        return torch.cat(parts)[order.argsort()]


def checked(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Questions that lead to nothing but an error."""
    loss = model(batch["x"])
    assert loss < 100, "too large"
    if loss < 0:
        raise ValueError("too small")
    return loss - torch.distributions.Normal(loss, 1.0).log_prob(batch["x"]).mean()


class Converted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.inner = self.inner.to(torch.float32)
        return self.inner(x)


class Kept(nn.Module):
    """A projection that is no parameter and no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = torch.randn(WIDTH, WIDTH) / 4

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.projection)


class Listed(nn.Module):
    """Layers in a plain list, known by their parameters only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
        self.known = nn.ParameterList(p for layer in self.layers for p in layer.parameters())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def case(*kinds: Any) -> tuple[nn.Module, dict[str, Tensor], None]:
    return Net(*kinds), {"x": torch.randn(8, WIDTH)}, None


@pytest.mark.parametrize("kind", [Split, Converted, Kept, Listed])
def test_exact(kind: Any) -> None:
    row = run(kind.__name__, case(kind), 4, 4, "1f1b")
    assert row.ok, row


def test_questions_that_only_raise_are_compiled_in() -> None:
    model, batch, _ = case()
    row = run("checked", (model, batch, checked), 4, 4, "1f1b")
    assert row.ok, row


def test_what_stands_in_the_way_is_named_whole_and_the_remedy_helps(capfd: pytest.CaptureFixture[str]) -> None:
    """Two kinds of module in every block; a trace that fails at the first of twelve."""
    model, batch, _ = case(Numpy, Rows)
    with pytest.raises(CaptureError, match=rf"blocks\.0\.Numpy cannot be traced \({__file__}, line") as caught:
        pipecompile.compile(model, batch, stages=3, microbatches=4, costs="estimate")
    assert capfd.readouterr() == ("", ""), "torch tells nothing besides"
    (named,) = re.findall(r"pass opaque=(\[.*?\])", str(caught.value))
    opaque = ast.literal_eval(named)
    assert opaque == ["blocks.*.Numpy", "blocks.*.Rows"]
    pipe = pipecompile.compile(model, batch, stages=3, microbatches=4, costs="estimate", opaque=opaque)
    assert torch.equal(pipe.step(batch), pipe.reference(Net(Numpy, Rows), batch))


def test_a_remedy_is_not_named_alone_where_more_is_needed() -> None:
    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            return Numpy.forward(self, super().forward(x)[None, None]).mean()

    with pytest.raises(
        CaptureError, match=r"own forward or the loss function cannot be traced .* into a module .*besides pass opaque"
    ):
        compiled((Own(Numpy), {"x": torch.randn(8, WIDTH)}, None), 3, 3, "1f1b")


class Data(nn.Module):
    """A running mean that is assigned behind autograd's back."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.data.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x - self.mean


class Shared(Net):
    """One such module in the first and the last block."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = Data()

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.blocks[0]["linear"](x))
        for block in self.blocks:
            x = torch.tanh(block["linear"](x))
        return self.shared(x).square().mean()


def test_a_buffer_that_is_assigned_through_data_stays_in_one_stage() -> None:
    batch = {"x": torch.randn(8, WIDTH)}
    row = run("shared", (Shared(), batch, None), 2, 2, "1f1b")
    assert row.ok, row
    with pytest.raises(pipecompile.errors.PartitionError, match=r"buffer 'shared\.mean' is changed and read by"):
        pipecompile.compile(Shared(), batch, stages=6, microbatches=4, costs="estimate")


class Through(Net):
    """What is written through .data, in the model's own forward: a buffer anew, an activation that keeps its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0]["linear"](x)
        x.data = x.data.clamp(-0.5, 0.5)
        self.mean.data = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return super().forward(x - self.mean)


def test_assignments_to_data_are_exact() -> None:
    row = run("through", (Through(), {"x": torch.randn(8, WIDTH)}, None), 4, 4, "1f1b")
    assert row.ok, row


class Growing(nn.Module):
    """Gives a buffer another size through .data."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.data = x.detach()[:1]
        return x - self.seen


def test_another_size_through_data_stays_in_its_module() -> None:
    class Own(Net):
        seen: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.seen.data = x.detach()[:1]
            return super().forward(x - self.seen)

    row = run("growing", case(Growing), 4, 4, "1f1b")
    assert row.ok, row
    _, batch, _ = case()
    own = Own()
    own.register_buffer("seen", torch.zeros(WIDTH))
    with pytest.raises(
        CaptureError, match=rf"gives \.data another size or dtype \({__file__}, line \d+: self\.seen\.data"
    ):
        compiled((own, batch, None), 3, 3, "1f1b")


class Decaying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.inner.weight.data.mul_(0.9)
        return self.inner(x)


class Replacing(nn.Module):
    """A codebook that is another parameter after each call."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(8, WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        found = self.codes[torch.cdist(x, self.codes).argmin(1)]
        self.codes = nn.Parameter(0.9 * self.codes + 0.1 * x.detach().mean(0), requires_grad=False)
        return x + (found - x).detach()


@pytest.mark.parametrize(("kind", "told"), [(Decaying, "inner.weight' is changed"), (Replacing, "codes' is replaced")])
def test_a_parameter_that_the_forward_changes_is_refused_by_name(kind: type[nn.Module], told: str) -> None:
    with pytest.raises(CaptureError, match=rf"{kind.__name__}\.{told} by the forward itself.*after optimizer\.step"):
        compiled(case(kind), 3, 3, "1f1b")


class Limited(Net):
    """An embedding that keeps its rows short, which it does again and again without another effect."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, WIDTH, max_norm=0.5)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return super().forward(x + self.embedding(tokens))


def test_an_embedding_of_limited_length_is_not_refused() -> None:
    batch = {"x": torch.randn(8, WIDTH), "tokens": torch.arange(8)}
    row = run("limited", (Limited(), batch, None), 4, 4, "1f1b")
    assert row.ok, row


class Queue(Net):
    """A ring buffer: where it is written follows a counter that every call moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(8, WIDTH))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        place = int(self.place)
        self.queue[place : place + len(x)] = x.detach()
        self.place[0] = (place + len(x)) % 8
        return super().forward(x + self.queue.mean(0))


def test_a_buffer_that_changes_is_no_answer_to_compile_in() -> None:
    with pytest.raises(CaptureError, match=r"decides by a value that parameters have a part in .*place = int"):
        compiled((Queue(), {"x": torch.randn(8, WIDTH)}, None), 3, 3, "1f1b")


class Lengths(Net):
    """Sizes that the batch tells, as a list."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        first, second = x.split(lengths.sum(0).tolist(), dim=1)
        return super().forward(torch.cat([2 * first, second], 1))


def test_a_list_that_the_batch_tells_is_compiled_in_and_checked() -> None:
    model, batch = Lengths(), {"x": torch.randn(8, WIDTH), "lengths": torch.tensor([[3, 5]] * 8)}
    row = run("lengths", (model, batch, None), 3, 3, "1f1b")
    assert row.ok, row
    pipe = compiled((model, batch, None), 3, 3, "1f1b")
    with pytest.raises(RuntimeFault, match="asks for a value that is now 8, but was 6 when"):
        pipe.step(batch | {"lengths": torch.tensor([[4, 4]] * 8)})


def test_a_scripted_module_is_refused_by_name() -> None:
    model, batch, _ = case()
    model.blocks[1]["linear"] = torch.jit.trace(model.blocks[1]["linear"], batch["x"])
    with pytest.raises(CaptureError, match=r"blocks\.1\.linear is a TorchScript module.* give the module that"):
        compiled((model, batch, None), 3, 3, "1f1b")


def test_lazy_modules_are_refused_until_they_have_seen_a_batch() -> None:
    """Each rank would make weights of its own."""

    def lazy() -> nn.Module:
        return nn.Sequential(nn.LazyLinear(WIDTH), nn.LazyBatchNorm1d(), nn.LazyLinear(WIDTH))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]).square().mean()

    model, batch = lazy(), {"x": torch.randn(8, WIDTH)}
    with pytest.raises(CaptureError, match=r"0\.weight and 7 more of lazy modules.* run the model once first"):
        compiled((model, batch, loss), 3, 3, "1f1b")
    with torch.no_grad():
        loss(model, batch)
    pipe = compiled((model, batch, loss), 3, 3, "1f1b")
    assert torch.equal(pipe.step(batch), pipe.reference(copy.deepcopy(model), batch))
    with pytest.raises(CaptureError, match="run the model once first"):
        Pipe(pipe._files, lazy(), loss)


class Recurrent(nn.Module):
    """Packs sequences of different lengths for an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x[:, :1] > 0).flatten().long() + WIDTH - 1
        packed = nn.utils.rnn.pack_padded_sequence(x[..., None], lengths, batch_first=True, enforce_sorted=False)
        found, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=WIDTH)
        return found.mean(-1)


def test_packed_sequences_stay_in_the_module_that_packs_them() -> None:
    model, batch, _ = case(Recurrent)
    with pytest.raises(CaptureError, match=r"pass opaque=\['blocks\.\*\.Recurrent'\]"):
        compiled((model, batch, None), 3, 3, "1f1b")
    row = run("packed", (model, batch, None), 3, 3, "1f1b", ("blocks.*.Recurrent",))
    assert row.ok, row


def selected(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    mask = batch["x"] > -1
    return F.l1_loss(batch["x"].masked_select(mask) * model(batch["x"]), batch["y"].masked_select(mask))


def test_one_mask_selects_one_number() -> None:
    model, batch, _ = case()
    row = run("selected", (model, batch | {"y": torch.randn(8, WIDTH)}, selected), 4, 4, "1f1b")
    assert row.ok, row


class Grid(Net):
    """Heights and widths that the batch tells, as a list of lists."""

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        return super().forward(torch.cat([x[:, : h * w] / h for h, w in sizes[:1].tolist()], 1))


def test_lists_of_lists_that_the_batch_tells() -> None:
    model, batch = Grid(), {"x": torch.randn(8, WIDTH), "sizes": torch.tensor([[4, 4]] * 8)}
    row = run("grid", (model, batch, None), 3, 3, "1f1b")
    assert row.ok, row


class Caching(nn.Module):
    """Takes what the last call left in a list, and leaves something there."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cache: list[Any]) -> Tensor:
        x = self.linear(x) if cache[0] is None else self.linear(x) + cache[0]
        cache[0] = x
        return x


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Caching() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        cache = [None]
        for layer in self.layers:
            x = torch.tanh(layer(x, cache))
        return x.square().mean()


def test_a_list_that_modules_change() -> None:
    row = run("cached", (Cached(), {"x": torch.randn(8, WIDTH)}, None), 4, 4, "1f1b")
    assert row.ok, row


class Rowwise(nn.Module):
    """Parts of its own, called for one row at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: torch.tanh(self.inner(row)))(x)


class Derived(Rowwise):
    """The derivative of its parts."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.func.vmap(torch.func.grad(lambda row: torch.tanh(self.inner(row)).sum()))(x)


@pytest.mark.parametrize("kind", [Rowwise, Derived])
def test_a_module_that_transforms_functions_is_left_whole(kind: type[nn.Module]) -> None:
    row = run(kind.__name__, case(kind), 4, 4, "1f1b")
    assert row.ok, row
    assert not row.coupled, "a row's own dimensions are not the batch's"


def test_blocks_that_transform_functions_are_left_whole_at_once() -> None:
    model, batch, _ = case()
    model.blocks = nn.ModuleList(nn.ModuleDict({"part": Rowwise()}) for _ in range(4))
    notes = [note for note in compiled((model, batch, None), 3, 3, "1f1b").plan.notes if "torch.vmap" in note]
    assert len(notes) == 1
    assert re.match(rf"blocks\.\*\.part: left whole.*{__file__}, line \d+: return torch\.vmap", notes[0])


def test_without_torchs_private_place_no_transform_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert transforms.running() is None
    seen: list[int | None] = []
    torch.vmap(lambda row: seen.append(transforms.running()) or row)(torch.ones(2))
    monkeypatch.delattr(torch._C._functorch, "maybe_current_level")
    torch.vmap(lambda row: seen.append(transforms.running()) or row)(torch.ones(2))
    assert seen[0] is not None
    assert seen[1] is None


def test_a_transform_outside_of_modules_is_refused_by_line_and_the_remedy_helps() -> None:
    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.vmap(torch.tanh)(x)
            return super().forward(x)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return torch.vmap(torch.sin)(model(batch["x"])[None]).mean()

    model, batch, _ = case(Rowwise)  # where such a line is in a module of its own
    assert run("remedy", (model, batch, None), 3, 3, "1f1b").ok
    with pytest.raises(CaptureError, match=rf"own forward uses torch\.vmap .*{__file__}, line \d+: x = torch\.vmap"):
        compiled((Own(), batch, None), 3, 3, "1f1b")
    with pytest.raises(
        CaptureError, match=rf"the loss function uses torch\.vmap .*{__file__}, line \d+\), .* module of"
    ):
        compiled((case()[0], batch, loss), 3, 3, "1f1b")
