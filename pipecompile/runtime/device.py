"""Where a stage computes: operations that make tensors out of nothing ask for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pipecompile.errors import RuntimeFault


def device_of(stage: nn.Module, batch: Any) -> torch.device:
    """The device of the stage's first parameter or buffer, else of the batch's first tensor, else the CPU."""
    for tensor in (*stage.parameters(), *stage.buffers()):
        return tensor.device
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            return leaf.device
    return torch.device("cpu")


def device_among(stages: Iterable[nn.Module], store: Any, name: str, process: int, processes: int) -> torch.device:
    """The device of a process's first parameter or buffer; if its stages have none, this process's device of the kind that
    others have, for messages leave and arrive on one kind. All processes must call it.
    """
    first = next((t for stage in stages for t in (*stage.parameters(), *stage.buffers())), None)
    store.set(f"{name}/device/{process}", "" if first is None else first.device.type)
    if first is not None:
        return first.device
    kinds = [store.get(f"{name}/device/{other}").decode() for other in range(processes) if other != process]
    return torch.device(next(filter(None, kinds), "cpu"))


def check_current(device: torch.device) -> None:
    """RuntimeFault if ``device`` is a GPU other than this process's current one, on whose streams events are recorded and
    messages are copied, and whose generator is seeded.
    """
    if device.type == "cuda" and device.index not in (None, current := torch.cuda.current_device()):
        raise RuntimeFault(
            f"the stages are on {device}, but the current device of this process is cuda:{current}; call "
            f"torch.cuda.set_device({device.index}) before the model is made"
        )
