"""Which ends a group's channels have: by where the tensors are, and what the group carries.

tensors on    group carries      ends
CPU           host memory        GroupSender    GroupReceiver
CUDA          CUDA (NCCL)        StreamSender   StreamReceiver
CUDA          host memory        StagedSender   StagedReceiver     through pinned buffers
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from pipecompile.ir.lifetimes import Channel
from pipecompile.runtime.links import GroupReceiver, GroupSender, Specs
from pipecompile.runtime.staged_links import Allocate, StagedReceiver, StagedSender, pinned
from pipecompile.runtime.stream_links import StreamReceiver, StreamSender, over_nccl


@dataclass(frozen=True, slots=True)
class Ends:
    """Makes the ends of channels for tensors on ``device``; ``module`` is torch.cuda, or what stands for it."""

    kind: str
    device: torch.device
    module: Any = None
    allocate: Allocate = pinned

    @staticmethod
    def of(device: torch.device) -> Ends:
        """Those for a device and the process group that is there."""
        if device.type == "cpu":
            return Ends("host", device)
        return Ends("stream" if over_nccl(device) else "staged", device, torch.get_device_module(device))

    @property
    def on_device(self) -> bool:
        """Whether the device itself sends and receives, in the order of its streams."""
        return self.kind == "stream"

    def sender(
        self, channel: Channel, group: Any, messages: Sequence[Specs], timeout: timedelta, slots: int
    ) -> GroupSender:
        source, target, _ = channel
        common = (group, int(source > target), target, messages, timeout)
        if self.kind == "staged":
            return StagedSender(*common, self.module, slots, self.allocate)
        make: Callable[..., GroupSender] = StreamSender if self.on_device else GroupSender
        return make(*common)

    def receiver(self, channel: Channel, group: Any, messages: Sequence[Specs], timeout: timedelta) -> GroupReceiver:
        source, target, _ = channel
        common = (group, int(target > source), source, messages, timeout, self.device)
        if self.kind == "staged":
            return StagedReceiver(*common, self.module, self.allocate)
        make: Callable[..., GroupReceiver] = StreamReceiver if self.on_device else GroupReceiver
        return make(*common)
