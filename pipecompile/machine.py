"""Machines: what a device computes, moves and holds, and what the link between two of them carries."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from pipecompile.errors import CostError
from pipecompile.ir.json_text import parse, shortened

UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}


@dataclass(frozen=True, slots=True)
class Machine:
    """One device of a kind and its link to the next: peak figures, and the fraction of them that real programs reach.

    ``flops`` are peak FLOP/s by dtype name, without sparsity; ``bandwidth`` is that of the device memory in bytes/s;
    ``memory`` in bytes; ``link_bandwidth`` in bytes/s from one device to another, one direction; ``launch_us`` is the
    least time of any operation; ``device`` is torch's name of its kind, whose kernels decide what a backward keeps. Big matrix products reach ``flops_achieved`` of the peak, copies ``bandwidth_achieved``.
    """

    name: str
    flops: Mapping[str, float]
    bandwidth: float
    memory: int
    link_bandwidth: float
    link_latency_us: float
    launch_us: float = 5.0
    flops_achieved: float = 0.6
    bandwidth_achieved: float = 0.8
    device: str = "cuda"

    def __post_init__(self) -> None:
        if not isinstance(self.flops, Mapping) or "float32" not in self.flops:
            raise CostError(
                f"machine {self.name!r}: flops is {shortened(self.flops)}, expected FLOP/s by dtype with at least 'float32'"
            )
        rates = {f"flops[{dtype!r}]": rate for dtype, rate in self.flops.items()}
        rates |= {what: getattr(self, what) for what in ("bandwidth", "memory", "link_bandwidth")}
        for what, rate in rates.items():
            if not (_is_number(rate) and rate > 0):
                raise CostError(f"machine {self.name!r}: {what} is {shortened(rate)}, expected a finite number above 0")
        for what in ("link_latency_us", "launch_us"):
            if not (_is_number(getattr(self, what)) and getattr(self, what) >= 0):
                raise CostError(
                    f"machine {self.name!r}: {what} is {shortened(getattr(self, what))}, expected a number >= 0"
                )
        for what in ("flops_achieved", "bandwidth_achieved"):
            if not (_is_number(getattr(self, what)) and 0 < getattr(self, what) <= 1):
                raise CostError(
                    f"machine {self.name!r}: {what} is {shortened(getattr(self, what))}, expected a fraction in (0, 1]"
                )

    def compute_ms(self, flops: float, dtype: str) -> float:
        """Milliseconds that ``flops`` operations take; a dtype that is not listed runs at float32's rate."""
        peak = self.flops.get(dtype, self.flops["float32"])
        return 1e3 * flops / (peak * self.flops_achieved)

    def move_ms(self, size: float) -> float:
        """Milliseconds that reading or writing ``size`` bytes of the device memory takes."""
        return 1e3 * size / (self.bandwidth * self.bandwidth_achieved)

    def send_ms(self, size: float) -> float:
        """Milliseconds that a message of ``size`` bytes takes to another device."""
        return self.link_latency_us / 1e3 + 1e3 * size / self.link_bandwidth


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_NAMED = (
    # One core of a current x86 server: 2 FMA units x 8 float32 x 2 at 3 GHz; links are gloo over loopback.
    Machine(
        "cpu", {"float32": 96e9, "float64": 48e9, "bfloat16": 96e9}, 12e9, 16 * 1024**3, 2e9, 100.0, 8.0, device="cpu"
    ),
    # NVIDIA V100 data sheet (SXM2): NVLink 2, 300 GB/s both ways.
    Machine("v100-32gb", {"float64": 7.8e12, "float32": 15.7e12, "float16": 125e12}, 900e9, 32 * 1024**3, 150e9, 10.0),
    # NVIDIA A100 data sheet (SXM): NVLink 3, 600 GB/s both ways. float32 without TF32, as torch computes by default.
    Machine(
        "a100-40gb",
        {"float64": 9.7e12, "float32": 19.5e12, "float16": 312e12, "bfloat16": 312e12},
        1.555e12,
        40 * 1024**3,
        300e9,
        8.0,
    ),
    Machine(
        "a100-80gb",
        {"float64": 9.7e12, "float32": 19.5e12, "float16": 312e12, "bfloat16": 312e12},
        2.039e12,
        80 * 1024**3,
        300e9,
        8.0,
    ),
    # NVIDIA L40S data sheet: no NVLink, PCIe 4.0 x16, 64 GB/s both ways.
    Machine("l40s", {"float32": 91.6e12, "float16": 362e12, "bfloat16": 362e12}, 864e9, 48 * 1024**3, 32e9, 12.0),
    # NVIDIA H100 and H200 data sheets (SXM), dense: NVLink 4, 900 GB/s both ways.
    Machine(
        "h100",
        {"float64": 34e12, "float32": 67e12, "float16": 989e12, "bfloat16": 989e12, "float8_e4m3fn": 1979e12},
        3.35e12,
        80 * 1024**3,
        450e9,
        8.0,
    ),
    Machine(
        "h200",
        {"float64": 34e12, "float32": 67e12, "float16": 989e12, "bfloat16": 989e12, "float8_e4m3fn": 1979e12},
        4.8e12,
        141 * 10**9,
        450e9,
        8.0,
    ),
    # AMD MI300X data sheet: one Infinity Fabric link to each peer, 128 GB/s both ways.
    Machine(
        "mi300x",
        {"float64": 81.7e12, "float32": 163.4e12, "float16": 1307e12, "bfloat16": 1307e12},
        5.3e12,
        192 * 10**9,
        64e9,
        10.0,
    ),
)
"""Peak figures without sparsity from the vendors' data sheets: NVIDIA Tesla V100 (2018), A100 (2021), L40S (2023), H100 and
H200 Tensor Core GPU (2022, 2024), AMD Instinct MI300X (2023). Links are one direction: half of what these sheets state."""
MACHINES: Mapping[str, Machine] = {machine.name: machine for machine in _NAMED}


