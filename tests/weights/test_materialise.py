"""A part of a model has the values of the whole one, bit by bit, and the rest has no memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipecompile.errors import BuildError, CheckpointError
from pipecompile.weights import hollow
from pipecompile.weights.checkpoint import open_checkpoint
from pipecompile.weights.layout import everything, stored
from pipecompile.weights.materialise import materialise
from pipecompile.weights.tensor_file import write_tensors
from tests.models import MODELS


@pytest.fixture(autouse=True)
def everything_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models shall be hollow too."""
    monkeypatch.setattr(hollow, "SMALL_BYTES", 64)


class Tricky(nn.Module):
    """Views, copies, results of decompositions, half precision, random buffers, and two kinds of shared tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16, padding_idx=3)
        self.linear = nn.Linear(16, 16)
        nn.init.orthogonal_(self.linear.weight)
        self.copy = nn.Linear(16, 16)
        self.copy.load_state_dict(self.linear.state_dict())
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.lstm = nn.LSTM(16, 16, 2)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.brief = nn.Linear(16, 16).to(torch.bfloat16)
        nn.init.trunc_normal_(self.brief.weight[4:, ::2])
        self.register_buffer("noise", torch.rand(40) * 2, persistent=False)
        self.register_buffer("angles", 1 / 10000 ** (torch.arange(0, 64, 2) / 64), persistent=False)
        self.scale = nn.Parameter(self.linear.weight.detach().std(0) + random.random())
        self.plain = torch.randn(30)


def tricky() -> nn.Module:
    return Tricky()


MAKERS: dict[str, Callable[[], nn.Module]] = {name: lambda make=make: make()[0] for name, make in MODELS.items()}
MAKERS["tricky"] = tricky


def begin() -> None:
    torch.manual_seed(3)
    random.seed(3)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.filterwarnings("error:this rank makes the whole model")
def test_values_are_those_of_the_whole_model(name: str) -> None:
    begin()
    whole = dict(everything(MAKERS[name]()))
    after = torch.get_rng_state(), random.getstate()
    for part in range(3):
        owned = list(whole)[part::3]
        begin()
        model = materialise(MAKERS[name], owned)
        assert torch.equal(torch.get_rng_state(), after[0])
        assert random.getstate() == after[1]
        got = dict(everything(model))
        assert list(got) == list(whole)
        keep = {id(whole[name]) for name in owned}
        for fqn, tensor in got.items():
            assert tensor.is_meta == (id(whole[fqn]) not in keep), fqn
            assert (tensor.shape, tensor.dtype, tensor.requires_grad) == (
                whole[fqn].shape,
                whole[fqn].dtype,
                whole[fqn].requires_grad,
            )
            assert tensor.is_meta or torch.equal(tensor, whole[fqn]), fqn
        assert len({id(t) for t in got.values()}) == len({id(t) for t in whole.values()}), "tied tensors stay tied"


def test_tensors_that_are_no_buffers_are_kept() -> None:
    begin()
    expected = tricky().plain
    begin()
    assert torch.equal(materialise(tricky, []).plain, expected)


@pytest.mark.parametrize("one_name", [False, True])
def test_values_of_a_checkpoint(tmp_path: Path, one_name: bool) -> None:
    begin()
    trained = tricky()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 1
    state = dict(trained.state_dict())
    if one_name:
        del state["embedding.weight"]
    write_tensors(tmp_path / "x.safetensors", state)
    expected = dict(everything(trained))
    for part in range(2):
        owned = list(expected)[part::2]
        begin()
        got = dict(everything(materialise(tricky, owned, open_checkpoint(tmp_path / "x.safetensors"))))
        for fqn in owned:
            assert torch.equal(got[fqn], expected[fqn]), fqn
        assert sum(tensor.is_meta for tensor in got.values()) > len(got) // 3


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    state = dict(stored(tricky()))
    write_tensors(tmp_path / "x.safetensors", {name: t for name, t in state.items() if name != "linear.bias"})
    with pytest.raises(CheckpointError, match=r"lacks 'linear.bias', which the model has"):
        materialise(tricky, [], open_checkpoint(tmp_path / "x.safetensors"))
    write_tensors(tmp_path / "x.safetensors", state | {"linear.bias": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"tensor 'linear.bias' .* has shape \[3\], but the model's has \[16\]"):
        materialise(tricky, ["linear.bias"], open_checkpoint(tmp_path / "x.safetensors"))


class Looks(nn.Module):
    """Looks at the values of a large tensor in one of several ways."""

    def __init__(self, how: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(100))
        self.b = nn.Parameter(torch.ones(100) * (2 if how(self.a.detach()) else 3))


CALLS = iter(range(1000))
LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda t: t.sum().item() > 0,
    "numpy": lambda t: t.numpy().sum() > 0,
    "list": lambda t: sum(t.tolist()) > 0,
    "nonzero": lambda t: len(t.nonzero()) > 50,
    "other sizes": lambda t: torch.rand(100 + next(CALLS)).shape,
    "more tensors": lambda t: [torch.rand(100) for _ in range(next(CALLS) % 2)],
    "fewer tensors": lambda t: [torch.rand(100) for _ in range(-next(CALLS) + 1000)],
}


@pytest.mark.parametrize("how", LOOKS)
def test_an_initialiser_that_cannot_be_run_in_parts_is_run_whole(how: str) -> None:
    begin()
    expected = Looks(LOOKS[how]).b
    begin()
    with pytest.warns(UserWarning, match="this rank makes the whole model before it keeps its part, because"):
        model = materialise(lambda: Looks(LOOKS[how]), ["b"])
    assert torch.equal(model.b, expected) or how.startswith(("more", "fewer"))
    assert model.a.is_meta


@lru_cache
def table() -> Tensor:
    return torch.rand(100)


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(table() * 2)


def test_a_cache_outside_of_the_model_is_refused() -> None:
    with pytest.raises(
        BuildError, match=r"keeps 400 bytes of tensors outside of the model, in a cache perhaps.*--local"
    ):
        materialise(Cached, [])


def test_copies_of_buffers_stay_apart_or_together() -> None:
    import copy

    def make() -> nn.Module:
        inner = nn.Module()
        inner.register_buffer("x", torch.rand(50))
        inner.register_buffer("y", inner.x)
        return nn.ModuleList([inner, copy.deepcopy(inner)])

    begin()
    expected = make()
    begin()
    model = materialise(make, ["1.x"])
    assert model[1].x is model[1].y
    assert torch.equal(model[1].x, expected[1].x)
    assert model[0].x.is_meta
