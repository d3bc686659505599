"""Losses that couple the samples of a batch are found in the graph, and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipecompile.capture import capture
from pipecompile.passes.coupling import couplings

Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def batch(samples: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "x": torch.randn(samples, 8),
        "y": torch.randn(samples, 8),
        "tokens": torch.randn(samples, 5, 8),
        "target": torch.rand(samples, 6).round(),
        "label": torch.randint(5, (samples,)),
        "labels": torch.randint(6, (samples, 5)),
        "mask": torch.rand(samples),
    }


def diagonal(scores: Tensor) -> Tensor:
    return F.cross_entropy(scores, torch.arange(len(scores)))


def barlow_twins(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
    return (m(b["x"]).T @ m(b["y"]) / len(b["x"]) - torch.eye(6)).square().sum()


def centred(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
    z = m(b["x"])
    return (z - z.mean(0)).square().mean()


def entropy_of_the_mean(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
    p = m(b["x"]).softmax(-1).mean(0)
    return -(p * p.log()).sum()


def scaled_by_the_batch(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
    z = m(b["x"])
    return (z / (z.detach().abs().mean() + 1)).square().mean()


def dice_of_the_batch(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
    p = m(b["x"]).sigmoid()
    return 1 - 2 * (p * b["target"]).sum() / (p.sum() + b["target"].sum() + 1)


def views_side_by_side(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
    z = F.normalize(m(torch.cat([b["x"], b["y"]])), dim=-1)
    return (z @ z.T).exp().mean()


COUPLED: dict[str, Loss] = {
    "contrastive": lambda m, b: diagonal(m(b["x"]) @ m(b["y"]).t()),
    "contrastive by einsum": lambda m, b: diagonal(torch.einsum("id,jd->ij", m(b["x"]), m(b["y"]))),
    "contrastive by broadcasting": lambda m, b: (m(b["x"])[:, None] - m(b["y"])[None]).square().sum(-1).exp().mean(),
    "distances of all pairs": lambda m, b: torch.cdist(m(b["x"]), m(b["y"])).exp().mean(),
    "views side by side": views_side_by_side,
    "Barlow twins": barlow_twins,
    "softmax over samples": lambda m, b: (m(b["x"]).softmax(0) * b["target"]).sum(),
    "logsumexp over samples": lambda m, b: m(b["x"])[:, 0].logsumexp(0),
    "centred": centred,
    "cumsum": lambda m, b: m(b["x"]).cumsum(0).square().mean(),
    "largest": lambda m, b: m(b["x"]).max(),
    "root of a mean": lambda m, b: m(b["x"]).square().mean().sqrt(),
    "norm of everything": lambda m, b: m(b["x"]).norm(),
    "neighbours": lambda m, b: (m(b["x"]) * m(b["x"]).roll(1, 0)).sum(-1).relu().mean(),
    "entropy of the mean": entropy_of_the_mean,
    "scaled by the batch": scaled_by_the_batch,
    "attention over samples": lambda m, b: F.scaled_dot_product_attention(*3 * [m(b["x"])]).square().mean(),
    "layer norm over samples": lambda m, b: F.layer_norm(m(b["x"]).T, (len(b["x"]),)).square().mean(),
    "dice of the batch": dice_of_the_batch,
}


def token_mean(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
    return ((m(b["x"]) - m(b["y"])).square().mean(-1) * b["mask"]).sum() / b["mask"].sum().clamp(min=1)


def dice_of_each_sample(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
    p = m(b["x"]).sigmoid()
    return (1 - 2 * (p * b["target"]).sum(1) / (p.sum(1) + b["target"].sum(1) + 1)).mean()


def self_attention(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
    z = m(b["tokens"])
    return (z @ z.transpose(1, 2)).softmax(-1).square().mean()


def time_first(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
    z = m(b["tokens"].transpose(0, 1))
    return (z - z.mean(0)).square().mean()


def one_by_one(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
    return torch.stack([z.softmax(0).exp().mean() for z in m(b["tokens"]).unbind(0)]).mean()


def guidance(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
    free, conditional = m(torch.cat([b["x"], b["y"]])).chunk(2)
    return (free + 2 * (conditional - free)).square().mean()


def focal(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
    each = F.cross_entropy(m(b["x"]), b["label"], reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


def filled(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
    z = m(b["x"])
    out = z.new_zeros(z.shape)
    out[:, :3] = z[:, 3:]
    return out.softmax(-1).square().mean()


SEPARATE: dict[str, Loss] = {
    "squared error": lambda m, b: F.mse_loss(m(b["x"]), m(b["y"])),
    "cross entropy": lambda m, b: F.cross_entropy(m(b["x"]), b["label"]),
    "of tokens": lambda m, b: F.cross_entropy(m(b["tokens"]).flatten(0, 1), b["labels"].flatten()),
    "of shifted tokens": lambda m, b: F.cross_entropy(
        m(b["tokens"])[:, :-1].reshape(-1, 6), b["labels"][:, 1:].reshape(-1)
    ),
    "two parts": lambda m, b: 0.5 * F.cross_entropy(m(b["x"]), b["label"]) + 0.1 * m(b["y"]).square().mean(),
    "token mean": token_mean,
    "dice of each sample": dice_of_each_sample,
    "norm of each sample": lambda m, b: m(b["x"]).norm(dim=-1).mean(),
    "softmax over tokens": lambda m, b: m(b["tokens"]).softmax(1).square().mean(),
    "self-attention": self_attention,
    "time first": time_first,
    "one by one": one_by_one,
    "gather": lambda m, b: -m(b["x"]).log_softmax(-1).gather(1, b["label"][:, None]).mean(),
    "one token each": lambda m, b: m(b["tokens"])[torch.arange(len(b["x"])), b["label"]].square().mean(),
    "triplets": lambda m, b: F.triplet_margin_loss(m(b["x"]), m(b["y"]), m(b["x"] + b["y"])),
    "group norm": lambda m, b: F.group_norm(m(b["x"]), 2).square().mean(),
    "instance norm": lambda m, b: F.instance_norm(m(b["tokens"])).square().mean(),
    "guidance": guidance,
    "distillation": lambda m, b: F.kl_div(m(b["x"]).log_softmax(-1), m(b["y"]).softmax(-1), reduction="batchmean"),
    "norm of weights": lambda m, b: m(b["x"]).square().mean() + m.net[0].weight.norm(),
    "focal": focal,
    "positions of the samples' type": lambda m, b: (m(b["x"]) + torch.arange(6).type_as(b["x"])).square().mean(),
    "filled": filled,
}


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", COUPLED)
def test_coupled(name: str, samples: int) -> None:
    assert couplings(capture(Encoder(), batch(samples), COUPLED[name]))


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("name", SEPARATE)
def test_separate(name: str, samples: int) -> None:
    assert not couplings(capture(Encoder(), batch(samples), SEPARATE[name]))
