"""Where a stage computes: operations that make tensors out of nothing ask for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


def device_of(stage: nn.Module, batch: Any) -> torch.device:
    """The device of the stage's first parameter or buffer, else of the batch's first tensor, else the CPU."""
    for tensor in (*stage.parameters(), *stage.buffers()):
        return tensor.device
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            return leaf.device
    return torch.device("cpu")
