"""Opens a build directory: its pipe, with the model that its file makes or with one process's share of it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from pipecompile.build import read_build
from pipecompile.build_files import plan_and_program
from pipecompile.errors import BuildError
from pipecompile.model_file import ModelFile, read_model_file
from pipecompile.part import stages_here
from pipecompile.pipe import Pipe
from pipecompile.weights.checkpoint import open_checkpoint
from pipecompile.weights.materialise import materialise


def read_files(directory: str | Path, trust: bool = False) -> dict[str, str]:
    """A build's files as text; BuildError if one was changed (unless trusted) or another version wrote it."""
    return {name: _text(name, content) for name, content in read_build(directory, trust=trust).items()}


def _text(name: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BuildError(f"the build's {name} is not UTF-8 at byte {error.start}; compile again") from error


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
    plan, program = plan_and_program(files)
    owned = {name for stage in stages_here(program, local)[1] for name in plan.holds[stage]}
    model = materialise(file.model, owned, open_checkpoint(weights) if weights is not None else None)
    return Pipe(files, model, file.loss, local=local, timeout_s=timeout_s), file


def _files_and_model_file(directory: str | Path, trust: bool) -> tuple[dict[str, str], ModelFile]:
    files = read_files(directory, trust)
    source = plan_and_program(files)[0].source
    if "file" not in source:
        raise BuildError(f"build {str(directory)!r} was made in Python, not of a model file; use pipecompile.load")
    return files, read_model_file(Path(directory).resolve() / source["file"], "" if trust else source["sha256"])
