"""Every example is short, compiles, and is equal to its unsplit model; the huge one is planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipecompile.cli import main

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(path.read_text().splitlines()) < 80
    build = str(tmp_path / "build")
    huge = path.stem == "llama_405b"
    words = ["--stages", "16" if huge else "4", "--microbatches", "16" if huge else "4", "--costs", "estimate"]
    words += ["--ranks", "8", "--schedule", "interleaved-1f1b", "--machine", "h100"] if huge else []
    assert main([str(path), *words, "--out", build, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    if huge:
        parameters = sum(cost["parameter_bytes"] for cost in plan["costs"])
        assert parameters == pytest.approx(2 * 405.85e9, rel=1e-3), "405.85 billion parameters of two bytes"
        assert any("meta device" in note for note in plan["notes"])
    else:
        assert main(["verify", build]) == 0
