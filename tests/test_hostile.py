"""Hostile files: whatever is changed in a real one, it is refused with one of our errors, or it says what is safe to run."""

from __future__ import annotations

import copy
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pipecompile.build import read_build, write_build
from pipecompile.build_files import build_files, plan_and_program
from pipecompile.compiled import Options
from pipecompile.cost.file import read_costs
from pipecompile.cost.formulas import stage_formulas
from pipecompile.errors import BuildError, PipecompileError, ProgramError
from pipecompile.ir import CostGraph, CostNode, CostTensor, Parameter, Program, Shape
from pipecompile.ir.cost_file import cost_graph_to_json, read_cost_graph
from pipecompile.ir.json_text import parse
from pipecompile.machine import MACHINES, find_machine
from pipecompile.passes.communicate import chain, communicate
from pipecompile.passes.partitioners import partition
from pipecompile.passes.schedules import make_timetable
from pipecompile.passes.torch_csv import read_csv, write_csv
from pipecompile.passes.verify import verify
from pipecompile.simulate import simulate
from tests.compiled import compiled, traced
from tests.test_mutants import outcome

SCHEDULES = (("gpipe", 4), ("1f1b", 4), ("zb-h1", 4), ("pipedream", 4), ("interleaved-1f1b", 2), ("zb-v", 2))
MUTATIONS = 1_400
JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 10**6, 10**9, 10**18, 10**400, -(10**30), 1.5, -0.5, 1e308, float("nan"), float("inf"), "",
    "x", "0", "batch", "9**9**9", "batch//0", "-" * 3000 + "1", "\x1b[2J\x00", "\ud800", "a\nb", "../../etc/passwd",
    "FORWARD", "UPDATE", "SEND_F", [], [[]], {}, {"x": 1}, [None], [1, 2], [True],
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A real file: its name and text, what reads it and uses what was read, and what else its refusals may name."""

    name: str
    text: str
    use: Callable[[bytes, Path], None]
    also: tuple[str, ...] = ()


def mutated(text: str, draw: random.Random) -> bytes:
    """A few random changes of the values of a JSON text, or of its bytes."""
    if draw.random() < 0.15 or not text.startswith("{"):
        return scrambled(text, draw)
    whole = json.loads(text)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        if whole:
            _change(whole, draw)
    return json.dumps(whole).encode()


def _change(whole: Any, draw: random.Random) -> None:
    holder, key = _place(whole, draw)
    kind = draw.choice(("junk", "junk", "drop", "other", "twice", "more", "number", "wrap"))
    if kind == "drop":
        del holder[key]
    elif kind == "other":  # what stands somewhere else
        there, where = _place(whole, draw)
        holder[key] = copy.deepcopy(there[where])
    elif kind == "twice" and isinstance(holder, list):
        holder.insert(draw.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
    elif kind == "more" and isinstance(holder[key], dict):
        holder[key][draw.choice(("extra", "peer", "version", "values", "microbatch"))] = draw.choice(JUNK)
    elif kind == "number" and type(holder[key]) is int:
        holder[key] += draw.choice((-1, 1, 100))
    elif kind == "wrap":
        holder[key] = [holder[key]]
    else:
        holder[key] = copy.deepcopy(draw.choice(JUNK))


def _place(whole: Any, draw: random.Random) -> tuple[Any, Any]:
    """A random part of a structure, by what holds it: small parts are as likely as large ones."""
    holder, key = whole, draw.choice(list(whole))
    while isinstance(holder[key], dict | list) and holder[key] and draw.random() < 0.8:
        holder = holder[key]
        key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
    return holder, key


def scrambled(text: str, draw: random.Random) -> bytes:
    """Text that is cut off, nested without end, doubled, or no longer UTF-8."""
    raw, at = text.encode(), draw.randrange(len(text))
    there = at + draw.randrange(1, 40)
    key = b'"op":"FORWARD","op":' if b'"op"' in raw else b'"version":2,"version":'
    return draw.choice(
        (
            raw[:at],
            raw[:at] + raw[there:],
            raw[:at] + b"[" * 100_000 + raw[at:],
            raw[:at] + bytes([draw.randrange(256)]) + raw[at + 1 :],
            raw[:at] + b"\xff\xfe\0" + raw[at:],
            raw[:at] + b"9" * 5_000 + raw[at:],
            raw.replace(b'"op":' if b'"op"' in raw else b'"version":', key, 1),
            raw.replace(raw[at:there], draw.randbytes(3), 1),
            raw + raw,
            b"\xef\xbb\xbf" + raw,
            draw.randbytes(20),
            b"",
        )
    )


def use_pipeline(files: Mapping[str, str]) -> None:
    """What loading, printing and planning a build does."""
    plan, program = plan_and_program(files)
    try:
        verify(program, plan.partition)
    except ProgramError as error:
        raise ProgramError(f"program.json: {error}") from error
    assert not isinstance(outcome(program, plan.partition), str), "what verify proves, the reference interpreter runs"
    str(plan), str(program), plan.to_json()
    simulate(program, plan.partition)
    with suppress(PipecompileError):  # not every plan can be told for other sizes
        replace(plan, program=program).at(batch=3)


def subjects(folder: Path) -> Iterator[Subject]:
    found = compiled("gpt2", Options(4, 4, 4, "1f1b"))
    formulas = stage_formulas(found.split.graph, found.split.stage_of, 4, MACHINES["cpu"])
    plan = found.plan({}, "", formulas)
    build = build_files(plan, found.program, found.sources)
    for schedule, ranks in SCHEDULES:
        program = communicate(make_timetable(schedule, Shape(4, ranks, 4)), plan.partition)
        placed = replace(plan, ranks=ranks, placement=program.shape.placement, program=program)
        own = build_files(placed, program, ())
        for name in ("plan.json", "program.json"):

            def use(content: bytes, path: Path, name: str = name, own: Mapping[str, str] = own) -> None:
                use_pipeline({**own, name: content.decode(errors="surrogateescape")})

            yield Subject(name, own[name], use, also=("program",))
        path = folder / "rows.csv"
        if schedule != "pipedream":
            write_csv(make_timetable(schedule, Shape(4, ranks, 4)), path)
            yield Subject("rows.csv", path.read_text(), use_csv)
    graph = traced("gpt2")
    nodes = {node.name: {"fwd": 1.0, "bwd": 2, "saved_bytes": 3} for node in graph.nodes}
    yield Subject(
        "costs.json", json.dumps({"unit": "ms", "nodes": nodes}), lambda _, path: read_costs(path, graph) and None
    )
    costed = cost_graph_to_json(layered())
    yield Subject("graph.json", json.dumps(costed), use_graph)
    machine = asdict(MACHINES["h100"])
    yield Subject(
        "machine.json", json.dumps(machine), lambda _, path: find_machine(path).compute_ms(1, "float32") and None
    )
    write_build(folder / "build", build)
    manifest = (folder / "build" / "manifest.json").read_text()
    yield Subject(
        "manifest.json", manifest, lambda content, _: use_manifest(content, folder / "build"), also=("build",)
    )


def layered() -> CostGraph:
    nodes = tuple(CostNode(f"n{k}", 1.0, 2.0, (Parameter(f"w{k % 3}", 8),), 4, 1.0) for k in range(8))
    edges = tuple((k, k + 1) for k in range(7))
    return CostGraph("layers", nodes, edges, tuple(CostTensor(f"t{u}", u, (v,), 8, 8) for u, v in edges))


def use_graph(_: bytes, path: Path) -> None:
    found = read_cost_graph(path)
    str(partition(found.graph, 2, method="mincut"))


def use_csv(_: bytes, path: Path) -> None:
    timetable = read_csv(path)
    straight = chain(timetable.shape.stages)
    verify(communicate(timetable, straight), straight)


def use_manifest(content: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(content)
    read_build(folder)


def attack(subject: Subject, content: bytes, folder: Path) -> str:
    """The refusal of a changed file; empty if it is accepted. Anything but our own error goes through."""
    path = folder / subject.name
    path.write_bytes(content)
    try:
        subject.use(content, path)
    except PipecompileError as error:
        return str(error)
    return ""


def try_mutations(count: int, seed: int, folder: Path) -> Counter[str]:
    """How many mutations of each file were refused and accepted; each refusal names its file, briefly, and printably."""
    draw = random.Random(seed)
    found: Counter[str] = Counter()
    known = list(subjects(folder))
    for index in range(count):
        subject = known[index % len(known)]
        content = mutated(subject.text, draw)
        try:
            refusal = attack(subject, content, folder)
        except Exception as error:
            raise AssertionError(f"{subject.name}, mutation {index}: {content[:1000]!r}") from error
        assert not refusal or any(name in refusal for name in (subject.name, *subject.also)), refusal
        assert len(refusal) < 2_000, refusal
        assert refusal.isprintable(), refusal
        found[f"{subject.name} {'refused' if refusal else 'accepted'}"] += 1
    return found


def test_a_changed_file_is_refused_or_safe(tmp_path: Path) -> None:
    found = try_mutations(MUTATIONS, 0, tmp_path)
    for name in ("plan.json", "program.json", "rows.csv", "costs.json", "graph.json", "machine.json", "manifest.json"):
        assert found[f"{name} refused"] > 10, found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1, "a": 2}', "key 'a' stands twice in one object"),
        ("[" * 100_000, "it is nested too deep"),
        ("9" * 5_000, "it has a number of too many digits, expected one below"),
        (str(1 << 60), "1152921504606846976 is too large, expected a number below"),
        ('["\\u001b[2J"]', r"'\\x1b\[2J' has control characters"),
        ('{"a":\n 1,}', "at line 2, column 4"),
        (b'{"a": "\xff"}', r"byte 7 is 255, which is not UTF-8"),
    ],
)
def test_what_json_lets_pass(text: str | bytes, problem: str) -> None:
    with pytest.raises(BuildError, match=f"plan.json cannot be read as JSON: .*{problem}.*; compile again"):
        parse(text, "plan.json", remedy="compile again")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"op": "SEND"}, r"programs\[0\]\[1\] is wrong: unknown op 'SEND'; expected one of FORWARD, .*; compile again"),
        ({"stage": "0"}, r"programs\[0\]\[1\].stage is '0', expected a whole number; compile again"),
        ({"stage": True}, r"programs\[0\]\[1\].stage is True, expected a whole number"),
        (
            {"microbatch": -7},
            r"programs\[0\]\[1\] is wrong: SEND_F has stage, microbatch, peer and version \(0, -7, 1, -1\); expected whole numbers",
        ),
        ({"values": "hidden"}, r"programs\[0\]\[1\].values is 'hidden', expected a list"),
        ({"valeus": []}, r"programs\[0\]\[1\] has an unknown key 'valeus', expected op, stage, microbatch"),
    ],
)
def test_a_changed_instruction_is_named(change: dict[str, Any], problem: str) -> None:
    whole = communicate(make_timetable("1f1b", Shape(2, 2, 2)), chain(2)).to_json()
    whole["programs"][0][1] |= change
    with pytest.raises(ProgramError, match=f"program.json: {problem}"):
        Program.from_json(whole)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"placement": []},
            "does not give 2 stages to 2 ranks; expected a rank from 0 to 1 for each stage, and every rank",
        ),
        ({"placement": [0, 2]}, r"placement \(0, 2\) does not give 2 stages to 2 ranks"),
        ({"microbatches": 10**9}, "2 stages times 1000000000 microbatches are more than 10,000,000 forwards"),
        ({"ranks": 0}, "ranks is 0, expected at least 1"),
        ({"programs": {}}, "program.json.programs is {}, expected a list"),
        ({"stages": 2.0}, "program.json.stages is 2.0, expected a whole number"),
    ],
)
def test_a_changed_shape_is_named(change: dict[str, Any], problem: str) -> None:
    whole = communicate(make_timetable("1f1b", Shape(2, 2, 2)), chain(2)).to_json()
    with pytest.raises(ProgramError, match=f"{problem}.*; compile again"):
        Program.from_json(whole | change)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(*sorted(try_mutations(int(sys.argv[1]), 1, Path(folder)).items()), sep="\n")
