"""DiT: a diffusion transformer whose norms are steered by timestep and class."""

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from tests.zoo.harness import Case
from tests.zoo.inputs import SAMPLES, classes, images


def family() -> Case:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        norm_num_groups=8,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    batch = {
        "hidden_states": images(8, 4),
        "timestep": torch.randint(1000, (SAMPLES,)),
        "class_labels": classes(10),
        "noise": images(8, 4),
    }
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # classes are dropped at random otherwise
    return model, batch, loss


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    given = {name: batch[name] for name in ("hidden_states", "timestep", "class_labels")}
    return F.mse_loss(model(**given).sample, batch["noise"])
