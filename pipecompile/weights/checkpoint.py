"""A checkpoint to read from: one safetensors file, or a Hugging Face index with the files that it names."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from pipecompile.errors import CheckpointError
from pipecompile.weights.tensor_file import Entry, read_header, read_tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHOWN = 3
"""How many names an error lists."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors by name. ``file_of`` says where each is; only the files whose tensors are read are opened."""

    path: Path
    file_of: Mapping[str, Path]
    _headers: dict[Path, dict[str, Entry]] = field(default_factory=dict)

    def check_names(self, groups: Iterable[Sequence[str]]) -> None:
        """CheckpointError unless the checkpoint has one name at least of each group, and no name that is in none."""
        groups = list(groups)
        missing = [names[0] for names in groups if not any(name in self.file_of for name in names)]
        known = {name for names in groups for name in names}
        extra = [name for name in self.file_of if name not in known]
        if missing:
            raise CheckpointError(
                f"checkpoint {str(self.path)!r} lacks {_listed(missing)}, which the model has"
                f"{f', and has {_listed(extra)} instead' if extra else ''}; give a checkpoint of this model, whose "
                "names are those of model.state_dict()"
            )
        if extra:
            raise CheckpointError(
                f"checkpoint {str(self.path)!r} has {_listed(extra)}, which the model has not; "
                "give a checkpoint of this model, or remove them from it"
            )

    def read(self, names: Sequence[str], into: Tensor) -> None:
        """Fill a tensor, which the checkpoint has under one of ``names``; CheckpointError for another shape or dtype."""
        name = next((name for name in names if name in self.file_of), None)
        if name is None:
            raise CheckpointError(
                f"checkpoint {str(self.path)!r} lacks {_listed(names)}; give a checkpoint of this model"
            )
        path = self.file_of[name]
        entry = self._header(path).get(name)
        if entry is None:
            raise CheckpointError(
                f"tensor {name!r} is not in {str(path)!r}, where the index puts it; copy or download the checkpoint again"
            )
        _check(name, path, entry, into)
        read_tensor(path, name, entry, into)

    def _header(self, path: Path) -> dict[str, Entry]:
        if path not in self._headers:
            self._headers[path] = read_header(path)
        return self._headers[path]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at ``path``: a .safetensors file, an index, or a folder with either. CheckpointError if none is."""
    place = Path(path)
    if place.is_dir():
        found = [place / name for name in (INDEX, SINGLE) if (place / name).is_file()]
        if not found:
            raise CheckpointError(
                f"{str(place)!r} has neither {INDEX} nor {SINGLE}; give a folder that has, or a .safetensors file"
            )
        place = found[0]
    if place.suffix == ".json":
        return _open_index(place)
    headers = {place: read_header(place)}
    return Checkpoint(place, dict.fromkeys(headers[place], place), headers)


def _open_index(path: Path) -> Checkpoint:
    try:
        whole: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the index {str(path)!r} cannot be read as JSON ({error}); copy or download it again"
        ) from error
    places = whole.get("weight_map") if isinstance(whole, dict) else None
    if not isinstance(places, dict):
        raise CheckpointError(f"the index {str(path)!r} has no weight_map from names to files; download it again")
    return Checkpoint(path, {name: path.parent / _inside(name, file, path) for name, file in places.items()})


def _inside(name: str, file: Any, path: Path) -> PurePosixPath:
    """A file that an index names, which must be a path that stays in the index's folder: the index is untrusted."""
    plain = isinstance(file, str) and not any(character in file for character in "\\:\0")
    inside = PurePosixPath(file) if plain else PurePosixPath("/")
    if inside.is_absolute() or inside.suffix != ".safetensors" or ".." in inside.parts:
        raise CheckpointError(
            f"the index {str(path)!r} puts tensor {name!r} into {file!r}, which is no safetensors file inside of its "
            "folder; expected a name such as 'model-00001-of-00002.safetensors'"
        )
    return inside


def _check(name: str, path: Path, entry: Entry, into: Tensor) -> None:
    if entry.shape != tuple(into.shape):
        raise CheckpointError(
            f"tensor {name!r} in {str(path)!r} has shape {list(entry.shape)}, but the model's has {list(into.shape)}; "
            "give a checkpoint of this model, or change the model's configuration"
        )
    if entry.dtype != into.dtype:
        ours, theirs = (str(dtype).removeprefix("torch.") for dtype in (into.dtype, entry.dtype))
        raise CheckpointError(
            f"tensor {name!r} in {str(path)!r} is {theirs}, but the model's is {ours}; convert the checkpoint, "
            f"or let model() make a model in {theirs} (for example with .to(torch.{theirs}))"
        )


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:SHOWN])
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown
