"""Runs a function in several processes that torch.distributed joins, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.distributed import TCPStore

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "tests.runtime.processes",
        "tests.runtime.handmade",
        "pipecompile.api",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.t5.modeling_t5",
        "diffusers.models.unets.unet_2d",
    ]
)
"""Imports that all processes share: each is forked from one that has done them."""


def run(
    work: Callable[..., Any],
    ranks: int,
    *arguments: Any,
    absent: tuple[int, ...] = (),
    agent: bool = False,
    timeout_s: float = 60,
) -> list[Any]:
    """What ``work(rank, *arguments)`` gives on each rank; the text of its exception; None if its process died.

    ``absent`` ranks are not started. ``agent``: the store is kept here, as torchrun's agent does, not by rank 0.
    """
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False) if agent else None
    port = store.port if store else free_port()
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    environment["TORCHELASTIC_USE_AGENT_STORE"] = str(agent)
    started: dict[int, Any] = {}
    for rank in set(range(ranks)) - set(absent):
        here, there = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_rank, args=(work, rank, environment, arguments, there), daemon=True)
        process.start()
        there.close()
        started[rank] = (process, here)
    results: list[Any] = [None] * ranks
    for rank, (process, here) in started.items():
        try:
            results[rank] = here.recv() if here.poll(timeout_s) else f"no answer within {timeout_s} s"
        except EOFError:
            results[rank] = None
        process.join(5)
        process.kill()
    return results


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _rank(
    work: Callable[..., Any], rank: int, environment: dict[str, str], arguments: tuple[Any, ...], answer: Connection
) -> None:
    torch.set_num_threads(1)
    os.environ |= environment | {"RANK": str(rank)}
    try:
        result = work(rank, *arguments)
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    answer.send(result)
    answer.close()
    os._exit(0)
