"""ViT: patches of an image, a class token in front."""

import torch
from transformers import ViTConfig, ViTForImageClassification

from tests.zoo.harness import Case
from tests.zoo.inputs import classes, images


def family() -> Case:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config), {"pixel_values": images(), "labels": classes()}, None
