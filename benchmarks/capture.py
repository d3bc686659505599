"""How long capture and lift take beside torch's own ``pipeline()``, on a narrow Llama of many layers.

    python benchmarks/capture.py [--layers 24] [--rounds 3]

Both are timed in the same process, in turns, each on a fresh model; the figure is the median of the rounds' ratios.
Both get the same microbatch. torch cuts at four evenly spaced layers; ours lifts with every call above the layers opened.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import SplitPoint, pipeline
from transformers import LlamaConfig, LlamaForCausalLM

from pipecompile.capture import capture
from pipecompile.passes.lift import lift

BAR = 1.25
STAGES = 4


def model_of(layers: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def ours(layers: int, batch: dict[str, Any]) -> float:
    model = model_of(layers)
    begin = time.perf_counter()
    graph = lift(capture(model, batch), frozenset({"model@0"}))
    seconds = time.perf_counter() - begin
    calls = [node for node in graph.nodes if node.kind == "call" and node.target.startswith("model.layers.")]
    assert len(calls) == layers, f"{len(calls)} calls of layers in the lifted graph, expected {layers}"
    return seconds


def torchs(layers: int, batch: dict[str, Any]) -> float:
    model = model_of(layers)
    cuts = {f"model.layers.{layers * s // STAGES}": SplitPoint.BEGINNING for s in range(1, STAGES)}
    begin = time.perf_counter()
    pipe = pipeline(model, (), {"input_ids": batch["input_ids"]}, split_spec=cuts)
    seconds = time.perf_counter() - begin
    assert pipe.num_stages == STAGES
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokens = torch.randint(256, (2, 32))
    batch = {"input_ids": tokens, "labels": tokens}
    ours(2, batch), torchs(4, batch)  # imports and caches of both
    rows = []
    for number in range(options.rounds):
        rows.append((ours(options.layers, batch), torchs(options.layers, batch)))
        print(
            f"round {number}: capture and lift {rows[-1][0]:.2f} s, torch's pipeline() {rows[-1][1]:.2f} s", flush=True
        )
    ratio = statistics.median(mine / other for mine, other in rows)
    print(f"{options.layers} layers, torch {torch.__version__}: median ratio {ratio:.2f}, allowed {BAR}")
    return int(ratio > BAR)


if __name__ == "__main__":
    sys.exit(main())
