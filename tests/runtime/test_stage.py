"""A stage holds the model's own objects under the model's own names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipecompile.errors import BuildError
from pipecompile.ir import StagePlan
from pipecompile.runtime import Stage, make_stage


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(2, 2)
        self.register_buffer("mask", torch.ones(2))
        self.register_buffer("table", torch.ones(2), persistent=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(3, 2)
        self.h = nn.ModuleList(Block() for _ in range(4))
        self.scales = nn.ParameterList(torch.ones(2) for _ in range(3))
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.wte.weight
        self.plain = torch.ones(1)


def plan(**takes: tuple[str, ...]) -> StagePlan:
    return StagePlan(0, (), (), **takes)


def test_members_are_the_models_own_under_their_names() -> None:
    model = Model()
    stage = Stage(model, plan(modules=("h.3", "head"), parameters=("wte.weight", "scales.2"), buffers=("h.1.mask",)))
    assert stage.h[3] is model.h[3]
    assert stage.get_submodule("h.3.lin") is model.h[3].lin
    assert stage.wte.weight is model.wte.weight
    assert stage.get_parameter("wte.weight") is model.wte.weight
    assert stage.scales[2] is model.scales[2]
    assert stage.h[1].mask is model.h[1].mask
    assert stage["head"] is model.head
    whole = model.state_dict()
    assert set(stage.state_dict()) == {
        key for key in whole if key.startswith("h.3.") or key in ("head.weight", "wte.weight", "scales.2", "h.1.mask")
    }
    assert stage.state_dict()["wte.weight"].data_ptr() == whole["wte.weight"].data_ptr()


def test_buffers_that_state_dict_leaves_out_stay_out() -> None:
    model = Model()
    stage = Stage(model, plan(buffers=("h.0.table", "plain")))
    assert stage.h[0].table is model.h[0].table
    assert stage.plain is model.plain
    assert stage.state_dict() == {}


def test_a_module_taken_whole_covers_what_is_below_it() -> None:
    model = Model()
    stage = Stage(model, plan(modules=("h.0.lin", "h.0"), parameters=("h.0.lin.weight",), buffers=("h.0.mask",)))
    assert stage.h[0] is model.h[0]
    assert stage.h[0].lin is model.h[0].lin


def test_two_stages_share_a_module() -> None:
    model = Model()
    first, last = Stage(model, plan(modules=("h.0",))), Stage(model, plan(modules=("h.0",)))
    assert first.h[0] is last.h[0]


def test_training_mode_is_the_models() -> None:
    model = Model().eval()
    stage = Stage(model, plan(parameters=("wte.weight",)))
    assert not stage.training
    assert not stage.wte.training


@pytest.mark.parametrize("name", ['"; import os', "in-1", "class", "members", "_take", "über"])
def test_any_name_works(name: str) -> None:
    model = nn.Module()
    model.register_module(name, nn.Linear(2, 2))
    inner = nn.Module()
    inner.register_parameter(name, nn.Parameter(torch.ones(1)))
    inner.register_buffer(f"{name} buffer", torch.ones(1))
    model.register_module("inner", inner)
    takes = {"modules": (name,), "parameters": (f"inner.{name}",), "buffers": (f"inner.{name} buffer",)}
    stage = Stage(model, plan(**takes))
    assert stage[name] is getattr(model, name)
    assert stage.get_submodule(name) is getattr(model, name)
    assert stage.inner[name] is getattr(inner, name)
    assert set(stage.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize(
    ("takes", "what"),
    [
        ({"modules": ("h.9",)}, "module 'h.9'"),
        ({"parameters": ("nowhere.weight",)}, "parameter 'nowhere.weight'"),
        ({"buffers": ("h.0.lin",)}, "buffer 'h.0.lin'"),
    ],
)
def test_what_the_model_lacks_is_named(takes: dict[str, tuple[str, ...]], what: str) -> None:
    with pytest.raises(BuildError, match=f"the model Model has no {what}.*load the build with the model"):
        Stage(Model(), plan(**takes))


def test_a_container_names_what_it_has() -> None:
    stage = Stage(Model(), plan(modules=("h.2",)))
    with pytest.raises(KeyError, match="holds no 1 here, it has '2'; take it"):
        stage.h[1]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("class Stage0(Stage", r"cannot be run: SyntaxError: .*; compile again"),
        ("from nowhere import Stage", "cannot be run: ModuleNotFoundError: No module named 'nowhere'; compile again"),
        ("1 / 0", "cannot be run: ZeroDivisionError: division by zero; compile again"),
        ("class Stage1: ...", r"defines no Stage0\(Stage\); compile again"),
        ("Stage0 = print", r"defines no Stage0\(Stage\)"),
        ("class Stage0: ...", r"defines no Stage0\(Stage\)"),
    ],
)
def test_a_source_that_defines_no_stage_is_refused(source: str, problem: str) -> None:
    with pytest.raises(BuildError, match=rf"stages/stage_0\.py {problem}"):
        make_stage(source, Model(), StagePlan(0, (), ()))
