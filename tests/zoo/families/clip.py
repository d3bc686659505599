"""CLIP: two towers, and a contrastive loss that couples the samples of a microbatch."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from tests.zoo.harness import Case
from tests.zoo.inputs import VOCABULARY, images, tokens


def family() -> Case:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "projection_dim": 16,
    }
    config = CLIPConfig(
        text_config=sizes | {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config=sizes | {"image_size": 16, "patch_size": 4},
        projection_dim=16,
    )
    ids = tokens(10)
    ids[:, -1] = 2
    return CLIPModel(config), {"input_ids": ids, "pixel_values": images()}, loss


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, return_loss=True).loss
