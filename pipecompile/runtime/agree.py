"""What one rank works out for all: rank 0 computes a text, every rank gets the same one, or the same error."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
import torch.distributed as dist

from pipecompile.errors import RuntimeFault


def from_first_rank(make: Callable[[], str]) -> str:
    """``make()`` of rank 0 on every rank; in one process just ``make()``. Its error is raised on all ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return make()
    error: Exception | None = None
    outcome = {"text": "", "error": ""}
    if dist.get_rank() == 0:
        try:
            outcome["text"] = make()
        except Exception as caught:
            error = caught
            outcome["error"] = f"{type(caught).__name__}: {caught}"
    outcome = json.loads(_broadcast(json.dumps(outcome)))
    if error is not None:
        raise error
    if outcome["error"]:
        raise RuntimeFault(f"rank 0 failed: {outcome['error']}")
    return str(outcome["text"])


def _broadcast(text: str) -> str:
    """Rank 0's text on every rank."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    raw = text.encode() if dist.get_rank() == 0 else b""
    size = torch.tensor([len(raw)], device=device)
    dist.broadcast(size, 0)
    data = torch.empty(int(size), dtype=torch.uint8, device=device)
    if dist.get_rank() == 0:
        data.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
    dist.broadcast(data, 0)
    return bytes(data.cpu().tolist()).decode()
