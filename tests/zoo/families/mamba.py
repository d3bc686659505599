"""Mamba: a selective scan, step by step."""

import torch
from transformers import MambaConfig, MambaForCausalLM

from tests.zoo.harness import Case
from tests.zoo.inputs import VOCABULARY, language


def family() -> Case:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=4, conv_kernel=4, time_step_rank=4
    )
    return MambaForCausalLM(config), language(8), None
