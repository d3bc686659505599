"""What a pipe saves loads into the unsplit model, and a killed writer loses nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import pipecompile
from benchmarks.kill_saves import kill
from pipecompile.errors import CheckpointError
from pipecompile.runtime import connect
from pipecompile.saving import Share, check_start, load_training, on_every_rank, save_checkpoint
from pipecompile.weights import folder, optimizer_state
from pipecompile.weights.checkpoint import INDEX, open_checkpoint
from pipecompile.weights.layout import Layout, everything
from tests.compiled import case, files
from tests.models import MODELS
from tests.runtime.processes import run
from tests.weights.killing import share


def compiled(name: str, stages: int = 2) -> tuple[nn.Module, pipecompile.Pipe]:
    model, _, loss = case(name)
    return model, pipecompile.Pipe(files(name, stages, stages, microbatches=4), model, loss)


def tiny() -> tuple[nn.Module, torch.optim.Optimizer, Share]:
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    return model, optimizer, share(model)


@pytest.mark.parametrize("name", ["gpt2", "t5", "cnn", "unet2d"])
def test_the_unsplit_model_loads_what_a_pipe_saves(tmp_path: Path, name: str) -> None:
    model, pipe = compiled(name)
    pipe.save_weights(tmp_path / "w")
    index = json.loads((tmp_path / "w" / INDEX).read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    state = {key: value for file in files for key, value in load_file(tmp_path / "w" / file).items()}
    fresh = MODELS[name]()[0]
    with torch.no_grad():
        for tensor in fresh.state_dict().values():
            tensor.fill_(7)
    fresh.load_state_dict(state, strict=True)
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


@pytest.mark.parametrize("name", ["gpt2", "t5", "llama"])
def test_from_pretrained_loads_it(tmp_path: Path, name: str) -> None:
    model, pipe = compiled(name)
    pipe.save_weights(tmp_path / "w")
    loaded, told = type(model).from_pretrained(tmp_path / "w", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
    save_checkpoint(pipe.share(), tmp_path / "ck", 3, optimizer)
    again = type(model).from_pretrained(tmp_path / "ck")
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_a_pipe_loads_what_it_saved(tmp_path: Path) -> None:
    model, pipe = compiled("gpt2")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pipe.save_weights(tmp_path / "w")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    pipe.load_weights(tmp_path / "w")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    pipe.save_weights(tmp_path / "w")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w"]
    _, wrong = compiled("mlp")
    with pytest.raises(CheckpointError, match=r"lacks 'layers.0.weight', .* and has 'transformer"):
        wrong.load_weights(tmp_path / "w")


def test_weights_replace_only_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, pipe = compiled("mlp")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        CheckpointError, match=r"also holds 'thesis.tex', which replacing it would delete; give another"
    ):
        pipe.save_weights(tmp_path)
    with pytest.raises(CheckpointError, match="is a file; give the weights a folder of their own"):
        pipe.save_weights(tmp_path / "thesis.tex")
    with pytest.raises(CheckpointError, match=r"thesis.tex.*cannot be written: .*; give another folder"):
        pipe.save_weights(tmp_path / "thesis.tex" / "w")
    pipe.save_weights(tmp_path / "w")
    monkeypatch.setattr(folder, "_exchange", lambda one, other: False)
    pipe.save_weights(tmp_path / "w")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex", "w"]


@pytest.mark.parametrize("name", ["../x", '"; import os', "a:b"])
def test_names_become_no_paths(tmp_path: Path, name: str) -> None:
    model = nn.Module()
    model.register_parameter(name.replace(".", ""), nn.Parameter(torch.rand(3)))
    model._parameters[name] = nn.Parameter(torch.rand(4))
    names = [fqn for fqn, _ in everything(model)]
    optimizer = torch.optim.AdamW(model.parameters())
    sum((p * p).sum() for p in model.parameters()).backward()
    optimizer.step()
    mine = Share(Layout.of(model), [names], {0: model}, 0, 1)
    save_checkpoint(mine, tmp_path / "ck", 1, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck"]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
    optimizer.state.clear()
    assert load_training(mine, folder.newest(tmp_path / "ck"), optimizer) == 1
    assert all(torch.equal(optimizer.state[p]["exp_avg"], m) for p, m in zip(model.parameters(), moments))
    into = torch.zeros(4)
    open_checkpoint(tmp_path / "ck").read([name], into)
    assert torch.equal(into, model._parameters[name])


def test_the_last_two_are_kept_and_the_newest_complete_one_is_read(tmp_path: Path) -> None:
    _, optimizer, mine = tiny()
    for step in (1, 2, 3):
        save_checkpoint(mine, tmp_path, step, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == [INDEX, "step-00000002", "step-00000003"]
    assert folder.newest(tmp_path).name == "step-00000003"
    assert folder.newest(tmp_path / "step-00000002").name == "step-00000002"
    shard = tmp_path / "step-00000003" / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert folder.newest(tmp_path).name == "step-00000002"
    with pytest.raises(
        CheckpointError, match=r"'.*step-00000003' is not complete: 'model-00002-.* bytes, expected \d+"
    ):
        folder.newest(tmp_path / "step-00000003")
    check_start(tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"has a checkpoint of step 2, but this run starts at step 0 .*--resume"):
        check_start(tmp_path, 0)
    save_checkpoint(mine, tmp_path, 3, optimizer)
    assert folder.newest(tmp_path).name == "step-00000003"
    for path in tmp_path.glob("step-*/training.json"):
        path.unlink()
    with pytest.raises(
        CheckpointError, match=r"has no complete checkpoint \(step-00000003: FileNotFound.*--save wrote"
    ):
        folder.newest(tmp_path)


def test_state_that_does_not_fit(tmp_path: Path) -> None:
    model, optimizer, mine = tiny()
    save_checkpoint(mine, tmp_path, 1, optimizer)
    place = folder.newest(tmp_path)
    with pytest.raises(CheckpointError, match=r"has the state of AdamW, but optimizer\(\) .* makes SGD; make the same"):
        load_training(mine, place, torch.optim.SGD(model.parameters(), lr=1))
    saved = optimizer_state.take(optimizer, mine.names())[1]
    del saved["parameters"]["0.weight"]
    with pytest.raises(CheckpointError, match=r"no optimizer state for parameter '0.weight'; make the same"):
        optimizer_state.give(optimizer, mine.names(), saved, {})
    saved = optimizer_state.take(optimizer, mine.names())[1]
    saved["groups"].append(saved["groups"][0] | {"lr": 0.25})
    saved["parameters"]["1.bias"]["group"] = 1
    with pytest.raises(
        CheckpointError, match=r"has lr=0.25 for parameter '1.bias' and 0.5 for '0.weight', .* one group"
    ):
        optimizer_state.give(optimizer, mine.names(), saved, {})
    optimizer.state[model[0].weight]["history"] = {1, 2}
    with pytest.raises(CheckpointError, match="the optimizer keeps 'history' as set, which cannot be saved; expected"):
        save_checkpoint(mine, tmp_path, 2, optimizer)
    (place / folder.STATE).write_text('{"format": "other", "version": 1}')
    with pytest.raises(CheckpointError, match="is 'other' of version 1, but this pipecompile reads"):
        load_training(mine, place, optimizer)
    (place / folder.STATE).write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot be read as JSON .*; resume from another one"):
        load_training(mine, place, optimizer)


def test_hyperparameters_and_random_state_come_back(tmp_path: Path) -> None:
    model, optimizer, mine = tiny()
    torch.manual_seed(5)
    save_checkpoint(mine, tmp_path, 1, optimizer)
    expected = torch.rand(3), random.random(), numpy.random.rand(3)
    other = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1), betas=(0.1, 0.2))
    load_training(mine, folder.newest(tmp_path), other)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    assert (numpy.random.rand(3) == expected[2]).all()
    assert float(other.param_groups[0]["lr"]) == 0.5
    assert other.param_groups[0]["betas"] == (0.9, 0.999)


def test_a_parameter_of_no_stage_is_not_in_a_checkpoint(tmp_path: Path) -> None:
    model, _, mine = tiny()
    temperature = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.AdamW([temperature, *model.parameters()], lr=0.5)
    save_checkpoint(mine, tmp_path, 1, optimizer)
    optimizer.param_groups[0]["lr"] = 0.1
    assert load_training(mine, folder.newest(tmp_path), optimizer) == 1
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("lost", ["random", "files", "step"])
def test_a_malformed_checkpoint(tmp_path: Path, lost: str) -> None:
    _, optimizer, mine = tiny()
    save_checkpoint(mine, tmp_path, 1, optimizer)
    place = folder.newest(tmp_path)
    state = json.loads((place / folder.STATE).read_text())
    del state[lost]
    (place / folder.STATE).write_text(json.dumps(state))
    with pytest.raises(
        CheckpointError, match=rf"step-00000001' is malformed \(KeyError: '{lost}'\); resume from anoth"
    ):
        load_training(mine, place, optimizer)
    (place / folder.STATE).write_text("[]")
    with pytest.raises(CheckpointError, match="is None of version None, but this pipecompile reads"):
        load_training(mine, place, optimizer)


def test_a_tensor_that_no_stage_holds(tmp_path: Path) -> None:
    _, optimizer, mine = tiny()
    partial = Share(mine.layout, mine.holds[:3], mine.stages, 0, 1)
    with pytest.raises(
        CheckpointError, match=r"no stage holds tensor '6.weight' of the model; compile the build again"
    ):
        save_checkpoint(partial, tmp_path, 1, optimizer)
    assert not list(tmp_path.glob("step-*"))


def test_a_full_disk() -> None:
    def work() -> None:
        raise OSError("No space left on device")

    with pytest.raises(
        CheckpointError, match="the checkpoint cannot be written: No space left on device; give another"
    ):
        on_every_rank(work)


def fail(rank: int) -> None:
    connect(timeout_s=30)

    def work() -> None:
        if rank:
            raise ValueError("the optimizer's state is a circle")

    on_every_rank(work)


def test_whatever_fails_on_one_rank_fails_on_all() -> None:
    first, second = run(fail, 2)
    assert "another rank could not write its part of the checkpoint" in str(first)
    assert "the optimizer's state is a circle" in str(second)


def test_kills_lose_no_checkpoint() -> None:
    lost, _ = kill(3)
    assert lost == 0
