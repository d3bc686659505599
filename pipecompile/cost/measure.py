"""Measured costs: every distinct node of a graph is run a few times on one real microbatch, forward and backward apart.

The graph is run once without gradients, which gives each node its real inputs. A node whose key is not in the cache is
then timed on copies of them: warm-up, then runs until enough time has passed, of which the median counts. When every
key is known, nothing runs. The model is left as it was: parameters, gradients, buffers and random state.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from pipecompile.cost.cache import add_to_cache, default_cache, read_cache
from pipecompile.cost.graph import NodeCost
from pipecompile.cost.interpreter import Interpreter, references
from pipecompile.cost.key import environment, node_key, specs
from pipecompile.cost.trial import Clock, Times, Trial
from pipecompile.errors import CostError
from pipecompile.ir import Graph

FEWEST, MOST, BUDGET_S = 3, 100, 0.05
"""A node is timed at least 3 times, then until 0.05 s have passed, but not more than 100 times."""
NOISE, PATIENCE_S = 1.5, 0.5
"""On a busy machine, where the median is more than 1.5 times the least, timing goes on for up to 0.5 s."""
TOO_NOISY = 3.0
"""Where the median stays above 3 times the least, the cost is used once and not kept."""
SLOW_S = 0.5
"""A node that warms up for longer is slow: its second run already counts."""


def measure(
    graph: Graph, model: nn.Module, batch: Any, cache_path: str | Path | None = None, progress: bool = True
) -> dict[str, NodeCost]:
    """The cost of each node that is not replicated, in milliseconds and bytes for one microbatch ``batch``.

    ``cache_path`` is a file of ours (``default_cache()`` unless given). A progress bar shows on stderr if that is a
    terminal. CostError if a node cannot be run.
    """
    path = Path(cache_path) if cache_path is not None else default_cache()
    device = _device(graph, model)
    with _threads_of_a_rank(device):
        known, around = specs(graph), environment(device)
        owned = [node for node in graph.nodes if node.name not in graph.replicated]
        keys = {node.name: node_key(node, graph, model, known, around) for node in owned}
        costs = read_cache(path)
        missing = {keys[node.name]: node for node in reversed(owned) if keys[node.name] not in costs}
        if missing:
            wanted = {node.name: key for key, node in missing.items()}
            fresh, noisy = _measure_missing(graph, model, batch, wanted, progress)
            add_to_cache(path, {key: cost for key, cost in fresh.items() if key not in noisy})
            costs |= fresh
            if noisy:
                warnings.warn(_busy(len(noisy), len(fresh)), stacklevel=2)
    return {name: costs[key] for name, key in keys.items()}


def _busy(noisy: int, measured: int) -> str:
    return (
        f"the machine is busy: the times of {noisy} of {measured} parts scatter by more than {TOO_NOISY:g} times, so the "
        "forecast is rough; they are not kept and will be measured again by the next compilation"
    )


@contextmanager
def _threads_of_a_rank(device: torch.device) -> Iterator[None]:
    """On CPU, as many threads as torchrun gives to each rank: OMP_NUM_THREADS, 1 unless that is set."""
    before = torch.get_num_threads()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device(graph: Graph, model: nn.Module) -> torch.device:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if any(device.type == "meta" for device in devices):
        raise CostError("the model has parameters on the meta device, which cannot be run; use --costs estimate")
    return next(iter(devices), torch.device("cpu"))


def _measure_missing(
    graph: Graph, model: nn.Module, batch: Any, wanted: Mapping[str, str], progress: bool
) -> tuple[dict[str, NodeCost], set[str]]:
    """Costs by key of the nodes that ``wanted`` maps to theirs, and the keys of those whose times scatter."""
    interpreter, known = Interpreter.of(graph, model), specs(graph)
    nodes = graph.nodes[: max(index for index, node in enumerate(graph.nodes) if node.name in wanted) + 1]
    last = {value: index for index, node in enumerate(nodes) for value in references(node)}
    silent = not (progress and sys.stderr.isatty())
    found: dict[str, NodeCost] = {}
    noisy: set[str] = set()
    with _unchanged(interpreter), Progress(console=Console(stderr=True), transient=True, disable=silent) as bar:
        task = bar.add_task("Measuring", total=len(wanted))
        values = interpreter.inputs(batch)
        clock = Clock.of(interpreter.device)
        clock.watch.warm_up(interpreter.device)
        overhead = clock.overhead(MOST)
        for index, node in enumerate(nodes):
            try:
                if node.name in wanted:
                    key = wanted[node.name]
                    found[key], scatter = _measure_node(Trial(interpreter, node, values, known), overhead)
                    noisy |= {key} if scatter > TOO_NOISY else set()
                    bar.advance(task)
                with torch.no_grad():
                    values |= interpreter.run(node, values)
            except Exception as error:
                raise CostError(
                    f"node {node.name!r} ({node.target}) cannot be measured: {error}; use --costs estimate or a file"
                ) from error
            for value in [value for value in references(node) if last[value] == index]:
                del values[value]
    return found, noisy


@contextmanager
def _unchanged(interpreter: Interpreter) -> Iterator[None]:
    """Put the modules' attributes, the buffers, the constants that nodes write on, and the random state back at the end."""
    modules = [(module, dict(vars(module)), dict(module._buffers)) for module in interpreter.model.modules()]
    written = {fqn for node in interpreter.graph.nodes for fqn in node.written_buffers}
    kept = [tensor for _, _, buffers in modules for tensor in buffers.values() if tensor is not None]
    kept += [tensor for fqn, tensor in interpreter.graph.constants.items() if fqn in written]
    contents = [tensor.detach().clone() for tensor in kept]
    device = interpreter.device
    seeded = [] if device.type == "cpu" else [device.index or 0]
    try:
        with torch.random.fork_rng(seeded, device_type="cuda" if device.type == "cpu" else device.type):
            yield
    finally:
        for module, attributes, buffers in modules:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, content in zip(kept, contents):
                tensor.copy_(content)


def _measure_node(trial: Trial, overhead: Times) -> tuple[NodeCost, float]:
    """Its cost, and the median of its times over the least."""
    begin = time.perf_counter()
    saved = trial.saved_bytes()
    first = trial.times()
    rows = [first] if time.perf_counter() - begin > SLOW_S else []
    begin = time.perf_counter()
    while len(rows) < FEWEST or (len(rows) < MOST and time.perf_counter() - begin < _budget_s(rows)):
        rows.append(trial.times())
    whole = _median(rows)
    forward, backward, inputs_only = (
        max(0.0, getattr(whole, what) - getattr(overhead, what)) for what in ("forward", "backward", "inputs_only")
    )
    return NodeCost(forward, backward, saved, max(0.0, backward - inputs_only)), _scatter(rows)


def _budget_s(rows: Sequence[Times]) -> float:
    return PATIENCE_S if _scatter(rows) > NOISE else BUDGET_S


def _scatter(rows: Sequence[Times]) -> float:
    whole = [row.forward + row.backward for row in rows]
    return statistics.median(whole) / max(min(whole), 1e-9)


def _median(rows: Sequence[Times]) -> Times:
    return Times(
        statistics.median(row.forward for row in rows),
        statistics.median(row.backward for row in rows),
        statistics.median(row.inputs_only for row in rows),
    )
