"""Main gradients: those of narrow parameters (bfloat16, float16) summed over microbatches in a wider dtype.

``p.grad`` must have the dtype of ``p``, so after each backward it is added to ``p.main_grad`` and let go. Megatron's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def keep_main_gradient(parameter: Tensor, dtype: torch.dtype) -> None:
    """From now on gradients of ``parameter`` are added to its ``main_grad``, a tensor of ``dtype`` or None."""
    forget_main_gradient(parameter)
    holder: Any = parameter
    holder.main_grad = None
    holder.main_grad_dtype = dtype

    def move(p: Any) -> None:
        gradient, p.grad = p.grad, None
        p.main_grad = gradient.to(dtype) if p.main_grad is None else p.main_grad.add_(gradient)

    holder.main_grad_hook = parameter.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]


def forget_main_gradient(parameter: Tensor) -> None:
    """From now on gradients of ``parameter`` stay in its ``grad``."""
    if "main_grad" in parameter.__dict__:
        holder: Any = parameter
        holder.main_grad_hook.remove()
        del holder.main_grad, holder.main_grad_dtype, holder.main_grad_hook


@contextmanager
def main_gradients_aside(parameters: Iterable[Tensor]) -> Iterator[None]:
    """While this lasts, gradients stay in ``grad``; main gradients are afterwards as they were."""
    before = [(p, gradient(p), gradient_dtype(p)) for p in parameters if "main_grad" in p.__dict__]
    for p, _, _ in before:
        forget_main_gradient(p)
    try:
        yield
    finally:
        for p, value, dtype in before:
            keep_main_gradient(p, dtype)
            set_gradient(p, value)


def _place(parameter: Tensor) -> str:
    return "main_grad" if "main_grad" in parameter.__dict__ else "grad"


def gradient(parameter: Tensor) -> Tensor | None:
    """Where the step sums the gradients of ``parameter``: its ``main_grad`` if it has one, else its ``grad``."""
    found: Tensor | None = getattr(parameter, _place(parameter))
    return found


def no_gradient(parameter: Tensor) -> Tensor:
    """Zeros where the step sums the gradients of ``parameter``."""
    return torch.zeros_like(parameter, dtype=gradient_dtype(parameter))


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    found: torch.dtype = getattr(parameter, "main_grad_dtype", parameter.dtype)
    return found


def set_gradient(parameter: Tensor, value: Tensor | None) -> None:
    setattr(parameter, _place(parameter), value)
