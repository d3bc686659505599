"""Opening calls: only where it pays, or where memory asks for it; the gradients stay exact."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipecompile import Pipe
from pipecompile.capture import capture
from pipecompile.compare import differences, gradients, worst
from pipecompile.compiled import Options
from pipecompile.ir import Graph
from tests.compiled import build_of, case, of_graph
from tests.compiled import compiled as compiled_of

LAYERS = 6


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=64, n_positions=16, n_embd=64, n_layer=LAYERS, n_head=4, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=16,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@functools.cache
def traced(make: Callable[[], nn.Module]) -> Graph:
    torch.manual_seed(0)
    return capture(make(), {name: tokens[:2] for name, tokens in batch().items()})


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens}


def compiled(make: Callable[[], nn.Module], stages: int) -> tuple[Pipe, nn.Module]:
    torch.manual_seed(0)
    model = make()
    model.config.use_cache = False
    found = of_graph(traced(make), "", Options(stages, stages, 2))
    return Pipe(build_of(found), model), model


def assert_exact(pipe: Pipe, model: nn.Module, batch: Any) -> None:
    unsplit = copy.deepcopy(model)
    assert torch.equal(pipe.step(batch), pipe.reference(unsplit, batch))
    assert worst(list(differences(gradients(model), gradients(unsplit), ""))).error < 1e-6


@pytest.mark.parametrize("stages", [4, 5])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_opening_shortens_the_slowest_stage(make: Callable[[], nn.Module], stages: int) -> None:
    pipe, model = compiled(make, stages)
    costs = [cost.total_ms for cost in pipe.plan.costs]
    layer = sum(costs) / LAYERS
    assert max(costs) < 1.8 * layer, "whole layers would leave two of them in the slowest stage"
    assert any("shortens the slowest stage by" in note for note in pipe.plan.notes)
    assert len([key for key in pipe.plan.opened if "mlp" in key or ".h." in key or "layers." in key]) > 0
    assert_exact(pipe, model, batch())


def test_what_divides_evenly_stays_closed() -> None:
    assert compiled(llama, 2)[0].plan.opened == ("model@0",)


def test_a_memory_limit_moves_the_cuts() -> None:
    free = compiled_of("gpt2", Options(4, 4, 8))
    limit = int(0.95 * max(free.forecast.peak_bytes))
    tight = compiled_of("gpt2", Options(4, 4, 8, memory=limit))
    assert max(tight.forecast.peak_bytes) <= limit < max(free.forecast.peak_bytes)
    model, batch, loss = case("gpt2", 8)
    assert_exact(Pipe(build_of(tight), model, loss), model, batch)
