"""Which kernels a device runs where operations fall apart on the meta device, and what these take besides tensors.

What a backward keeps depends on them: fused attention keeps its arguments, its result and a number for each query, the
same in plain operations keeps every score. Within ``Kernels`` meta tensors go through the operations of a device:

    cpu     what torch chooses for tensors like these on the CPU (it is asked, with two queries)
    cuda    flash attention for 16 bits without a mask, memory-efficient attention otherwise; dropout with a mask of
            one byte an element        (torch 2.11: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, Dropout.cpp)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from pipecompile.errors import CostError

aten = torch.ops.aten
ATTENTION = (
    F.scaled_dot_product_attention,
    aten.scaled_dot_product_attention,
    aten.scaled_dot_product_attention.default,
)
DROPOUT = (F.dropout, aten.dropout, aten.dropout.default)
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
BLOCK = {"cpu": 1, "cuda": 512}
"""Bytes of which a device's allocator gives out multiples (c10/cuda/CUDACachingAllocator.h: kMinBlockSize)."""
PRODUCTS = 2 * (32 << 20)
"""Bytes that matrix products keep for themselves: cuBLAS's workspace on Hopper, the largest, once for the forward's
thread and once for the backward's (aten/src/ATen/cuda/CublasHandlePool.cpp)."""
LARGEST_HEAD = 256
"""Flash attention's largest head."""


class Kernels(TorchFunctionMode):
    """While it is active, attention and dropout of meta tensors are those of ``device``, "cpu" or "cuda"."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ATTENTION and args[0].is_meta:
            return self._attention(func, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self._inside():
                return func(*args, **kwargs)
        if getattr(func, "__name__", "") in RECURRENT:
            _refuse(args)
        if self._device == "cuda" and func in DROPOUT and args[0].is_meta:
            return _dropout(func, *args, **kwargs)
        return func(*args, **kwargs)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Attention called by one of torch's own functions, where no mode is asked."""
        plain = F.scaled_dot_product_attention

        def attention(*args: Any, **kwargs: Any) -> Tensor:
            return self._attention(plain, *args, **kwargs) if args[0].is_meta else plain(*args, **kwargs)

        F.scaled_dot_product_attention = attention
        try:
            yield
        finally:
            F.scaled_dot_product_attention = plain

    def _attention(
        self,
        plain: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        choose = _on_cpu if self._device == "cpu" else _on_cuda
        chosen = choose(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        mask = _added(attn_mask, query)
        made: tuple[Tensor, ...]
        if chosen == SDPBackend.FLASH_ATTENTION and self._device == "cpu":
            made = aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale
            )
        elif chosen == SDPBackend.FLASH_ATTENTION:
            padded = [_padded(x, 8) for x in (query, key, value)]
            made = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)
            return made[0][..., : value.size(-1)]
        elif chosen == SDPBackend.EFFICIENT_ATTENTION:
            made = aten._scaled_dot_product_efficient_attention(
                query, key, value, mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
            )
        else:
            whole: Tensor = plain(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
            return whole
        return made[0]


def _on_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: Any, gqa: bool
) -> SDPBackend:
    """What torch chooses, asked with real tensors of at most two rows: their number does not decide."""
    small = {size: min(size, 2) for size in (query.size(-2), key.size(-2))}

    def like(x: Tensor, *lengths: int) -> Tensor:
        lead = [1] * len(x.shape[:-3]) + list(x.shape[-3:-2])
        found = torch.zeros([*lead, *lengths], dtype=x.dtype, device="cpu")
        return found.requires_grad_(x.requires_grad)

    with _disable_current_modes():
        q, k, v = (like(x, small[x.size(-2)], x.size(-1)) for x in (query, key, value))
        m = None if mask is None else like(mask, *(small.get(n, n) for n in mask.shape[-2:]))
        return SDPBackend(torch._fused_sdp_choice(q, k, v, m, dropout, causal, scale=scale, enable_gqa=gqa))


def _on_cuda(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: Any, gqa: bool
) -> SDPBackend:
    """What a device of compute capability 8.0 or later is given."""
    plain = all(x.dim() == 4 and min(x.shape) > 0 for x in (query, key, value))
    if not plain or (mask is not None and mask.requires_grad):
        return SDPBackend.MATH
    narrow = query.dtype in (torch.float16, torch.bfloat16)
    grouped = len({x.size(1) for x in (query, key, value)}) > 1
    if narrow and mask is None and query.size(-1) == value.size(-1) <= LARGEST_HEAD:
        return SDPBackend.FLASH_ATTENTION
    wide = query.dtype == torch.float32 or narrow
    return SDPBackend.EFFICIENT_ATTENTION if wide and not grouped else SDPBackend.MATH


def _added(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A mask of truth values as what fused kernels add to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -math.inf)


def _padded(x: Tensor, to: int) -> Tensor:
    return F.pad(x, (0, -x.size(-1) % to)) if x.size(-1) % to else x


def _dropout(plain: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if training and 0 < p < 1 and not inplace and input.numel():
        return torch.native_dropout(input, p, True)[0]
    result: Tensor = plain(input, p, training, **({"inplace": True} if inplace else {}))
    return result


def _refuse(args: Any) -> None:
    if any(isinstance(x, FakeTensor) or (isinstance(x, Tensor) and x.is_meta) for x in args):
        raise CostError(
            "what a recurrent network (LSTM, GRU, RNN) keeps for its backward is known to its library alone; measure the "
            "costs, which runs it"
        )


def workspace_bytes(func: Any, args: Sequence[Any]) -> int:
    """Bytes that an operation takes on CUDA while it runs, besides its results.

    Flash attention's backward sums the queries' gradient in float32, and makes keys' and values' gradients of every head
    where several share one (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd).
    """
    if func is not aten._scaled_dot_product_flash_attention_backward.default:
        return 0
    query: Tensor = args[1]
    key: Tensor = args[2]
    batch, heads, length, size = query.shape
    rounded = -(-length // 128) * 128
    wide: int = batch * heads * rounded * (-(-size // 32) * 32) * 4 + batch * heads * rounded * 4
    expanded: int = 2 * batch * heads * key.size(2) * size * key.element_size() if key.size(1) != heads else 0
    return wide + expanded
