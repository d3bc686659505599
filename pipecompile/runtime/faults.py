"""The first failure of any rank, known to all: kept in the store that started the processes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from pipecompile.errors import RuntimeFault
from pipecompile.runtime.stream_links import set_up_nccl

STORE_SECONDS = 3.0
"""How long a failing rank tries to reach the store, which may be gone with the process that held it."""


class FirstFault:
    """Whoever fails first writes why; everyone who fails later reads that."""

    def __init__(self, store: Any, key: str) -> None:
        self._store = store
        self.key = key

    def record(self, message: str) -> str:
        """The first rank's message: ``message`` if no rank has failed before, or if the store is gone."""
        first = within(STORE_SECONDS, lambda: self._store.compare_set(self.key, "", message))
        return message if first is None else str(first.decode(errors="replace"))


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What ``work`` gives; None if it takes longer than ``seconds``, or raises what a store raises."""
    answer: list[Any] = []

    def guarded() -> None:
        with suppress(RuntimeError, OSError):
            answer.append(work())

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else None


def kept_by_torchrun() -> bool:
    """Whether torchrun's agent keeps the store, which then outlives every rank."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def check_in(store: Any, rank: int, ranks: int, what: str, timeout_s: float) -> None:
    """Return when all ``ranks`` have reached ``what``; RuntimeFault names those that are not there in ``timeout_s``."""
    store.set(f"{what}/{rank}", "here")
    deadline = time.monotonic() + timeout_s
    missing: list[int] = []
    for other in range(ranks):
        try:
            store.wait([f"{what}/{other}"], timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
        except dist.DistNetworkError as error:
            if not missing:
                raise RuntimeFault(
                    f"rank {rank} lost the store while it waited for rank {other}: the process that keeps it, rank 0 "
                    "or torchrun, has ended; look at what it printed"
                ) from error
            break
        except RuntimeError:
            missing.append(other)
    if missing:
        names = ", ".join(map(str, missing))
        raise RuntimeFault(
            f"rank {rank} waited {timeout_s:g} s for rank{'s'[: len(missing) - 1]} {names} of {ranks}, "
            "which did not start; look at what they printed, start all of them, or allow more time with timeout_s="
        )


def connect(backend: str = "gloo", timeout_s: float = 300.0) -> None:
    """Join the process group that torchrun's environment describes; RuntimeFault names ranks that are missing."""
    limit = timedelta(seconds=timeout_s)
    if "nccl" in backend:
        set_up_nccl()
    try:
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except KeyError as error:
        raise RuntimeFault(f"the environment has no {error}; start the program with torchrun, which sets it") from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        home = TCPStore(
            host, port, None, rank == 0 and not kept_by_torchrun(), limit, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        raise RuntimeFault(
            f"nothing answered at {host}:{port} within {timeout_s:g} s: rank 0, which keeps the store, did not start; "
            "look at what it printed"
        ) from error
    store = PrefixStore(f"pipecompile/attempt {attempt}", home)
    check_in(store, rank, ranks, "start", timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=limit)
