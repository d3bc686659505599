"""All stages on one device beside plain gradient accumulation: ``python benchmarks/gpu/local_runtime.py [--device cpu]``.

A GPT-2 (124M parameters on a GPU, a narrow one on the CPU), 4 stages, 8 microbatches, both on the same model in turn, the
device idle before and after each step; the figure is the median of paired ratios. Exit code 1 if it is above 1.03, or if
the losses differ.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import pipecompile

STAGES, MICROBATCHES, BAR = 4, 8, 1.03


def make(device: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and a batch, without dropout."""
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    narrow = {"n_embd": 128, "n_layer": 8, "n_head": 4, "vocab_size": 1024}
    length, rows = (1024, 4) if device == "cuda" else (64, 2)
    config = GPT2Config(n_positions=length, use_cache=False, **off, **({} if device == "cuda" else narrow))
    torch.manual_seed(0)
    tokens = torch.randint(config.vocab_size, (rows * MICROBATCHES, length), device=device)
    return GPT2LMHeadModel(config).to(device), {"input_ids": tokens, "labels": tokens}


def accumulate(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A step without a pipeline."""
    value = torch.zeros((), device=batch["labels"].device)
    for parts in zip(*(tensor.chunk(MICROBATCHES) for tensor in batch.values())):
        loss = model(**dict(zip(batch, parts))).loss / MICROBATCHES
        loss.backward()
        value += loss.detach()
    return value


def timed(model: nn.Module, step: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    """Seconds of a step, and its loss."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    model.zero_grad()
    wait()
    began = time.perf_counter()
    loss = step()
    wait()
    return time.perf_counter() - began, loss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu shows that the script works, not how fast a GPU is")
    model, batch = make(options.device)
    pipe = pipecompile.compile(model, batch, stages=STAGES, microbatches=MICROBATCHES, costs="estimate")
    ratios = []
    for step in range(options.steps + 3):
        ours, ours_loss = timed(model, lambda: pipe.step(batch), options.device)
        plain, plain_loss = timed(model, lambda: accumulate(model, batch), options.device)
        torch.testing.assert_close(ours_loss, plain_loss, rtol=1e-5, atol=1e-6)
        if step >= 3:
            ratios.append(ours / plain)
            print(f"pipeline {ours * 1e3:.2f} ms, accumulation {plain * 1e3:.2f} ms, ratio {ours / plain:.3f}")
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}: median ratio {statistics.median(ratios):.3f}, bar {BAR}")
    return int(statistics.median(ratios) > BAR)


if __name__ == "__main__":
    sys.exit(main())
