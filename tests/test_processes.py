"""Real processes under torchrun: the loss on every rank and the gradient of every parameter against the unsplit model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipecompile.compare import differences
from tests.models import MODELS
from tests.oracle import SUMMED, unsplit
from tests.ranks import MICROBATCHES

ROOT = Path(__file__).parent.parent
CASES = {
    2: ["gpt2:1f1b:2", "t5:interleaved-1f1b:4", "unet2d:gpipe:2"],
    4: ["gpt2:gpipe:4", "t5:1f1b:4", "unet2d:1f1b:4"],
}


@pytest.mark.parametrize("ranks", CASES)
def test_torchrun(ranks: int, tmp_path: Path) -> None:
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps({"nodes": {}, "default": {"fwd": 1, "bwd": 2}}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "tests.ranks", str(tmp_path), str(costs), *CASES[ranks]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for case in CASES[ranks]:
        _check(case, [load_file(tmp_path / f"{case}:{rank}.safetensors") for rank in range(ranks)])


def _check(case: str, found: list[dict[str, torch.Tensor]]) -> None:
    name = case.split(":")[0]
    expected = unsplit(name, MICROBATCHES)
    seen = set()
    for rank, tensors in enumerate(found):
        assert tensors.pop("loss").item() == pytest.approx(expected.loss.item(), rel=SUMMED)
        for difference in differences(tensors, {fqn: expected.gradients[fqn] for fqn in tensors}, "gradient of"):
            assert difference.error <= SUMMED, f"{case}, rank {rank}: {difference}"
        seen |= set(tensors)
    trained = {fqn for fqn, gradient in expected.gradients.items() if gradient is not None}
    assert seen == trained == {fqn for fqn, _ in MODELS[name]()[0].named_parameters()}
