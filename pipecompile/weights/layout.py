"""The names under which a model's tensors are stored: those of its ``state_dict``, and which of them are one tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Layout:
    """``canonical`` maps each name that a checkpoint of the model holds to the first name of the same tensor.

    Names of buffers that are not persistent are in no checkpoint. ``config`` is the text of the model's config.json,
    empty if it has none.
    """

    canonical: Mapping[str, str]
    config: str = ""

    @staticmethod
    def of(model: nn.Module) -> Layout:
        first: dict[int, str] = {}
        names = {name: first.setdefault(id(tensor), name) for name, tensor in stored(model)}
        return Layout(names, _config(model))

    def groups(self) -> dict[str, list[str]]:
        """All names of each tensor, by its canonical one."""
        found: dict[str, list[str]] = {}
        for name, canonical in self.canonical.items():
            found.setdefault(canonical, []).append(name)
        return found

    def writers(self, holds: Iterable[Iterable[str]]) -> dict[str, int]:
        """The stage that writes each tensor (by canonical name): the first of those that hold it."""
        found: dict[str, int] = {}
        for stage, names in enumerate(holds):
            for name in names:
                if name in self.canonical:
                    found.setdefault(self.canonical[name], stage)
        return found


def everything(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers under all their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and persistent buffers under all their names, in the order of the modules."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = prefix + "." if prefix else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield dot + name, tensor


def _config(model: nn.Module) -> str:
    """What transformers and diffusers write beside the weights, with the class that ``AutoModel`` shall make."""
    config: Any = getattr(model, "config", None)
    maker: Any = config if hasattr(config, "to_json_string") else model
    if not hasattr(maker, "to_json_string"):
        return ""
    whole = json.loads(maker.to_json_string())
    if maker is config:
        whole["architectures"] = [type(model).__name__]
    return json.dumps(whole, indent=2, sort_keys=True) + "\n"
