"""Opening calls: only where it pays, or where memory asks for it; the gradients stay exact."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import pipecompile
from pipecompile.compare import differences, gradients, worst
from tests.models import MODELS

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


@pytest.mark.parametrize("stages", [4, 5])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_opening_shortens_the_slowest_stage(make: type, stages: int) -> None:
    torch.manual_seed(0)
    model = make()
    tokens = torch.randint(0, 64, (4, 16))
    batch = {"input_ids": tokens, "labels": tokens}
    pipe = pipecompile.compile(model, batch, stages=stages, microbatches=2, costs="estimate")
    costs = [cost.total_ms for cost in pipe.plan.costs]
    layer = sum(costs) / LAYERS
    assert max(costs) < 1.8 * layer, "whole layers would leave two of them in the slowest stage"
    assert any("shortens the slowest stage by" in note for note in pipe.plan.notes)
    assert len([key for key in pipe.plan.opened if "mlp" in key or ".h." in key or "layers." in key]) > 0
    unsplit = copy.deepcopy(model)
    assert torch.equal(pipe.step(batch), pipe.reference(unsplit, batch))
    assert worst(list(differences(gradients(model), gradients(unsplit), ""))).error < 1e-6


def test_what_divides_evenly_stays_closed() -> None:
    torch.manual_seed(0)
    model = llama()
    tokens = torch.randint(0, 64, (4, 16))
    pipe = pipecompile.compile(
        model, {"input_ids": tokens, "labels": tokens}, stages=2, microbatches=2, costs="estimate"
    )
    assert pipe.plan.opened == ("model@0",)


def test_a_memory_limit_moves_the_cuts() -> None:
    torch.manual_seed(0)
    model, batch, loss = MODELS["gpt2"]()
    options = {"stages": 4, "microbatches": 8, "costs": "estimate", "loss": loss}
    free = pipecompile.compile(model, batch, **options)
    limit = int(0.95 * max(free.forecast.peak_bytes))
    tight = pipecompile.compile(model, batch, memory=limit, **options)
    assert max(tight.forecast.peak_bytes) <= limit < max(free.forecast.peak_bytes)
    unsplit = copy.deepcopy(model)
    assert torch.equal(tight.step(batch), tight.reference(unsplit, batch))
    assert worst(list(differences(gradients(model), gradients(unsplit), ""))).error < 1e-6
