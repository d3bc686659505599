"""DETR: boxes are matched with objects by scipy, in a module of its own that is left whole."""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from tests.zoo.harness import Case
from tests.zoo.inputs import SAMPLES, images

OPAQUE = ("criterion",)


class Criterion(nn.Module):
    """The loss of the cheapest assignment of queries to the objects of each image."""

    def forward(self, logits: Tensor, boxes: Tensor, classes: Tensor, wanted: Tensor) -> Tensor:
        cost = torch.cdist(boxes, wanted, p=1) - logits.softmax(-1).gather(
            2, classes[:, None].expand(-1, logits.shape[1], -1)
        )
        found = [linear_sum_assignment(image) for image in cost.detach().cpu().numpy()]
        rows, columns = (torch.stack([torch.as_tensor(pair[k]) for pair in found]) for k in range(2))
        target = torch.full(logits.shape[:2], logits.shape[-1] - 1).scatter(1, rows, classes.gather(1, columns))
        of_box = boxes.gather(1, rows[..., None].expand(-1, -1, 4)) - wanted.gather(
            1, columns[..., None].expand(-1, -1, 4)
        )
        return F.cross_entropy(logits.flatten(0, 1), target.flatten()) + of_box.abs().mean()


def family() -> Case:
    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = DetrConfig(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=5,
        dropout=0.0,
    )
    model = DetrForObjectDetection(config)
    model.criterion = Criterion()
    batch = {
        "pixel_values": images(32),
        "classes": torch.randint(3, (SAMPLES, 2)),
        "boxes": 0.3 + 0.3 * torch.rand(SAMPLES, 2, 4),
    }
    return model, batch, loss


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found = model(pixel_values=batch["pixel_values"])
    return model.criterion(found.logits, found.pred_boxes, batch["classes"], batch["boxes"])
