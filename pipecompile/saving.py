"""Saves and loads what a process has of a pipeline: each rank its own shards, rank 0 the index last.

all ranks   rank 0 makes the folder ─▶ each writes its shards ─▶ rank 0 writes the index and gives the folder its name
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipecompile.errors import CheckpointError
from pipecompile.runtime import any_failed, from_first_rank
from pipecompile.weights import folder, optimizer_state, random_state, writing
from pipecompile.weights.checkpoint import Checkpoint, open_checkpoint
from pipecompile.weights.layout import Layout, everything
from pipecompile.weights.tensor_file import Entry, read_header, write_tensors

FORMAT = "pipecompile checkpoint"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Share:
    """What one process has: ``stages`` by index, of which ``holds`` gives the names for all; its rank of ``ranks``.

    Replicas have the same, of which the first writes. ``masters`` are what an optimizer trains in place of parameters, by
    their id().
    """

    layout: Layout
    holds: Sequence[Sequence[str]]
    stages: Mapping[int, nn.Module]
    rank: int
    ranks: int
    replica: int = 0
    masters: Mapping[int, nn.Parameter] = field(default_factory=dict)

    def names(self) -> dict[int, str]:
        """The canonical name of each parameter of this process, and of its master, by its id()."""
        canonical = self.layout.canonical
        found = {
            id(p): canonical.get(name, name)
            for stage in self.stages.values()
            for name, p in stage.named_parameters(remove_duplicate=False)
        }
        return found | {id(master): found[key] for key, master in self.masters.items()}

    def written_names(self) -> dict[int, str]:
        """The same without those that another process writes."""
        writers = self.layout.writers(self.holds)
        return {key: name for key, name in self.names().items() if writers.get(name) in self.stages}


def save_weights(share: Share, directory: str | Path) -> None:
    """Write a folder of weights that from_pretrained and load_state_dict read; older weights there are replaced whole."""
    target = Path(directory).absolute()

    def begin() -> None:
        folder.check_replaceable(target)
        folder.begin(target)

    def finish() -> None:
        writing.write_index(folder.partial(target), share.layout, share.holds)
        folder.finish_folder(target)

    on_first_rank(begin)
    on_every_rank(
        lambda: writing.write_shards(folder.partial(target), share.layout, share.holds, share.stages), share.replica
    )
    on_first_rank(finish)


def load_weights(share: Share, path: str | Path) -> None:
    """Fill the stages from a checkpoint of the whole model. CheckpointError names the tensor that does not fit."""
    checkpoint = open_checkpoint(path)
    groups = share.layout.groups()
    checkpoint.check_names(groups.values())
    for stage in share.stages.values():
        for name, tensor in everything(stage):
            if name in share.layout.canonical:
                checkpoint.read(groups[share.layout.canonical[name]], tensor)


def save_checkpoint(share: Share, directory: str | Path, step: int, optimizer: Optimizer) -> None:
    """Write weights, optimizer and random state as the newest checkpoint of ``directory``; the last two are kept."""
    target = folder.step_folder(Path(directory).absolute(), step)

    def write() -> None:
        writing.write_shards(folder.partial(target), share.layout, share.holds, share.stages)
        names = share.written_names()
        tensors, rest = optimizer_state.take(optimizer, names)
        tensors |= optimizer_state.masters_by_name(share.masters.values(), names)
        stem = f"optimizer-{share.rank + 1:05}-of-{share.ranks:05}"
        write_tensors(folder.partial(target) / f"{stem}.safetensors", tensors)
        folder.write_text(folder.partial(target) / f"{stem}.json", json.dumps(rest))

    def finish() -> None:
        index = writing.write_index(folder.partial(target), share.layout, share.holds)
        files = {path.name: path.stat().st_size for path in sorted(folder.partial(target).iterdir())}
        state = {"format": FORMAT, "version": VERSION, "step": step, "random": random_state.take(), "files": files}
        folder.write_text(folder.partial(target) / folder.STATE, json.dumps(state))
        folder.finish_step(target, index, share.layout.config)

    on_first_rank(lambda: folder.begin(target))
    on_every_rank(write, share.replica)
    on_first_rank(finish)


def load_training(share: Share, checkpoint: Path, optimizer: Optimizer) -> int:
    """Set the optimizer's and the random generators' state from a complete checkpoint; gives its step.

    CheckpointError if it is malformed, of another version, or of another optimizer.
    """
    whole = _read_json(checkpoint / folder.STATE)
    found = (whole.get("format"), whole.get("version")) if isinstance(whole, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise CheckpointError(
            f"{str(checkpoint)!r} is {found[0]!r} of version {found[1]!r}, but this pipecompile reads {FORMAT!r} of "
            f"version {VERSION}; resume with the version that wrote it"
        )
    try:
        _give(share, checkpoint, whole, optimizer)
        return int(whole["step"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} is malformed ({type(error).__name__}: {error}); resume from another one"
        ) from error


def _give(share: Share, checkpoint: Path, whole: dict[str, Any], optimizer: Optimizer) -> None:
    names = [str(name) for name in whole["files"]]
    files = [checkpoint / Path(name).name for name in names if name.startswith("optimizer-")]
    stored_tensors = _stored_tensors([path for path in files if path.suffix == ".safetensors"])
    rest = _merged([_read_json(path) for path in files if path.suffix == ".json"])
    mine = share.names()
    optimizer_state.give_masters(share.masters.values(), mine, stored_tensors)
    optimizer_state.give(optimizer, mine, rest, stored_tensors)
    random_state.give(whole["random"])


def check_start(directory: str | Path, step: int) -> None:
    """CheckpointError if ``directory`` has a later checkpoint than a run that starts after ``step`` steps."""
    later = [path for path in folder.complete(Path(directory)) if folder.step_of(path) > step]
    if later:
        raise CheckpointError(
            f"{str(directory)!r} has a checkpoint of step {folder.step_of(later[0])}, but this run starts at step {step} "
            "and would remove it; go on from it with --resume, or save to another directory"
        )


def on_first_rank(work: Callable[[], None]) -> None:
    """Do ``work`` on rank 0; if it fails, it fails on all processes."""

    def done() -> str:
        try:
            work()
        except OSError as error:
            raise _unwritable(error) from error
        return ""

    from_first_rank(done)


def on_every_rank(work: Callable[[], None], replica: int = 0) -> None:
    """Do ``work`` on every rank of the first replica; if it fails on one, it fails on all processes."""
    error: Exception | None = None
    try:
        if replica == 0:
            work()
    except Exception as caught:
        error = caught
    failed = any_failed(error is not None)
    if isinstance(error, OSError):
        raise _unwritable(error) from error
    if error is not None:
        raise error
    if failed:
        failure = CheckpointError("another rank could not write its part of the checkpoint; look at what it printed")
        failure.add_note("it says why itself")
        raise failure


def _unwritable(error: OSError) -> CheckpointError:
    return CheckpointError(f"the checkpoint cannot be written: {error}; give another directory")


def _stored_tensors(files: list[Path]) -> dict[str, optimizer_state.ReadTensor]:
    headers = {path: read_header(path) for path in files}
    places = {name: path for path, header in headers.items() for name in header}
    source = Checkpoint(files[0].parent, places, headers)

    def read(name: str, entry: Entry) -> Tensor:
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        source.read([name], tensor)
        return tensor

    return {name: partial(read, name, headers[path][name]) for name, path in places.items()}


def _merged(parts: list[Any]) -> dict[str, Any]:
    """The ranks' states as one; each has groups of its own."""
    whole: dict[str, Any] = {"class": parts[0]["class"], "groups": [], "parameters": {}}
    for part in parts:
        offset = len(whole["groups"])
        whole["groups"] += part["groups"]
        for name, state in part["parameters"].items():
            whole["parameters"][name] = state | {"group": state["group"] + offset}
    return whole


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read as JSON ({error}); resume from another one") from error
