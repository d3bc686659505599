"""Refuses batches that are not the same in every process, which would train on inputs of one and labels of another."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pipecompile.errors import BatchError
from pipecompile.runtime import any_failed, from_first_rank


def check_same(batch: Any) -> None:
    """BatchError, on every rank, if a rank has other tensors, numbers or texts in ``batch`` than rank 0; all must call it."""
    mine = _digest(batch)
    if any_failed(from_first_rank(lambda: mine) != mine):
        raise BatchError(
            "batch() gives other values in each process, but every rank must get the same batch; seed in it whatever it "
            "draws from (the generators of torch, Python and numpy are seeded before each call)"
        )


def _digest(batch: Any) -> str:
    digest = sha256()
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            digest.update(f"{leaf.dtype}{list(leaf.shape)}".encode())
            raw: Any = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(raw)
        elif isinstance(leaf, int | float | str):
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
