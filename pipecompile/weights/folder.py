"""Folders that appear whole: written under a hidden name, flushed to the disk, renamed.

    DIR/step-00000020/                  the newest checkpoint
    DIR/step-00000010/                  the one before it; older ones are removed
    DIR/.step-00000030.partial/         one that is being written, or was when its writer was killed
    DIR/model.safetensors.index.json    points into the newest checkpoint, so that DIR loads like a model's own folder

At every moment each folder with a final name is complete, and so is the one that the index points into.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from pipecompile.errors import CheckpointError
from pipecompile.weights.checkpoint import INDEX

KEPT = 2
STATE = "training.json"
CONFIG = "config.json"
STEP = re.compile(r"step-(\d{8,})")
PART = re.compile(r"\.step-\d+\.(partial|old)")
OURS = re.compile(r"(model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json|config\.json)")
EXCHANGE = 2
"""renameat2's flag that two names swap what they name."""
HERE = -100
"""renameat2's number for the current directory."""


def step_folder(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08}"


def partial(target: Path) -> Path:
    """Where the folder ``target`` is written before it gets its name."""
    return target.with_name(f".{target.name}.partial")


def begin(target: Path) -> None:
    """Make the folder in which ``target`` is written; what a killed writer left is removed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in [path for path in target.parent.iterdir() if PART.fullmatch(path.name)]:
            shutil.rmtree(left)
        shutil.rmtree(partial(target), ignore_errors=True)
        partial(target).mkdir()
    except OSError as error:
        raise CheckpointError(f"{str(target)!r} cannot be written: {error}; give another folder") from error


def finish_step(target: Path, index: dict[str, Any], config: str) -> None:
    """Give a written checkpoint its name, point the directory's index into it, and remove all but the last two."""
    directory = target.parent
    sync_folder(partial(target))
    if target.exists():  # a damaged one: a run does not start over a complete one
        _remove(target)
    partial(target).rename(target)
    sync_folder(directory)
    inside = {name: f"{target.name}/{file}" for name, file in index["weight_map"].items()}
    replace_text(directory / INDEX, json.dumps(index | {"weight_map": inside}, indent=2))
    if config:
        replace_text(directory / CONFIG, config)
    sync_folder(directory)
    for old in complete(directory)[KEPT:]:
        _remove(old)


def finish_folder(target: Path) -> None:
    """Give a written folder its name; what had it is replaced in one step where the system can do that."""
    fresh = partial(target)
    sync_folder(fresh)
    if not target.exists():
        fresh.rename(target)
    elif _exchange(fresh, target):
        shutil.rmtree(fresh)
    else:
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old)
    sync_folder(target.parent)


def check_replaceable(target: Path) -> None:
    """CheckpointError if ``target`` holds anything but weights that were written there before."""
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{str(target)!r} is a file; give the weights a folder of their own")
    foreign = sorted(path.name for path in target.iterdir() if not OURS.fullmatch(path.name)) if target.exists() else []
    if foreign:
        raise CheckpointError(
            f"{str(target)!r} also holds {foreign[0]!r}, which replacing it would delete; give another folder"
        )


def steps(directory: Path) -> list[Path]:
    """The folders named as checkpoints, newest first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints, newest first."""
    return [folder for folder in steps(directory) if not damage(folder)]


def newest(directory: str | Path) -> Path:
    """The newest complete checkpoint in ``directory``, or the directory itself if it is one. CheckpointError if none."""
    place = Path(directory)
    if (place / STATE).is_file():
        if found := damage(place):
            raise CheckpointError(f"checkpoint {str(place)!r} is not complete: {found}; resume from another one")
        return place
    if whole := complete(place):
        return whole[0]
    tried = "; ".join(f"{folder.name}: {damage(folder)}" for folder in steps(place))
    raise CheckpointError(
        f"{str(place)!r} has no complete checkpoint{f' ({tried})' if tried else ''}; "
        "give the directory that pipecompile run --save wrote"
    )


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files, empty if nothing is."""
    try:
        files = json.loads((folder / STATE).read_bytes())["files"]
        for name, size in files.items():
            if "/" in name:
                return f"{name!r} is no file of a checkpoint"
            if (found := (folder / name).stat().st_size) != size:
                return f"{name!r} has {found} bytes, expected {size}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def write_text(path: Path, text: str) -> None:
    """Write a file and flush it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write a file; at every moment there is the old one or the new one, whole."""
    fresh = path.with_name(f".{path.name}.partial")
    write_text(fresh, text)
    fresh.replace(path)


def _remove(folder: Path) -> None:
    """Remove a checkpoint: it loses its name before its files."""
    old = folder.with_name(f".{folder.name}.old")
    folder.rename(old)
    shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    try:
        swap = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return bool(swap(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0)
