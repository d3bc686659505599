"""The user's model file: ``model()`` and ``batch()``, optionally ``loss(model, batch)`` and ``optimizer(parameters)``."""

from __future__ import annotations

import hashlib
import importlib.util
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from pipecompile.errors import BuildError, CaptureError

LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What a model file defines, and its path and SHA-256."""

    path: Path
    sha256: str
    make_model: Callable[[], nn.Module]
    make_batch: Callable[[], Any]
    loss: Callable[[nn.Module, Any], Any] | None
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

    def model(self, seed: int = 0) -> nn.Module:
        """A new model, initialised under ``seed``: the same weights in every process."""
        _seed(seed)
        return self.make_model()

    def batch(self, seed: int = 0) -> Any:
        """The next whole batch, drawn under ``seed``: the same in every process."""
        _seed(seed)
        return self.make_batch()


def _seed(seed: int) -> None:
    """Seed what a model file may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


def default_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE)


def read_model_file(path: str | Path, sha256: str = "") -> ModelFile:
    """Run a model file and take its functions; CaptureError if it lacks one, BuildError if ``sha256`` is another's."""
    file = Path(path).resolve()
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CaptureError(
            f"the model file {str(path)!r} cannot be read: {error.strerror}; give the path of one"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if sha256 and found != sha256:
        raise BuildError(f"{file.name} was changed since the build was made of it; compile again, or use --trust")
    spec = importlib.util.spec_from_file_location(f"pipecompile_model_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise CaptureError(f"the model file {str(path)!r} is no Python file; expected a name that ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CaptureError(
            f"the model file {str(path)!r} fails when it is run: {type(error).__name__}: {error}"
        ) from error
    for name, purpose in (("model", "returns the nn.Module"), ("batch", "returns a whole batch, a dict or a tuple")):
        if not callable(getattr(module, name, None)):
            raise CaptureError(f"{file.name} has no function {name}(); add one that {purpose}")
    return ModelFile(
        path=file,
        sha256=found,
        make_model=module.model,
        make_batch=module.batch,
        loss=getattr(module, "loss", None),
        optimizer=getattr(module, "optimizer", default_optimizer),
    )
