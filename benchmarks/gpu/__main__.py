"""All scripts for GPUs that this machine can run: ``python -m benchmarks.gpu [--device cpu] [--out FILE]``.

Writes one JSON file with hardware, versions and what each script gives; exit code 1 if a bar is missed. Each script runs in
a process of its own, so that one that fails leaves the others' figures. On one H100, allow 20 minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu.setting import Result, arguments, checked, hardware, machine_of

SCRIPTS = ("local_runtime", "memory", "costs")


def commands(device: str, devices: int, machine: str) -> dict[str, list[str]]:
    """What can be run, by name."""
    found = {name: [name] for name in SCRIPTS if name != "costs" or machine}
    found["ranks over gloo"] = ["ranks", "--backend", "gloo"]
    if devices > 1:
        found["ranks over nccl"] = ["ranks", "--backend", "nccl"]
    return {name: [*command, "--device", device, "--json"] for name, command in found.items()}


def outcome(command: list[str]) -> Result:
    """What a script prints, or how it failed."""
    name, *options = command
    full = [sys.executable, "-m", f"benchmarks.gpu.{name}", *options]
    done = subprocess.run(full, capture_output=True, text=True, check=False)
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        return {"ok": False, "error": done.stderr[-2000:], "code": done.returncode}


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    options = checked(parser)
    devices = torch.cuda.device_count() if options.device == "cuda" else 0
    result: Result = {"hardware": hardware(options.device), "results": {}}
    for name, command in commands(options.device, devices, machine_of(options.device)).items():
        found = outcome(command)
        result["results"][name] = found
        options.out.write_text(json.dumps(result, indent=1))
        if not options.json:
            summary = {key: value for key, value in found.items() if key not in ("rows", *result["hardware"])}
            print(f"{name}: {summary}", flush=True)
    if options.json:
        print(json.dumps(result))
    return int(not all(found["ok"] for found in result["results"].values()))


if __name__ == "__main__":
    sys.exit(main())
