"""Random batches of eight samples that the families share."""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLES = 8
VOCABULARY = 96


def tokens(length: int = 12, vocabulary: int = VOCABULARY) -> Tensor:
    """int64[SAMPLES, length], no token below 4, which are often special."""
    return torch.randint(4, vocabulary, (SAMPLES, length))


def language(length: int = 12, vocabulary: int = VOCABULARY) -> dict[str, Tensor]:
    """Tokens that are their own labels, as causal language models take them."""
    ids = tokens(length, vocabulary)
    return {"input_ids": ids, "labels": ids.clone()}


def translation(source: int = 10, target: int = 8) -> dict[str, Tensor]:
    """Tokens and the tokens that a decoder should give for them."""
    return {"input_ids": tokens(source), "labels": tokens(target)}


def images(size: int = 16, channels: int = 3) -> Tensor:
    return torch.randn(SAMPLES, channels, size, size)


def classes(count: int = 5) -> Tensor:
    return torch.randint(count, (SAMPLES,))
