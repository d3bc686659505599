"""LoRA on Llama (peft): the trunk is frozen, only small matrices inside of it train."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tests.zoo.harness import Case
from tests.zoo.inputs import VOCABULARY, language


def family() -> Case:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), adapters), language(), None
