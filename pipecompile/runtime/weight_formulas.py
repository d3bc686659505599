"""How the gradients of an operation's parameters come from the gradient that arrives at it.

Each formula reads what autograd saved for the operation's node, now, and gives a function to call later. It computes
what autograd would, with the same kernels in the same layout, so that results are equal to the last bit; only a large
product that is added to a gradient as it is computed may round once more for each block of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LARGE = 1 << 16
"""Elements from which on it pays to add a product to a gradient as it is computed, at the price of equal last bits."""
ADDED = (torch.float32, torch.float64)
"""Dtypes in which a sum inside the product is as good as one after it: narrower ones are rounded before they are added."""


@dataclass(frozen=True, slots=True)
class Product:
    """The gradient of a matrix, left @ right, transposed if ``turned``."""

    left: Tensor
    right: Tensor
    turned: bool

    def compute(self) -> Tensor:
        found = self.left.mm(self.right)
        return found.t() if self.turned else found

    def add_to(self, parameter: Tensor, transposed: bool) -> bool:
        """Add the product (transposed once more) to the parameter's gradient; False if that needs other steps."""
        total = parameter.grad
        if total is None or total.numel() < LARGE or total.layout != torch.strided or total.dtype not in ADDED:
            return False
        if total.dtype != self.left.dtype or total.device != self.left.device:
            return False
        (total.t() if transposed != self.turned else total).addmm_(self.left, self.right)
        return True


Gradients = Callable[[Tensor], tuple[Tensor | Product, ...]]
"""From the gradient at an operation to those of its weight and, if it waits too, its bias."""
Formula = Callable[[Any, bool], Gradients | None]
"""From a node, and whether its bias waits; None if it cannot wait."""


def _saved(node: Any, name: str) -> Tensor | None:
    """A saved tensor, None if hooks keep it elsewhere (checkpointing, offloading) and may be asked for it only once."""
    hook = getattr(node, f"_raw_saved_{name}").unpack_hook
    if hook is not None and not getattr(hook, "repeatable", False):
        return None
    value: Tensor = getattr(node, f"_saved_{name}")
    return value.detach()  # else it would keep the graph that made it


def _addmm(node: Any, bias: bool) -> Gradients | None:
    """bias + x @ w."""
    if node._saved_alpha != 1 or node._saved_beta != 1:
        return None
    product = _product(_saved(node, "mat1"), node._saved_mat2_sym_sizes, node._saved_mat2_sym_strides)
    if product is None or not bias:
        return product
    shape = node.next_functions[0][0]._input_metadata[0].shape
    return lambda gradient: (*product(gradient), gradient.sum_to_size(shape))


def _mm(node: Any, bias: bool) -> Gradients | None:
    """x @ w."""
    return _product(_saved(node, "self"), node._saved_mat2_sym_sizes, node._saved_mat2_sym_strides)


def _product(x: Tensor | None, sizes: Sequence[int], strides: Sequence[int]) -> Gradients | None:
    """The gradient of w in x @ w, in the layout of w."""
    if x is None:
        return None
    if strides[0] == 1 and strides[1] == sizes[0]:
        return lambda gradient: (Product(gradient.t(), x.conj(), turned=True),)
    return lambda gradient: (Product(x.t().conj(), gradient, turned=False),)


def _bmm(node: Any, bias: bool) -> Gradients | None:
    """x @ w for each of a batch."""
    x = _saved(node, "self")
    if x is None:
        return None
    return lambda gradient: (x.transpose(1, 2).conj().bmm(gradient),)


def _convolution(node: Any, bias: bool) -> Gradients | None:
    """Convolutions of every kind."""
    x, weight = _saved(node, "input"), _saved(node, "weight")
    if x is None or weight is None:
        return None
    shape = node._saved_bias_sym_sizes_opt
    stride, padding, dilation = node._saved_stride, node._saved_padding, node._saved_dilation
    transposed, more, groups = node._saved_transposed, node._saved_output_padding, node._saved_groups

    def compute(gradient: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward.default(
            gradient, x, weight, shape, stride, padding, dilation, transposed, more, groups, [False, True, bias]
        )
        return found[1:] if bias else found[1:2]

    return compute


def _embedding(node: Any, bias: bool) -> Gradients | None:
    """Rows of a table."""
    indices = _saved(node, "indices")
    if indices is None or node._saved_sparse:
        return None
    rows, padding, scaled = node._saved_weight_sym_argsize_0, node._saved_padding_idx, node._saved_scale_grad_by_freq
    padding = padding - 2**64 if padding >= 2**63 else padding
    return lambda gradient: (torch.ops.aten.embedding_dense_backward.default(gradient, indices, rows, padding, scaled),)


Uses = Callable[[Any], int]
"""From a node: how many multiply-adds each element of its weight's gradient takes."""
PASSES = 64
"""Multiply-adds in the time of a table's gradient for each element: zeros, rows, and the sum with what is there."""


def _rows(name: str, dimension: int) -> Uses:
    return lambda node: int(getattr(node, f"_saved_{name}").shape[dimension])


def _positions(node: Any) -> int:
    """Where a convolution's kernel is put: at each element of its output, of its input if it is transposed."""
    x = node._saved_input
    stride = 1 if node._saved_transposed else math.prod(node._saved_stride)
    positions: int = x.shape[0] * math.prod(x.shape[2:]) // stride
    return max(1, positions)


PRODUCTS = (_addmm, _mm)
"""The formulas whose first gradient is a Product."""
FORMULAS: dict[str, tuple[tuple[int, ...], Formula, Uses]] = {
    "AddmmBackward0": ((2, 0), _addmm, _rows("mat1", 0)),
    "MmBackward0": ((1,), _mm, _rows("self", 0)),
    "BmmBackward0": ((1,), _bmm, _rows("self", 1)),
    "ConvolutionBackward0": ((1, 2), _convolution, _positions),
    "EmbeddingBackward0": ((0,), _embedding, lambda node: PASSES),
}
"""By node: the place of the weight (and of the bias) among the operation's inputs, the formula, the work."""
