from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "torch_pipelining.py"


def test_the_comparison_runs_and_finds_an_mlp_right() -> None:
    command = [sys.executable, str(SCRIPT), "mlp", "--stages", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    (outcome,) = json.loads(done.stdout)["outcomes"]
    assert outcome == {
        "family": "mlp",
        "stages": 2,
        "way": "outside",
        "traces": True,
        "runs": True,
        "loss": True,
        "gradients": True,
        "tied_summed_by_hand": True,
        "remark": "",
    }
