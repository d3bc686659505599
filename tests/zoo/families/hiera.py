"""Hiera: tokens in windows that are pooled and reordered between the stages of a vision transformer."""

import torch
from transformers import HieraConfig, HieraForImageClassification

from tests.zoo.harness import Case
from tests.zoo.inputs import classes, images


def family() -> Case:
    torch.manual_seed(0)
    config = HieraConfig(
        image_size=[32, 32],
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        masked_unit_size=[8, 8],
        drop_path_rate=0.0,
        num_labels=5,
    )
    return HieraForImageClassification(config), {"pixel_values": images(32), "labels": classes()}, None