def find_machine(name: str | Path) -> Machine:
    """The machine of that name, or the one that a JSON file of Machine's fields describes."""
    if str(name) in MACHINES:
        return MACHINES[str(name)]
    path = Path(name)
    if path.suffix == ".json" or path.is_file():
        return _read_machine(path)
    raise CostError(
        f"no machine {str(name)!r}; expected one of {', '.join(MACHINES)}, or a JSON file that describes one"
    )


def _read_machine(path: Path) -> Machine:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CostError(f"machine file {str(path)!r} cannot be read: {error.strerror}; give the path of one") from error
    whole = parse(content, f"machine file {str(path)!r}", CostError, "mend it")
    known = [field.name for field in fields(Machine)]
    if not isinstance(whole, dict):
        raise CostError(
            f"machine file {str(path)!r} holds {shortened(whole)}, expected an object with {', '.join(known)}"
        )
    strange = sorted(set(whole) - set(known))
    if strange:
        raise CostError(
            f"machine file {str(path)!r} has an unknown field {shortened(strange[0])}; expected {', '.join(known)}"
        )
    whole.setdefault("name", path.stem)
    try:
        if isinstance(whole.get("memory"), str):
            whole["memory"] = parse_bytes(whole["memory"])
        return Machine(**whole | {"name": str(whole["name"])[:80]})
    except CostError as error:
        raise CostError(f"machine file {str(path)!r}: {error}") from error
    except TypeError as error:
        raise CostError(
            f"machine file {str(path)!r} lacks a field: {error}; only launch_us and the fractions may be left out"
        ) from error


def parse_bytes(text: str) -> int:
    """The number of bytes that ``80GiB``, ``1.5 MB`` or ``4096`` means."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if match is None or (match[2] or "B").lower() not in units:
        raise CostError(
            f"{shortened(text)} is not a number of bytes; expected a number and a unit ({', '.join(UNITS)}), for example 80GiB"
        )
    return int(float(match[1]) * units[(match[2] or "B").lower()])


def format_bytes(size: float) -> str:
    """A number of bytes for people: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
