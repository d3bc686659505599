"""What an installation holds: every package, no more; the passes under one name only."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_package_list_is_complete() -> None:
    folders = {path.parent for top in ("pipecompile", "passes") for path in (ROOT / top).rglob("__init__.py")}
    names = {
        ".".join(folder.relative_to(ROOT).parts)
        for folder in folders
        if folder.relative_to(ROOT).parts[:2] != ("pipecompile", "passes")
    }
    expected = {f"pipecompile.{name}" if name.startswith("passes") else name for name in names}
    assert set(SETUP["tool"]["setuptools"]["packages"]) == expected


def test_the_passes_have_one_name() -> None:
    assert (ROOT / "pipecompile/passes").resolve() == ROOT / "passes"
    done = subprocess.run(
        [sys.executable, "-c", "import passes"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 1
    assert "import the passes as pipecompile.passes, not as 'passes'" in done.stderr


def test_commands_without_a_model_start_without_torch() -> None:
    names = "pipecompile, pipecompile.cli.partition, pipecompile.cli.run, pipecompile.build, pipecompile.plan"
    code = f"import sys, {names}; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_licence_is_apache() -> None:
    assert SETUP["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_wheel_holds_every_package(tmp_path: Path) -> None:
    source = tmp_path / "source"
    skip = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skip)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist")]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("pipecompile-*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith((".py", "py.typed"))}
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "pipecompile").rglob("*.py")}
    files = {name for name in own if not name.startswith("pipecompile/passes/")} | {"pipecompile/py.typed"}
    passes = {f"pipecompile/{path.relative_to(ROOT)}" for path in (ROOT / "passes").rglob("*.py")}
    assert held == files | passes
