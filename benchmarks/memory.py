"""Forecast against measured peak memory of each rank: ``python benchmarks/memory.py [--costs estimate] [--only WORD]``.

GPT-2, Llama, T5 and UNet2D under four schedules, four real processes on the CPU. With ``--costs measure`` the forecast is
made of what the stages were seen to hold, with ``--costs estimate`` of what they would hold. What is measured: the most bytes that a rank's
tensors hold at any operation of a training step and of AdamW's step after it, each storage once: parameters, buffers,
gradients, optimizer state, the batch, everything saved, in use, sent or received. Bytes do not depend on the machine's
load. The script fails if a forecast is below what was measured, or more than 10 % above it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import pipecompile
from pipecompile.cost.meter import TensorMeter
from pipecompile.runtime import connect

RANKS, MICROBATCHES, HIGHEST = 4, 8, 1.10
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved-1f1b": 2, "zb-h1": 1}
"""Stages of each rank."""
WIDTH, LAYERS, LENGTH, VOCABULARY, ROWS = 128, 8, 64, 512, 2


Case = tuple[str, str, int, int]
"""Model, schedule, layers, microbatches."""
Batch = dict[str, Tensor] | tuple[Tensor, ...]


def gpt2(layers: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": WIDTH, "n_layer": layers}
    return GPT2LMHeadModel(GPT2Config(**sizes, n_head=4, bos_token_id=0, eos_token_id=0))


def llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)


def t5(layers: int) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes: dict[str, Any] = {"d_kv": WIDTH // 4, "d_ff": 3 * WIDTH, "num_layers": layers // 2, "num_heads": 4}
    config = T5Config(vocab_size=VOCABULARY, d_model=WIDTH, **sizes, dropout_rate=0.0, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def unet2d(layers: int) -> nn.Module:
    from diffusers import UNet2DModel

    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    sizes: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": max(layers // 4, 1)}
    return UNet2DModel(sample_size=32, in_channels=3, out_channels=3, down_block_types=down, up_block_types=up, **sizes)


MODELS = {"gpt2": gpt2, "llama": llama, "t5": t5, "unet2d": unet2d}
"""By name, made of so many layers."""


def denoising(model: nn.Module, batch: Batch) -> Tensor:
    noisy, timestep, noise = batch
    found: Tensor = nn.functional.mse_loss(model(noisy, timestep).sample, noise)
    return found


def batch_of(name: str, rows: int) -> Batch:
    if name == "unet2d":
        return torch.randn(rows, 3, 32, 32), torch.randint(1000, (rows,)), torch.randn(rows, 3, 32, 32)
    tokens = torch.randint(VOCABULARY, (rows, LENGTH))
    return {"input_ids": tokens, "labels": tokens}


def measure(
    name: str, schedule: str, layers: int = LAYERS, microbatches: int = MICROBATCHES, costs: str = "measure"
) -> tuple[int, int]:
    """This rank's forecast and measured peak, in bytes. Needs a process group of ``RANKS`` processes."""
    torch.manual_seed(0)
    batch = batch_of(name, ROWS * microbatches)
    pipe = pipecompile.compile(
        MODELS[name](layers),
        batch,
        loss=denoising if name == "unet2d" else None,
        stages=RANKS * SCHEDULES[schedule],
        ranks=RANKS,
        microbatches=microbatches,
        schedule=schedule,
        costs=costs,
        check=False,
        progress=False,
    )
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-3)
    return pipe.forecast.peak_bytes[pipe.rank], peak(pipe, optimizer, batch)


def peak(pipe: pipecompile.Pipe, optimizer: torch.optim.Optimizer, batch: Batch) -> int:
    """The most bytes that this rank's tensors hold during the second step and its optimizer's."""
    meter = TensorMeter()
    for stage in pipe.stages.values():
        meter.add((*stage.parameters(), *stage.buffers()))
    meter.add(batch.values() if isinstance(batch, dict) else batch)
    pipe.step(batch)
    optimizer.zero_grad()
    meter.add(shared_memory(pipe))
    for _ in range(2):
        gc.collect()
        with meter:
            meter.begin()
            pipe.step(batch)
            optimizer.step()
            optimizer.zero_grad()
    return meter.peak


def shared_memory(pipe: pipecompile.Pipe) -> list[Tensor]:
    """The places that this rank has for messages to ranks of the same host."""
    senders = pipe._runtime(trains=True)._channels._senders.values()
    return [view for sender in senders for views in sender._views for view in views if view is not None]


def work(rank: int, port: int, chosen: list[Case], costs: str, results: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    connect(timeout_s=120)
    for case in chosen:
        found: list[Any] = [None] * RANKS
        dist.all_gather_object(found, measure(*case, costs))
        if rank == 0:
            results.put(found)
    dist.barrier()
    os._exit(0)


def run(chosen: list[Case], costs: str = "measure") -> Iterator[list[tuple[int, int]]]:
    """Forecast and measured peak of each rank, for one case after the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("fork").SimpleQueue()
    for name in dict.fromkeys(case[0] for case in chosen):
        MODELS[name](2)  # imports what the processes need before they are forked
    with tempfile.TemporaryDirectory() as cache:  # costs measured under load are no use to anybody
        os.environ["XDG_CACHE_HOME"] = cache
        started = mp.start_processes(
            work, (port, chosen, costs, results), nprocs=RANKS, join=False, start_method="fork"
        )
        for _ in chosen:
            while results.empty():  # a process that fails raises here
                started.join(timeout=0.1)
            yield results.get()
        started.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--only",
        nargs="+",
        default=["gpt2", "llama"],
        help="cases whose 'model schedule' has one of these in it (default gpt2 llama)",
    )
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"layers of each model (default {LAYERS})")
    parser.add_argument("--costs", default="measure", choices=("measure", "estimate"), help="(default measure)")
    options = parser.parse_args()
    every = [(name, schedule, options.layers, MICROBATCHES) for name in MODELS for schedule in SCHEDULES]
    chosen = [case for case in every if any(word in " ".join(case[:2]) for word in options.only)]
    rows = []
    for (name, schedule, *_), found in zip(chosen, run(chosen, options.costs)):
        for rank, (forecast, measured) in enumerate(found):
            row = {"model": name, "schedule": schedule, "rank": rank, "forecast": forecast, "measured": measured}
            rows.append(row | {"ratio": forecast / measured})
            if not options.json:
                print(
                    f"{name:6} {schedule:17} rank {rank}  forecast {forecast / 2**20:7.2f} MiB  "
                    f"measured {measured / 2**20:7.2f} MiB  ratio {forecast / measured:.3f}",
                    flush=True,
                )
    ratios = [row["ratio"] for row in rows]
    if options.json:
        print(json.dumps({"rows": rows}))
    else:
        print(f"ratios {min(ratios):.3f} to {max(ratios):.3f}; wanted 1 to {HIGHEST}")
    if not 1 <= min(ratios) <= max(ratios) <= HIGHEST:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
