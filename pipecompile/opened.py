"""Opens a build directory: its pipe, with the model that its file makes or with one process's share of it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from pipecompile.build import read_build
from pipecompile.build_files import json_of
from pipecompile.errors import BuildError
from pipecompile.ir import Program
from pipecompile.model_file import ModelFile, read_model_file
from pipecompile.part import stages_here
from pipecompile.pipe import Pipe
from pipecompile.plan import Plan
from pipecompile.weights.checkpoint import open_checkpoint
from pipecompile.weights.materialise import materialise


def read_files(directory: str | Path, trust: bool = False) -> dict[str, str]:
    """A build's files as text; BuildError if one was changed (unless trusted) or another version wrote it."""
    return {name: content.decode() for name, content in read_build(directory, trust=trust).items()}


def open_build(
    directory: str | Path, trust: bool = False, *, local: bool = False, timeout_s: float = 300.0
) -> tuple[Pipe, nn.Module, ModelFile]:
    """A build made from a model file: its pipe, the model that the file makes, and the file."""
    files, file = _files_and_model_file(directory, trust)
    model = file.model()
    return Pipe(files, model, file.loss, local=local, timeout_s=timeout_s), model, file


def open_share(
    directory: str | Path,
    trust: bool = False,
    *,
    local: bool = False,
    timeout_s: float = 300.0,
    weights: str | Path | None = None,
) -> tuple[Pipe, ModelFile]:
    """A build's pipe with this process's part of the model, the only one that is ever in memory; and the model file.

    The values are those of the file's ``model()``, or of the checkpoint ``weights``.
    """
    files, file = _files_and_model_file(directory, trust)
    plan = Plan.from_json(json_of(files, "plan.json"))
    program = Program.from_json(json_of(files, "program.json"))
    owned = {name for stage in stages_here(program, local)[1] for name in plan.holds[stage]}
    model = materialise(file.model, owned, open_checkpoint(weights) if weights is not None else None)
    return Pipe(files, model, file.loss, local=local, timeout_s=timeout_s), file


def _files_and_model_file(directory: str | Path, trust: bool) -> tuple[dict[str, str], ModelFile]:
    files = read_files(directory, trust)
    source = Plan.from_json(json_of(files, "plan.json")).source
    if "file" not in source:
        raise BuildError(f"build {str(directory)!r} was made in Python, not of a model file; use pipecompile.load")
    return files, read_model_file(Path(directory).resolve() / source["file"], "" if trust else source["sha256"])
