"""Random numbers that depend on (step, microbatch, call) and on nothing else: not on stages, schedule or ranks.

Before each forward of a microbatch the generators are seeded for (seed, step, microbatch). Each module that draws random
numbers in its own forward has a hook that starts the next stream when it is called, so the k-th call of such modules
draws from stream k; a stage, which begins somewhere in the middle, says which stream comes next. Everything is kept in
the generator's own seed, so activation checkpointing, which restores the generator, replays the same numbers:

    bits 63..52  a mark that the seed is ours      bits 51..32  the stream      bits 31..0  what mt19937 and Philox mix
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

MARK = 0x5EED >> 4
STREAMS = 1 << 20
STRIDE = 0x9E3779B1
WORD = 1 << 32


def _seed(base: int, stream: int) -> int:
    return MARK << 52 | (stream % STREAMS) << 32 | (base + stream * STRIDE) % WORD


def _read(seed: int) -> tuple[int, int] | None:
    """(base, stream) of a seed of ours, None of any other."""
    if seed >> 52 != MARK:
        return None
    stream = seed >> 32 & STREAMS - 1
    return (seed - stream * STRIDE) % WORD, stream


def generators() -> list[torch.Generator]:
    """The generators that operations draw from."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return [torch.default_generator, torch.cuda.default_generators[torch.cuda.current_device()]]
    return [torch.default_generator]


def begin_microbatch(seed: int, step: int, microbatch: int) -> None:
    """Seed the generators for the forward of a microbatch."""
    digest = hashlib.sha256(f"{seed} {step} {microbatch}".encode()).digest()
    for generator in generators():
        generator.manual_seed(_seed(int.from_bytes(digest[:4], "little"), 0))


def reseed(stream: int) -> None:
    """Go to a stream of the microbatch that is running; outside of a pipeline's step, do nothing."""
    for generator in generators():
        if found := _read(generator.initial_seed()):
            generator.manual_seed(_seed(found[0], stream))


def next_stream(module: nn.Module, args: Any) -> None:
    """The hook of modules that draw random numbers."""
    for generator in generators():
        if found := _read(generator.initial_seed()):
            generator.manual_seed(_seed(found[0], found[1] + 1))


def watch(model: nn.Module, fqns: Iterable[str]) -> None:
    """Give the named modules the hook, once; names that ``model`` lacks (another rank's) are passed over."""
    for fqn in fqns:
        try:
            module = model.get_submodule(fqn)
        except AttributeError:
            continue
        if next_stream not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(next_stream)


@contextmanager
def own_streams() -> Iterator[None]:
    """The caller's random state is afterwards as it was."""
    states = [(generator, generator.get_state()) for generator in generators()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
