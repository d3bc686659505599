"""What all processes settle together, outside of a step: a text that rank 0 computes for all, or whether one has failed.

Whoever has ended meanwhile is a PeerFault on the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256

import torch
import torch.distributed as dist

from pipecompile.errors import RuntimeFault
from pipecompile.runtime.faults import STORE_SECONDS, within
from pipecompile.runtime.links import broken


def from_first_rank(make: Callable[[], str]) -> str:
    """``make()`` of rank 0 on every rank; in one process just ``make()``. Its error is raised on all ranks."""
    if alone():
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
        failure = RuntimeFault(f"rank 0 failed: {outcome['error']}")
        failure.add_note("rank 0 says so itself")
        raise failure
    return str(outcome["text"])


def alone() -> bool:
    """Whether there is no other process."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def any_failed(failed: bool) -> bool:
    """Whether ``failed`` is true on any rank; all must call it."""
    if alone():
        return failed
    anyone = torch.tensor(int(failed), device=_device())
    with settling():
        dist.all_reduce(anyone, dist.ReduceOp.MAX)
    return bool(anyone)


def first_to_say(text: str) -> bool:
    """Whether no other process has said this before, as far as can be known."""
    if alone():
        return True
    store, key = dist.distributed_c10d._get_default_store(), f"pipecompile/said/{sha256(text.encode()).hexdigest()}"
    return within(STORE_SECONDS, lambda: store.add(key, 1)) in (1, None)


@contextmanager
def settling() -> Iterator[None]:
    """For what all processes do together: PeerFault if one of them ends."""
    try:
        yield
    except RuntimeError as error:
        raise broken("another rank") from error


def _broadcast(text: str) -> str:
    """Rank 0's text on every rank."""
    first, device = dist.get_rank() == 0, _device()
    raw = bytearray(text.encode())
    size = torch.tensor([len(raw)], device=device)
    with settling():
        dist.broadcast(size, 0)
        data = torch.empty(int(size), dtype=torch.uint8, device=device)
        if first:
            data.copy_(torch.frombuffer(raw, dtype=torch.uint8))
        dist.broadcast(data, 0)
    return bytes(data.cpu().tolist()).decode()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
