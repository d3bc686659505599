"""Runs a function in several processes that torch.distributed joins, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.runtime.processes", "tests.runtime.handmade"])


def run(work: Callable[..., Any], ranks: int, *arguments: Any, absent: tuple[int, ...] = ()) -> list[Any]:
    """What ``work(rank, *arguments)`` gives on each rank; the text of its exception; None if its process died.

    ``absent`` ranks are not started.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started: dict[int, Any] = {}
    for rank in set(range(ranks)) - set(absent):
        here, there = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_rank, args=(work, rank, ranks, port, arguments, there), daemon=True)
        process.start()
        there.close()
        started[rank] = (process, here)
    results: list[Any] = [None] * ranks
    for rank, (process, here) in started.items():
        try:
            results[rank] = here.recv() if here.poll(60) else "no answer within 60 s"
        except EOFError:
            results[rank] = None
        process.join(5)
        process.kill()
    return results


def _rank(
    work: Callable[..., Any], rank: int, ranks: int, port: int, arguments: tuple[Any, ...], answer: Connection
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    try:
        result = work(rank, *arguments)
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    answer.send(result)
    answer.close()
    os._exit(0)
