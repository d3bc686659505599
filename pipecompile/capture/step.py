"""One training step as a module: the model, called with a batch, giving the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pipecompile.errors import CaptureError

Loss = Callable[[nn.Module, Any], Any]


def copied(batch: Any) -> Any:
    """The batch with each tensor a tensor of its own, so that two leaves are never taken for one, nor changed by a model."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, batch)


def default_loss(model: nn.Module, batch: Any) -> Any:
    """Call the model with the batch (mapping: keywords, tuple or list: positions) and take the loss that it returns."""
    if isinstance(batch, Mapping):
        result = model(**batch)
    elif isinstance(batch, tuple | list):
        result = model(*batch)
    else:
        result = model(batch)
    found = result["loss"] if isinstance(result, Mapping) and "loss" in result else getattr(result, "loss", None)
    if isinstance(found, torch.Tensor):
        return found
    if isinstance(result, torch.Tensor) and result.numel() == 1:
        return result
    shape = f" of shape {tuple(result.shape)}" if isinstance(result, torch.Tensor) else ""
    raise CaptureError(
        f"the model returned {type(result).__name__}{shape}, which is neither a scalar loss nor holds one as .loss or "
        f'["loss"]; write a function loss(model, batch) that returns a scalar'
    )


class Step(nn.Module):
    """``forward(batch)`` gives (loss, weight), weight None unless the loss function returned (sum, weight).

    Tensors that it returned in a last dict follow; their names are then in ``reported``.
    ``on_batch`` is called with the batch first.
    """

    def __init__(self, model: nn.Module, loss: Loss | None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss or default_loss
        self.reported: tuple[str, ...] = ()
        self.on_batch: Callable[[Any], None] | None = None

    def forward(self, batch: Any) -> tuple[Any, ...]:
        if self.on_batch is not None:
            self.on_batch(batch)
        result = self.loss(self.model, batch)
        more: Mapping[str, Any] = {}
        if isinstance(result, tuple) and len(result) in (2, 3) and isinstance(result[-1], Mapping):
            more = result[-1]
            result = result[0] if len(result) == 2 else result[:2]
        self.reported = _checked(more)
        value, weight = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        for what, tensor in (("loss", value), ("weight", weight)):
            if what == "weight" and tensor is None:
                continue
            if not isinstance(tensor, torch.Tensor) or tensor.numel() != 1:
                shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise CaptureError(
                    f"the {what} is {shape}, expected a tensor of one element; reduce it, for example with .mean()"
                )
        return value, weight, *more.values()


def _checked(more: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of what the loss function returned besides the loss."""
    for name, value in more.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CaptureError(
                f"the loss function returned {name!r}: {type(value).__name__} besides the loss, expected tensors by "
                "name; make it a tensor, or leave it out"
            )
    return tuple(more)
