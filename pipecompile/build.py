"""The build directory: written whole or not at all, and refused when a file in it is not the one that was written.

    build/plan.json  program.json  program.txt  stages/stage_0.py …  manifest.json

``manifest.json`` holds the sha256 of every other file. It guards against accidents and forgotten edits, not against
somebody who can write the directory: they can write the manifest too.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path, PurePosixPath

from pipecompile.errors import BuildError
from pipecompile.ir.json_text import parse, shortened

BUILD_VERSION = 1
FORMAT = "pipecompile build"
MANIFEST = "manifest.json"
LONGEST_NAME = 255
"""Bytes of a name in a folder, on every file system in use."""


def write_build(directory: str | Path, files: Mapping[str, str | bytes]) -> None:
    """Write ``files`` (path in the build, ``/`` between folders: contents) as a build; an older build there is replaced.

    Everything is written beside ``directory`` and renamed into place, so that a failure leaves the older build as it
    was. BuildError if ``directory`` holds anything that a build of ours does not.
    """
    target = Path(directory).resolve()
    contents = {name: text.encode() if isinstance(text, str) else text for name, text in files.items()}
    for name in contents:
        _check_name(name, f"build {str(directory)!r}")
    check_new(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    fresh, old = (target.with_name(f".{target.name}.{mark}.{state}") for state in ("new", "old"))
    try:
        _write_files(fresh, contents)
        if target.exists():
            target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            with suppress(FileNotFoundError):
                old.rename(target)
            raise
    except OSError as error:
        raise BuildError(f"build {str(directory)!r} cannot be written: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def read_build(directory: str | Path, trust: bool = False) -> dict[str, bytes]:
    """The files of a build by their path in it, without the manifest; BuildError if one was changed, lost or added.

    With ``trust``, changed files are read as they are, lost ones left out and added ones ignored.
    """
    root = Path(directory)
    digests = _read_manifest(root)
    for name in digests:
        _refuse_link(root, name)
    if not trust:
        present = _files_below(root)
        extra = sorted(present - set(digests) - {MANIFEST})
        if extra:
            raise BuildError(_refusal(root, extra[0], "is not part of it", "remove it"))
        lost = sorted(set(digests) - present)
        if lost:
            raise BuildError(_refusal(root, lost[0], "is missing", "compile again"))
    files = {name: (root / name).read_bytes() for name in digests if (root / name).is_file()}
    for name, content in files.items():
        if not trust and sha256(content).hexdigest() != digests[name]:
            raise BuildError(_refusal(root, name, "was changed since it was compiled", "compile again"))
    return files


def _refusal(root: Path, name: str, what: str, remedy: str) -> str:
    return f"build {str(root)!r}: {name!r} {what}; {remedy}, or pass --trust if that is as you want it"


def _write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    digests = {name: sha256(content).hexdigest() for name, content in sorted(contents.items())}
    manifest = {"format": FORMAT, "version": BUILD_VERSION, "files": digests}
    folder.mkdir()
    for name, content in {**contents, MANIFEST: (json.dumps(manifest, indent=2) + "\n").encode()}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def check_new(directory: str | Path) -> None:
    """BuildError if a build may not be written there, so that nobody compiles first and is refused then.

    Only an empty folder and an older build without added files may be replaced.
    """
    target = Path(directory).resolve()
    if not target.exists():
        return
    if not target.is_dir():
        raise BuildError(f"{str(target)!r} is a file; give the build a folder of its own with --out")
    present = _files_below(target)
    if not present and not any(target.iterdir()):
        return
    try:
        known = {MANIFEST, *_read_manifest(target, any_version=True)}
    except BuildError as error:
        raise BuildError(
            f"{str(target)!r} is not a build, so it is not overwritten ({error}); give another folder with --out"
        ) from error
    extra = sorted(present - known)
    if extra:
        raise BuildError(
            f"build {str(target)!r} also holds {extra[0]!r}, which overwriting would delete; move it, or use --out"
        )


def _read_manifest(root: Path, any_version: bool = False) -> dict[str, str]:
    """The sha256 of each file. Its paths are untrusted: one that leaves the build is refused."""
    path = root / MANIFEST
    if not path.is_file():
        raise BuildError(f"{str(root)!r} has no {MANIFEST}, so it is not a build; make one with pipecompile MODEL.py")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BuildError(f"{str(path)!r} cannot be read: {error.strerror}; compile again") from error
    whole = parse(content, repr(str(path)), remedy="compile again")
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise BuildError(f"{str(path)!r} is not the manifest of a build; make one with pipecompile MODEL.py")
    if whole.get("version") != BUILD_VERSION and not any_version:
        raise BuildError(
            f"build {str(root)!r} has version {shortened(whole.get('version'))}, but this pipecompile reads {BUILD_VERSION}; "
            f"compile again"
        )
    files = whole.get("files")
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise BuildError(f"{str(path)!r} lists no files; compile again")
    for name in files:
        _check_name(name, str(path))
    return files


def _check_name(name: str, where: str) -> None:
    parts = name.split("/")
    outside = PurePosixPath(name).is_absolute() or any(
        part in ("", ".", "..") or len(part.encode()) > LONGEST_NAME for part in parts
    )
    if outside or name == MANIFEST or any(character in name for character in "\\:\0"):
        raise BuildError(
            f"{where}: {shortened(name)} is not a path inside a build; expected a name such as 'stages/stage_0.py'"
        )


def _refuse_link(root: Path, name: str) -> None:
    path = root
    for part in name.split("/"):
        path = path / part
        if path.is_symlink():
            raise BuildError(
                f"build {str(root)!r}: {name!r} goes through a symbolic link, which is never followed; compile again"
            )


def _files_below(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_symlink() or not path.is_dir()}
