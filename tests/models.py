"""Six tiny random models that the tests and the benchmarks share: each gives (model, batch of 8 samples, loss or None).

Deterministic: every function seeds torch itself. Dropout is off, so that two runs can be compared bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLES = 8
VOCABULARY = 128

Batch = dict[str, Tensor] | tuple[Tensor, ...]
Loss = Callable[[nn.Module, Any], Tensor]
Case = tuple[nn.Module, Batch, Loss | None]


def gpt2() -> Case:
    """GPT-2: the output projection is tied to the token embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 32, "n_layer": 4, "n_head": 4}
    config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    tokens = torch.randint(VOCABULARY, (SAMPLES, 16))
    return GPT2LMHeadModel(config), {"input_ids": tokens, "labels": tokens}, None


def llama() -> Case:
    """Llama with grouped keys, rotary positions and an untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    tokens = torch.randint(VOCABULARY, (SAMPLES, 16))
    return LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}, None


def t5() -> Case:
    """T5: the encoder's result is read by every decoder layer; one embedding serves both halves and the head."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    source = torch.randint(1, VOCABULARY, (SAMPLES, 12))
    target = torch.randint(1, VOCABULARY, (SAMPLES, 10))
    return T5ForConditionalGeneration(config), {"input_ids": source, "labels": target}, None


def unet2d() -> Case:
    """UNet2D: every block of the way down is read again on the way up."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    batch = {
        "sample": torch.randn(SAMPLES, 3, 16, 16),
        "timestep": torch.randint(1000, (SAMPLES,)),
        "noise": torch.randn(SAMPLES, 3, 16, 16),
    }
    return model, batch, noise_loss


def noise_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(batch["sample"], batch["timestep"]).sample, batch["noise"])


class CNN(nn.Module):
    """A residual CNN: its BatchNorms change buffers in every forward."""

    def __init__(self, channels: int = 16, blocks: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
            for _ in range(blocks)
        )
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden.mean(dim=(2, 3)))


def cnn() -> Case:
    torch.manual_seed(0)
    return CNN(), {"images": torch.randn(SAMPLES, 3, 12, 12), "labels": torch.randint(10, (SAMPLES,))}, image_loss


def image_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["images"]), batch["labels"])


class MLP(nn.Module):
    """Linear layers in a row, called with a tuple."""

    def __init__(self, width: int = 32, layers: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def mlp() -> Case:
    torch.manual_seed(0)
    return MLP(), (torch.randn(SAMPLES, 32), torch.randn(SAMPLES, 1)), square_loss


def square_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)


MODELS: dict[str, Callable[[], Case]] = {
    "gpt2": gpt2,
    "llama": llama,
    "t5": t5,
    "unet2d": unet2d,
    "cnn": cnn,
    "mlp": mlp,
}
