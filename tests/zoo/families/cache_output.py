"""A GPT-2 whose batch asks for a key-value cache in the output."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from tests.zoo.harness import Case
from tests.zoo.inputs import VOCABULARY, language


def family() -> Case:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 32, "n_layer": 4, "n_head": 4}
    config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config), language(), loss


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    result = model(**batch, use_cache=True)
    assert result.past_key_values is not None
    return result.loss
