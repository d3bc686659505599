"""What the scripts for GPUs share: the models, the machine, and how results are told."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Result = dict[str, Any]
"""``rows``, and ``ok``: whether every bar is met."""
Batch = dict[str, Tensor]
MACHINES = {"H100": "h100", "H200": "h200", "A100-SXM4-40GB": "a100-40gb", "A100-SXM4-80GB": "a100-80gb",
            "V100-SXM2-32GB": "v100-32gb", "L40S": "l40s", "MI300X": "mi300x"}  # fmt: skip
"""Part of a device's name, and the machine that pipecompile knows it by."""


def gpt2(device: str, layers: int = 0, width: int = 0) -> nn.Module:
    """124M parameters on a GPU, a narrow one on the CPU; without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: Any = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
    if device == "cpu":
        sizes = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128, "vocab_size": 256}
    sizes |= {"n_layer": layers} if layers else {}
    sizes |= {"n_embd": width} if width else {}
    off: Any = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **off, use_cache=False)).to(device)


def llama(device: str, layers: int = 0, width: int = 0) -> nn.Module:
    """About 0.4 G parameters in bfloat16 on a GPU, a narrow one in float32 on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Any = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "vocab_size": 32000}
    heads: Any = {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 2048}
    if device == "cpu":
        sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "vocab_size": 256}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    sizes |= {"num_hidden_layers": layers} if layers else {}
    sizes |= {"hidden_size": width} if width else {}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False))
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)


MODELS: dict[str, Callable[..., nn.Module]] = {"gpt2": gpt2, "llama": llama}


def make(name: str, device: str, microbatches: int, layers: int = 0, width: int = 0) -> tuple[nn.Module, Batch]:
    """A model and a batch for it: 4 rows of 1024 tokens a microbatch on a GPU, 2 of 32 on the CPU, or of 128 if wide."""
    torch.manual_seed(0)
    model = MODELS[name](device, layers, width)
    rows, length = (4, 1024) if device == "cuda" else (2, 128 if width else 32)
    tokens = torch.randint(model.config.vocab_size, (rows * microbatches, length), device=device)
    return model, {"input_ids": tokens, "labels": tokens}


def hardware(device: str) -> Result:
    """What the figures depend on."""
    found: Result = {"device": device, "torch": torch.__version__, "python": platform.python_version()}
    if device == "cpu":
        return found | {"name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(0)
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    return found | {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory": properties.total_memory,
        "cuda": torch.version.cuda,
        "nccl": nccl,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def machine_of(device: str) -> str:
    """The name by which pipecompile knows the device; empty if it does not."""
    if device == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(0).replace(" ", "-")
    return next((known for part, known in MACHINES.items() if part in name), "")


def arguments(what: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, if the device is there."""
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu shows that the script works, not how fast a GPU is")
    return options


def tell(result: Result, options: argparse.Namespace) -> int:
    """Print a result; the exit code."""
    if options.json:
        print(json.dumps(hardware(options.device) | result))
    else:
        for row in result["rows"]:
            print("  ".join(f"{key} {_shown(value)}" for key, value in row.items()))
        print({key: value for key, value in result.items() if key != "rows"} | hardware(options.device))
    return int(not result["ok"])


def _shown(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
