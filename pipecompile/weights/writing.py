"""Writes a model's weights as shards, one for each stage that has any, and the index that Hugging Face's loaders read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pipecompile.errors import CheckpointError
from pipecompile.weights.checkpoint import INDEX
from pipecompile.weights.folder import CONFIG, write_text
from pipecompile.weights.layout import Layout, everything
from pipecompile.weights.tensor_file import read_header, write_tensors

METADATA = {"format": "pt"}
"""What transformers wants to find in each file."""

Holds = Sequence[Sequence[str]]
"""For each stage the names of all that it holds."""


def shard_names(layout: Layout, holds: Holds) -> dict[int, str]:
    """The file of each stage that writes one. Names come from numbers alone."""
    stages = sorted(set(layout.writers(holds).values()))
    return {stage: f"model-{k:05}-of-{len(stages):05}.safetensors" for k, stage in enumerate(stages, 1)}


def write_shards(folder: Path, layout: Layout, holds: Holds, stages: Mapping[int, nn.Module]) -> None:
    """Write the shards of ``stages``. A tensor that several stages hold is in the first one's, under all its names."""
    writers, groups, files = layout.writers(holds), layout.groups(), shard_names(layout, holds)
    for index, stage in stages.items():
        here = {layout.canonical.get(name, name): tensor for name, tensor in everything(stage)}
        own = [canonical for canonical, writer in writers.items() if writer == index]
        if own:
            tensors = {name: here[canonical] for canonical in own for name in groups[canonical]}
            write_tensors(folder / files[index], tensors, METADATA)


def write_index(folder: Path, layout: Layout, holds: Holds) -> dict[str, Any]:
    """Write the index of the shards in ``folder``, after all of them, and config.json. Gives the index.

    CheckpointError if a tensor of the model is in no shard.
    """
    places: dict[str, str] = {}
    total = 0
    for file in shard_names(layout, holds).values():
        header = read_header(folder / file)
        places |= dict.fromkeys(header, file)
        total += sum(entry.end - entry.begin for entry in header.values())
    lost = [name for name in layout.canonical if name not in places]
    if lost:
        raise CheckpointError(f"no stage holds tensor {lost[0]!r} of the model; compile the build again")
    index = {
        "metadata": {"total_size": total, **METADATA},
        "weight_map": {name: places[name] for name in layout.canonical},
    }
    write_text(folder / INDEX, json.dumps(index, indent=2))
    if layout.config:
        write_text(folder / CONFIG, layout.config)
    return index
