from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipecompile.errors import CostError
from pipecompile.machine import MACHINES, Machine, find_machine, format_bytes, parse_bytes

SMALL: dict[str, Any] = {
    "name": "small",
    "flops": {"float32": 1e12, "bfloat16": 4e12},
    "bandwidth": 1e11,
    "memory": 2**30,
    "link_bandwidth": 1e9,
    "link_latency_us": 10.0,
    "launch_us": 2.0,
    "flops_achieved": 0.5,
    "bandwidth_achieved": 0.25,
}


def test_times_follow_from_the_figures() -> None:
    machine = Machine(**SMALL)
    assert machine.compute_ms(1e9, "float32") == pytest.approx(2.0)
    assert machine.compute_ms(1e9, "bfloat16") == pytest.approx(0.5)
    assert machine.compute_ms(1e9, "int64") == pytest.approx(2.0)
    assert machine.move_ms(25e6) == pytest.approx(1.0)
    assert machine.send_ms(1e6) == pytest.approx(1.01)


def test_named_machines_are_found_by_name() -> None:
    for name in ("cpu", "a100-80gb", "h100", "h200"):
        assert find_machine(name).name == name
    assert MACHINES["h200"].bandwidth > MACHINES["h100"].bandwidth > MACHINES["a100-80gb"].bandwidth


def test_a_machine_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    path.write_text(json.dumps({**SMALL, "memory": "1GiB"}))
    assert find_machine(path) == Machine(**SMALL)
    path.write_text(json.dumps({key: SMALL[key] for key in SMALL if key not in ("name", "launch_us")}))
    assert find_machine(str(path)).name == "small"


def test_an_unknown_machine_lists_the_names() -> None:
    with pytest.raises(CostError, match=r"no machine 'h1000'; expected one of cpu, .*h100.*, or a JSON file"):
        find_machine("h1000")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", r"holds \[1\], expected an object with name, flops"),
        (json.dumps({**SMALL, "speed": 1}), "unknown field 'speed'; expected name, flops"),
        (json.dumps({"flops": {"float32": 1}}), "lacks a field: .*'bandwidth'"),
        (json.dumps({**SMALL, "flops": 1e12}), "flops is 1000000000000.0, expected FLOP/s by dtype"),
        (json.dumps({**SMALL, "flops": {"float16": 1}}), "with at least 'float32'"),
        (
            json.dumps({**SMALL, "flops": {"float32": -1}}),
            r"flops\['float32'\] is -1, expected a finite number above 0",
        ),
        (json.dumps({**SMALL, "bandwidth": float("nan")}), "bandwidth is nan"),
        (json.dumps({**SMALL, "memory": "much"}), "'much' is not a number of bytes"),
        (json.dumps({**SMALL, "launch_us": -1}), "launch_us is -1, expected a number >= 0"),
        (json.dumps({**SMALL, "flops_achieved": 1.5}), r"flops_achieved is 1.5, expected a fraction in \(0, 1\]"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(CostError, match=message):
        find_machine(path)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(CostError, match=r"'nowhere/machine.json' cannot be read"):
        find_machine("nowhere/machine.json")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GiB", 80 * 2**30),
        ("80gib", 80 * 2**30),
        ("1.5 MB", 1_500_000),
        ("4096", 4096),
        ("7B", 7),
        ("2kB", 2000),
        ("1TiB", 2**40),
    ],
)
def test_bytes_are_parsed(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "80G", "-1GB", "eighty", "1e3B", "GiB", "inf"])
def test_other_texts_are_no_bytes(text: str) -> None:
    with pytest.raises(CostError, match=r"expected a number and a unit .*GiB.*for example 80GiB"):
        parse_bytes(text)


def test_bytes_are_written_for_people() -> None:
    sizes = {0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 3 * 2**20: "3.0 MiB", 5 * 2**30: "5.0 GiB", 2**41: "2.0 TiB"}
    assert {size: format_bytes(size) for size in sizes} == sizes
