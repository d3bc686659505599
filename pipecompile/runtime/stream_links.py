"""Messages over NCCL: the host launches them and goes on; streams of the device wait for each other.

torch.distributed runs each communicator on a stream of its own, which first waits for what the caller's current stream
has been given; ``work.wait()`` makes the current stream wait for the communicator's. (With a timeout it would block the
host instead, and ask once in a millisecond.) So everything is allocated, read and let go in the order of the compute
stream, the allocator may use memory again at once, and neither ``record_stream`` nor an event of our own is needed:

    compute       F0 ─┬──────────── F1 ── wait(m0 sent): m0's memory goes back ── wait(r0) ── B0 (reads r0)
    0>1 F             └▶ send m0 ────────────┘                                    │
    1>0 B                    └ posted before F1 ▶ recv r0 ────────────────────────┘

A posted receive is a kernel that spins until its message is there, so ``StreamChannels`` posts it no earlier than the
computation before it needs. It is never later than it stands in the row, which ``verify`` has proved free of wait cycles
for sends that wait for their receivers and one in-order stream for each channel.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipecompile.errors import RuntimeFault
from pipecompile.runtime.links import GroupReceiver, GroupSender, wait_for_all
from pipecompile.runtime.transport import Value

QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
DEFAULT_QUEUES, MOST_QUEUES = 8, 32
"""Hardware queues of a device. Streams that share one wait for each other, and a spinning receive would never end."""


def over_nccl(device: torch.device) -> bool:
    """Whether the process group carries this device's tensors on the device itself."""
    return device.type == "cuda" and "cuda:nccl" in dist.get_backend_config()


def backend_here() -> str:
    """The backend for this process: NCCL for CUDA tensors where each process of the host has a GPU of its own, which
    becomes its current device; gloo for all else.
    """
    local, processes = (
        int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if not (dist.is_nccl_available() and torch.cuda.device_count() >= processes):
        return "gloo"
    torch.cuda.set_device(local)
    return "cpu:gloo,cuda:nccl"


def set_up_nccl() -> None:
    """What NCCL and CUDA read when they start, unless the user has set it.

    As many hardware queues as there can be, so that no stream waits behind a receive; and an error on the device leaves
    the process alive to say where it was: ``DeviceWatch`` looks for errors itself.
    """
    os.environ.setdefault(QUEUES, str(MOST_QUEUES))
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")


def check_queues(communicators: int) -> None:
    """RuntimeFault if the streams of so many communicators and the compute stream would share hardware queues."""
    queues = int(os.environ.get(QUEUES, DEFAULT_QUEUES))
    if communicators < queues:
        return
    if communicators >= MOST_QUEUES:
        raise RuntimeFault(
            f"this rank exchanges messages over {communicators} channels and groups, but a device has {MOST_QUEUES} "
            "hardware queues; compile with fewer stages, or so that fewer ranks read each other's values"
        )
    raise RuntimeFault(
        f"this rank exchanges messages over {communicators} channels and groups, but {QUEUES} gives the device {queues} "
        f"hardware queues, and a receive would block what shares its queue; start with {QUEUES}={MOST_QUEUES}, or join "
        "with pipecompile.runtime.connect('nccl') before CUDA is used"
    )


def leave(group: Any, on_device: bool) -> None:
    """Break a group's connections; on a device without waiting for what hangs there."""
    if on_device:
        group.abort()
    else:
        dist.destroy_process_group(group)


class StreamSender(GroupSender):
    """Sends on the device."""

    def close(self) -> None:
        self._sent.clear()
        leave(self._group, on_device=True)

    def _wait(self, works: list[Any]) -> None:
        wait_for_all(works, None, self._peer)

    def _start(self, tensor: Tensor) -> Any:
        return super()._start(_raw(tensor))


class StreamReceiver(GroupReceiver):
    """Receives on the device what was posted before."""

    def begin(self) -> None:
        self._next = iter(self._messages)

    def post(self) -> None:
        """Start the next receive, behind everything that the current stream has been given so far."""
        self._post(next(self._next))

    def receive(self) -> Sequence[Value]:
        return self._arrived()

    def close(self) -> None:
        self._posted.clear()
        leave(self._group, on_device=True)

    def _wait(self, works: list[Any]) -> None:
        wait_for_all(works, None, self._peer)

    def _start(self, tensor: Tensor) -> Any:
        return super()._start(_raw(tensor))


def _raw(tensor: Tensor) -> Tensor:
    """Its bytes: NCCL knows fewer dtypes than torch."""
    return tensor.reshape(-1).view(torch.uint8)
