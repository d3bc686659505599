"""Peak memory of a rank that makes its part of a model of 1 GB, by the initialiser and from a checkpoint.

Each rank is a process of its own; the peak is the kernel's, from before the model is made:

    python -m benchmarks.weights            all ranks, against 1.1 × own share + the largest tensor
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from pipecompile.weights.checkpoint import open_checkpoint
from pipecompile.weights.layout import everything
from pipecompile.weights.materialise import materialise
from pipecompile.weights.tensor_file import write_tensors

LAYERS, RANKS = 16, 4
MIB = 1 << 20


def model(layers: int = LAYERS) -> nn.Module:
    """A Llama of 1034 MiB in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=512))


def bytes_of() -> dict[str, int]:
    """Bytes of each parameter and buffer, without making the model."""
    with torch.device("meta"):
        return {name: tensor.nbytes for name, tensor in everything(model())}


def share(rank: int) -> list[str]:
    """A quarter of the layers, and the embedding on the first rank, the head on the last."""

    def home(name: str) -> int:
        if name.startswith("model.layers."):
            return int(name.split(".")[2]) * RANKS // LAYERS
        return 0 if "embed" in name else RANKS - 1

    return [name for name in bytes_of() if "inv_freq" in name or home(name) == rank]


def memory(what: str) -> int:
    """VmRSS or VmHWM, the peak of it, in bytes."""
    rows = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    return int(rows[what].split()[0]) << 10


def measure(rank: int, checkpoint: str) -> None:
    """Make one rank's part in this process and print how far the memory rose."""
    torch.set_num_threads(1)
    owned = share(rank)
    materialise(lambda: nn.Linear(8, 8), ["weight"])  # what torch itself loads when it is first used
    before, begin = memory("VmRSS"), time.perf_counter()
    part = materialise(model, owned, open_checkpoint(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - begin
    assert all(not tensor.is_meta for name, tensor in everything(part) if name in owned)
    sizes = bytes_of()
    own, largest = sum(sizes[name] for name in owned), max(sizes.values())
    peak, bound = memory("VmHWM") - before, 1.1 * own + largest
    print(
        f"rank {rank}, {'checkpoint' if checkpoint else 'initialiser'}: peak {peak / MIB:.0f} MiB of {sum(sizes.values()) / MIB:.0f}, "
        f"own share {own / MIB:.0f}, largest tensor {largest / MIB:.0f}: {'within' if peak <= bound else 'OVER'} "
        f"1.1 × share + tensor = {bound / MIB:.0f}; {seconds:.1f} s",
        flush=True,
    )
    sys.exit(peak > bound)


def main() -> int:
    bad = 0
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.safetensors"
        write_tensors(path, dict(model().state_dict()))
        for checkpoint in ("", str(path)):
            for rank in range(RANKS):
                command = [sys.executable, "-m", "benchmarks.weights", str(rank), checkpoint]
                bad += subprocess.run(command, check=False).returncode
    return int(bad > 0)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]), sys.argv[2])
    sys.exit(main())
