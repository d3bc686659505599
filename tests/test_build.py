from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipecompile.build import BUILD_VERSION, MANIFEST, check_new, read_build, write_build
from pipecompile.errors import BuildError

FILES = {"plan.json": "{}", "stages/stage_0.py": "x = 'é'\n", "raw.bin": b"\x00\xff"}


@pytest.fixture
def build(tmp_path: Path) -> Path:
    write_build(tmp_path / "build", FILES)
    return tmp_path / "build"


def edit_manifest(build: Path, **changes: object) -> None:
    path = build / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_build_reads_back_as_written(build: Path) -> None:
    assert read_build(build) == {
        "plan.json": b"{}",
        "stages/stage_0.py": "x = 'é'\n".encode(),
        "raw.bin": b"\x00\xff",
    }
    assert sorted(tree(build)) == ["manifest.json", "plan.json", "raw.bin", "stages/stage_0.py"]


def test_the_same_files_give_the_same_bytes(build: Path, tmp_path: Path) -> None:
    write_build(tmp_path / "again", dict(reversed(FILES.items())))
    assert tree(tmp_path / "again") == tree(build)


def test_an_older_build_is_replaced_whole(build: Path) -> None:
    write_build(build, {"other.txt": "1"})
    assert read_build(build) == {"other.txt": b"1"}
    assert [path.name for path in build.parent.iterdir()] == ["build"]


def test_a_build_of_another_version_may_be_replaced(build: Path) -> None:
    edit_manifest(build, version=BUILD_VERSION + 1)
    write_build(build, {"other.txt": "1"})
    assert read_build(build) == {"other.txt": b"1"}


def test_parents_and_an_empty_folder_are_fine(tmp_path: Path) -> None:
    write_build(tmp_path / "a" / "b", FILES)
    (tmp_path / "empty").mkdir()
    write_build(tmp_path / "empty", FILES)
    assert read_build(tmp_path / "a" / "b") == read_build(tmp_path / "empty")


def test_a_failure_leaves_the_older_build(build: Path) -> None:
    before = tree(build)
    with pytest.raises(BuildError, match=r"cannot be written: .*Is a directory|cannot be written: .*exists"):
        write_build(build, {"a": "1", "a/b": "2"})
    assert tree(build) == before
    assert [path.name for path in build.parent.iterdir()] == ["build"]


def test_a_failed_rename_brings_the_older_build_back(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(build)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(BuildError, match=r"'.*build' cannot be written: no space"):
        write_build(build, {"other.txt": "1"})
    assert tree(build) == before
    assert [path.name for path in build.parent.iterdir()] == ["build"]


def test_a_folder_that_is_not_a_build_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BuildError, match=r"is not a build, so it is not overwritten .*no manifest.json.*--out"):
        write_build(tmp_path, FILES)
    assert tree(tmp_path) == {"thesis.tex": b"years of work"}
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(BuildError, match="is not the manifest of a build"):
        write_build(tmp_path, FILES)


def test_a_refusal_can_be_asked_for_ahead(build: Path, tmp_path: Path) -> None:
    check_new(tmp_path / "fresh")
    check_new(build)
    assert not (tmp_path / "fresh").exists()
    with pytest.raises(BuildError, match="is not a build, so it is not overwritten"):
        check_new(tmp_path)


def test_a_folder_of_folders_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(BuildError, match="is not a build, so it is not overwritten"):
        write_build(tmp_path, FILES)


def test_a_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "build").write_text("mine")
    with pytest.raises(BuildError, match="build' is a file; give the build a folder of its own with --out"):
        write_build(tmp_path / "build", FILES)


def test_a_build_with_something_added_is_not_overwritten(build: Path) -> None:
    (build / "notes.txt").write_text("mine")
    with pytest.raises(BuildError, match=r"also holds 'notes.txt', which overwriting would delete; move it"):
        write_build(build, FILES)


def test_a_changed_file_is_refused_by_name(build: Path) -> None:
    (build / "stages/stage_0.py").write_text("x = 2\n")
    with pytest.raises(BuildError, match=r"'stages/stage_0.py' was changed since it was compiled; .*--trust"):
        read_build(build)
    assert read_build(build, trust=True)["stages/stage_0.py"] == b"x = 2\n"


def test_a_lost_file_is_refused_by_name(build: Path) -> None:
    (build / "plan.json").unlink()
    with pytest.raises(BuildError, match=r"'plan.json' is missing; compile again, or pass --trust"):
        read_build(build)
    assert "plan.json" not in read_build(build, trust=True)


def test_an_added_file_is_refused_by_name(build: Path) -> None:
    (build / "stages" / "stage_1.py").write_text("")
    with pytest.raises(BuildError, match=r"'stages/stage_1.py' is not part of it; remove it, or pass --trust"):
        read_build(build)
    assert "stages/stage_1.py" not in read_build(build, trust=True)


@pytest.mark.parametrize("trust", [False, True])
def test_a_link_is_never_followed(build: Path, tmp_path: Path, trust: bool) -> None:
    (tmp_path / "secret").write_text("{}")
    (build / "plan.json").unlink()
    os.symlink(tmp_path / "secret", build / "plan.json")
    with pytest.raises(BuildError, match=r"'plan.json' goes through a symbolic link, which is never followed"):
        read_build(build, trust)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../b", "a//b", "", ".", "c:\\x", "a\\..\\b", MANIFEST]
)
def test_a_path_that_leaves_the_build_is_refused(build: Path, name: str, trust: bool) -> None:
    edit_manifest(build, files={name: "0" * 64})
    with pytest.raises(BuildError, match="is not a path inside a build; expected a name such as"):
        read_build(build, trust)
    with pytest.raises(BuildError, match="is not a path inside a build; expected a name such as"):
        write_build(build.parent / "fresh", {name: ""})


@pytest.mark.parametrize("trust", [False, True])
def test_another_version_is_refused(build: Path, trust: bool) -> None:
    edit_manifest(build, version=99)
    with pytest.raises(BuildError, match=f"has version 99, but this pipecompile reads {BUILD_VERSION}; compile again"):
        read_build(build, trust)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "manifest.json' cannot be read as JSON: .*compile again"),
        ("[]", "is not the manifest of a build"),
        (json.dumps({"format": "pipecompile build", "version": BUILD_VERSION}), "lists no files; compile again"),
        (json.dumps({"format": "pipecompile build", "version": BUILD_VERSION, "files": {"a": 1}}), "lists no files"),
    ],
)
def test_a_bad_manifest_is_refused(build: Path, text: str, message: str) -> None:
    (build / MANIFEST).write_text(text)
    with pytest.raises(BuildError, match=message):
        read_build(build)


def test_a_folder_without_a_manifest_is_no_build(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"has no manifest.json, so it is not a build; make one with pipecompile"):
        read_build(tmp_path / "nothing")
