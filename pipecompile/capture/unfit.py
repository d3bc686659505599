"""Models that no trace is tried on: what makes them so, and what helps."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pipecompile.errors import CaptureError


def refuse_unfit(model: nn.Module) -> None:
    """CaptureError for a TorchScript module, and for lazy modules that have not seen a batch."""
    for fqn, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise CaptureError(
                f"{fqn or 'the model'} is a TorchScript module, whose calls cannot be seen; give the module that torch.jit.script "
                "or torch.jit.trace was given"
            )
    if unmade := lazy_tensors(model):
        more = f" and {len(unmade) - 1} more" if unmade[1:] else ""
        raise CaptureError(
            f"{unmade[0]}{more} of lazy modules (nn.LazyLinear and the like) are not made before a first batch; run the model "
            "once first: loss(model, batch) under torch.no_grad()"
        )


def lazy_tensors(model: nn.Module) -> list[str]:
    """Parameters and buffers that a first batch will make."""
    return [name for named in (model.named_parameters, model.named_buffers) for name, t in named() if is_lazy(t)]
