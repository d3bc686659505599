"""The four rules by example, and by mutation: whatever a reference interpreter finds wrong, verify refuses."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from pipecompile.errors import MemoryLimitError, PipecompileError, ProgramError
from pipecompile.ir import Instruction, Partition, Program, Shape, Shared, StageCost, Transfer
from pipecompile.passes.communicate import chain, communicate
from pipecompile.passes.schedules import make_timetable
from pipecompile.passes.verify import verify

MUTANTS = 10_000
MODULUS = (1 << 61) - 1


def mix(*parts: object) -> int:
    return hash(parts) % MODULUS


class Wrong(Exception):
    """The reference interpreter came to a wrong result, or to none."""


@dataclass
class Reference:
    """Runs a program as ranks do that stop in every run of messages until each of them has met its other end.

    Channels carry payloads without names: the n-th send meets the n-th receive. Values are numbers that depend on
    everything they were made from, so that a wrong input shows in the gradients.
    """

    program: Program
    partition: Partition
    values: dict[tuple[int, str, int, int], int] = field(default_factory=dict)
    returned: dict[tuple[int, str, int, int, int], int] = field(default_factory=dict)
    gradients: Counter = field(default_factory=Counter)
    halves: dict[tuple[int, int], int] = field(default_factory=dict)
    sent: dict[tuple[int, int, str], list[list[int]]] = field(default_factory=dict)
    wanted: dict[tuple[int, int, str], list[tuple[int, Instruction]]] = field(default_factory=dict)
    sums: dict[frozenset[int], dict[int, list[str]]] = field(default_factory=dict)
    copies: dict[tuple[int, str], int] = field(default_factory=dict)

    def run(self) -> None:
        rows = self.program.rows
        at, posted = [0] * len(rows), [None] * len(rows)
        moved = True
        while moved:
            moved = False
            for rank, row in enumerate(rows):
                while at[rank] < len(row):
                    if posted[rank] is None:
                        posted[rank] = self.post(rank, row, at[rank])
                        moved = True
                    count, tickets = posted[rank]
                    if not all(self.over(ticket) for ticket in tickets):
                        break
                    self.deliver(tickets)
                    at[rank], posted[rank], moved = at[rank] + count, None, True
        if any(place < len(row) for place, row in zip(at, rows)):
            raise Wrong("some rank never ends")
        if any(len(self.sent.get(c, ())) != len(self.wanted.get(c, ())) for c in {*self.sent, *self.wanted}):
            raise Wrong("a message is left over")

    def post(self, rank: int, row: tuple[Instruction, ...], at: int) -> tuple[int, list]:
        one = row[at]
        if self.program.shape.placement[one.stage] != rank:
            raise Wrong("a stage runs on a rank that does not hold it")
        if one.op == "REDUCE_GRAD":
            group = frozenset({rank, *(self.program.shape.placement[p] for p in one.peers)})
            calls = self.sums.setdefault(group, {}).setdefault(rank, [])
            if not one.values:
                raise Wrong("sums nothing")
            calls.append(one.values[0])
            self.copies[rank, one.values[0]] = self.local(rank, one.values[0])
            return 1, [("sum", group, len(calls) - 1, one.values[0])]
        if not one.op.startswith(("SEND", "RECV")):
            self.compute(rank, one)
            return 1, []
        tickets = []
        count = 0
        while at + count < len(row) and row[at + count].op.startswith(("SEND", "RECV")):
            tickets.append(self.message(rank, row[at + count]))
            count += 1
        return count, tickets

    def message(self, rank: int, one: Instruction) -> tuple:
        if self.program.shape.placement[one.stage] != rank or one.peer < 0:
            raise Wrong("a message without an end, or of a stage of another rank")
        other = self.program.shape.placement[one.peer]
        letter = one.op[-1]
        if one.op.startswith("SEND"):
            store = self.values if letter == "F" else self.returned
            ends = (one.stage,) if letter == "F" else (one.stage, one.peer)
            keys = [(rank, value, one.microbatch, *ends) for value in one.values]
            if any(key not in store for key in keys):
                raise Wrong("sends what is not there")
            queue = self.sent.setdefault((rank, other, letter), [])
            queue.append([store[key] for key in keys])
            return "send", (rank, other, letter), len(queue) - 1, rank, one
        queue = self.wanted.setdefault((other, rank, letter), [])
        queue.append((rank, one))
        return "receive", (other, rank, letter), len(queue) - 1, rank, one

    def over(self, ticket: tuple) -> bool:
        if ticket[0] == "sum":
            _, group, index, name = ticket
            calls = [self.sums[group].get(rank, []) for rank in group]
            if any(len(c) <= index for c in calls):
                return False
            if any(c[index] != name for c in calls):
                raise Wrong("ranks sum different parameters")
            return True
        table = self.wanted if ticket[0] == "send" else self.sent
        return len(table.get(ticket[1], ())) > ticket[2]

    def deliver(self, tickets: list) -> None:
        for ticket in tickets:
            if ticket[0] != "receive":
                continue
            _, channel, index, rank, one = ticket
            payload = self.sent[channel][index]
            if len(payload) != len(one.values):
                raise Wrong("a message of another size")
            for value, number in zip(one.values, payload):
                if one.op == "RECV_F":
                    self.values[rank, value, one.microbatch, one.peer] = number
                else:
                    self.returned[rank, value, one.microbatch, one.peer, one.stage] = number

    def compute(self, rank: int, one: Instruction) -> None:
        stage, m = one.stage, one.microbatch
        if one.op == "BACKWARD_WEIGHT":
            if (stage, m) not in self.halves:
                raise Wrong("weight half before input half")
            self.gradients[stage] += self.halves.pop((stage, m))
            return
        reads = sorted((t.value, t.source) for t in self.partition.transfers if t.target == stage)
        if any((rank, value, m, source) not in self.values for value, source in reads):
            raise Wrong("reads what is not there")
        inputs = mix(stage, m, *(self.values[rank, value, m, source] for value, source in reads))
        if one.op == "FORWARD":
            for t in self.partition.transfers:
                if t.source == stage:
                    self.values[rank, t.value, m, stage] = mix(inputs, t.value)
            self.values[rank, "done", m, stage] = inputs
            return
        if self.values.get((rank, "done", m, stage)) != inputs:
            raise Wrong("backward without its forward")
        outs = sorted((t.value, t.target) for t in self.partition.transfers if t.source == stage and t.gradient_bytes)
        keys = [(rank, value, m, target, stage) for value, target in outs]
        if any(key not in self.returned for key in keys):
            raise Wrong("a gradient is not there")
        gradient = mix(inputs, *(self.returned[key] for key in keys))
        for t in self.partition.transfers:
            if t.target == stage:
                self.returned[rank, t.value, m, stage, t.source] = mix(gradient, t.value)
        if one.op == "BACKWARD":
            self.gradients[stage] += gradient
        else:
            self.halves[stage, m] = self.halves.get((stage, m), 0) + gradient

    def local(self, rank: int, parameter: str) -> int:
        shared = next((s for s in self.partition.shared if s.parameter == parameter), None)
        if shared is None:
            raise Wrong("sums what is not shared")
        return sum(self.gradients[s] for s in shared.stages if self.program.shape.placement[s] == rank)

    def result(self) -> object:
        """Every stage's gradient, what is left undone, and what each rank holds for each shared parameter."""
        totals = {}
        placement = self.program.shape.placement
        for shared in self.partition.shared:
            ranks = {placement[s] for s in shared.stages}
            group = frozenset(ranks)
            for rank in ranks:
                calls = self.sums.get(group, {}).get(rank, []).count(shared.parameter)
                seen = sum(self.copies.get((r, shared.parameter), 0) for r in ranks) if len(ranks) > 1 else 0
                late = self.local(rank, shared.parameter) - self.copies.get((rank, shared.parameter), 0)
                totals[rank, shared.parameter] = (calls, seen, late)
        whole = sum(len(calls) for ranks in self.sums.values() for calls in ranks.values())
        return sorted(self.gradients.items()), sorted(self.halves), sorted(totals.items()), whole


def outcome(program: Program, partition: Partition) -> object:
    reference = Reference(program, partition)
    try:
        reference.run()
    except Wrong as wrong:
        return str(wrong)
    return reference.result()


COST = StageCost(1.0, 2.0, 1.0, saved_bytes=10)
SKIPS = Partition(
    "skips",
    4,
    (0, 1, 2, 3),
    (COST,) * 4,
    (
        Transfer("a", 0, 1, 4, 4),
        Transfer("a", 0, 2, 4, 4),
        Transfer("mask", 0, 3, 1, 0),
        Transfer("b", 1, 2, 4, 4),
        Transfer("b2", 1, 2, 4, 4),
        Transfer("c", 2, 3, 4, 4),
        Transfer("d", 1, 3, 4, 4),
    ),
    (Shared("w", (0, 3)), Shared("v", (0, 1, 2)), Shared("u", (1, 3))),
)


def split(program: Program) -> Program:
    """Every backward as an input half and, right behind it and its messages, a weight half."""
    rows = []
    for row in program.rows:
        new: list[Instruction] = []
        for one in row:
            if one.op == "BACKWARD":
                new.append(Instruction("BACKWARD_INPUT", one.stage, one.microbatch))
                new.append(Instruction("BACKWARD_WEIGHT", one.stage, one.microbatch))
            else:
                new.append(one)
        rows.append(tuple(new))
    return replace(program, rows=tuple(rows))


def subjects() -> list[tuple[Program, Partition]]:
    found = []
    for name, shape in (
        ("gpipe", Shape(4, 4, 3)),
        ("1f1b", Shape(4, 4, 4)),
        ("interleaved-1f1b", Shape(4, 2, 4)),
    ):
        for partition in (chain(4, shared=(Shared("w", (0, 3)), Shared("v", (1, 2)))), SKIPS):
            program = communicate(make_timetable(name, shape), partition)
            found += [(program, partition), (split(program), partition)]
    found += [
        (communicate(make_timetable(name, shape), SKIPS), SKIPS)
        for name, shape in (("zb-h1", Shape(4, 4, 4)), ("zb-v", Shape(4, 2, 4)), ("dualpipe-v", Shape(4, 2, 4)))
    ]
    return found


def mutate(program: Program, draw: random.Random) -> Program:
    """One random change of one kind."""
    rows = [list(row) for row in program.rows]
    rank = draw.randrange(len(rows))
    row = rows[rank]
    kind = draw.choice(
        ("drop", "twice", "swap", "next", "move", "rank", "redirect", "microbatch", "op", "values", "sum")
    )
    sums = [i for i, one in enumerate(row) if one.op == "REDUCE_GRAD"]
    messages = [i for i, one in enumerate(row) if one.peer >= 0]
    at = draw.randrange(len(row))
    if kind == "sum" and sums:
        row.insert(draw.randrange(len(row)), row.pop(draw.choice(sums)))
    elif kind == "drop":
        row.pop(at)
    elif kind == "twice":
        row.insert(draw.randrange(len(row) + 1), row[at])
    elif kind == "swap":
        other = draw.randrange(len(row))
        row[at], row[other] = row[other], row[at]
    elif kind == "next" and at:
        row[at], row[at - 1] = row[at - 1], row[at]
    elif kind == "move":
        row.insert(draw.randrange(len(row)), row.pop(at))
    elif kind == "rank":
        draw.choice(rows).append(row.pop(at))
    elif kind == "redirect":
        at = draw.choice(messages)
        row[at] = replace(row[at], **{draw.choice(("peer", "stage")): draw.randrange(program.shape.stages)})
    elif kind == "microbatch":
        row[at] = replace(row[at], microbatch=draw.randrange(program.shape.microbatches))
    elif kind == "op":
        row[at] = replace(row[at], op=draw.choice(("FORWARD", "BACKWARD", "SEND_F", "RECV_F", "SEND_B", "RECV_B")))
    elif kind == "values":
        at = draw.choice([*messages, *sums])
        row[at] = replace(row[at], values=draw.choice((row[at].values[::-1], row[at].values[1:], ("a",), ("w",))))
    return replace(program, rows=tuple(map(tuple, rows)))


def refusal(program: Program, partition: Partition) -> str:
    try:
        verify(program, partition)
    except ProgramError as error:
        return str(error)
    return ""


def test_every_mutant_that_is_wrong_is_refused_with_an_instruction():
    draw = random.Random(0)
    known = [(program, partition, outcome(program, partition)) for program, partition in subjects()]
    assert not any(isinstance(right, str) for _, _, right in known)
    wrong = refused_but_right = 0
    for _ in range(MUTANTS):
        program, partition, right = draw.choice(known)
        mutant = mutate(program, draw)
        is_wrong = outcome(mutant, partition) != right
        message = refusal(mutant, partition)
        if message:
            assert re.search(r"\d(F|B|I|W|SEND_[FB]|RECV_[FB])-?\d|REDUCE_GRAD", message), message
            refused_but_right += not is_wrong
        else:
            assert not is_wrong, f"{program.schedule}: not refused:\n{mutant}"
        wrong += is_wrong
    assert wrong > 0.7 * MUTANTS
    assert refused_but_right < 0.03 * MUTANTS  # only instructions that stand twice, or messages that nothing needs


def test_a_right_program_comes_back():
    for program, partition in subjects():
        assert verify(program, partition) is program


ROWS = ("0F0 0SEND_F0>1 0RECV_B0<1 0B0", "1RECV_F0<0 1F0 1B0 1SEND_B0>0")
OPS = {"F": "FORWARD", "B": "BACKWARD", "I": "BACKWARD_INPUT", "W": "BACKWARD_WEIGHT"}


def read(text: str) -> Instruction:
    stage, op, microbatch, peer = re.fullmatch(r"(\d+)([A-Z]_?[A-Z_]*)(\d+)[<>]?(\d*)", text).groups()
    values = ("hidden",) if peer else ()
    return Instruction(OPS.get(op, op), int(stage), int(microbatch), int(peer or -1), values)


def program_of(*rows: str, stages: int = 2) -> Program:
    shape = Shape(stages, len(rows), 1 + max(int(n) for row in rows for n in re.findall(r"F(\d)", row)))
    return Program("test", shape, tuple(tuple(read(word) for word in row.split()) for row in rows))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            ("0F0 0SEND_F0>1 0RECV_B0<1", ROWS[1]),
            "rank 0 has 0F0 for stage 0 and microbatch 0; expected 0F0 and 0B0, or",
        ),
        (("0F0 0F0 0SEND_F0>1 0RECV_B0<1 0B0", ROWS[1]), r"0F0 \(rank 0, instruction 1\): it stands twice, first at"),
        (("0B0 0F0 0SEND_F0>1 0RECV_B0<1", ROWS[1]), r"0B0 \(rank 0, instruction 0\): it stands before 0F0"),
        (("0F0 0SEND_F0>1 0RECV_B0<1 0W0 0I0", ROWS[1]), r"0W0 \(rank 0, instruction 3\): it stands before 0I0"),
        (("0F0 0SEND_F0>1 0RECV_B0<1 0B0 1F0", ROWS[1]), r"1F0 \(rank 0, instruction 4\): stage 1 belongs to rank 1"),
        (("0F0 0SEND_F0>1 0RECV_B0<1 0B0 4F0", ROWS[1]), r"4F0 .*there is no stage 4, only 0 to 1"),
        (("0F0 0SEND_F0>1 0RECV_B0<1 0B0 0B7", ROWS[1]), r"0B7 .*its microbatch is not one of 0 to 0"),
        (("0F0 0RECV_B0<1 0B0", ROWS[1]), "0SEND_F0>1 is missing on rank 0; 0F0 needs it"),
        ((ROWS[0], "1F0 1RECV_F0<0 1B0 1SEND_B0>0"), r"1RECV_F0<0 \(rank 1, instruction 1\): 1F0 uses it before it is"),
        (("0SEND_F0>1 0F0 0RECV_B0<1 0B0", ROWS[1]), r"0SEND_F0>1 \(rank 0, instruction 0\): it sends what 0F0 makes"),
        ((ROWS[0] + " 0SEND_B0>1", ROWS[1]), r"0SEND_B0>1 .*nothing is to be sent between these stages; remove it"),
        (("0F0 0SEND_F0>1 0B0 0RECV_B0<1", ROWS[1]), r"0RECV_B0<1 .*0B0 uses it before it is received"),
        (
            ("0F0 0F1 0SEND_F1>1 0SEND_F0>1 0B0 0B1", "1RECV_F0<0 1F0 1RECV_F1<0 1F1 1B0 1B1"),
            r"0SEND_F1>1 .*on the channel from rank 0 to rank 1 it meets 1RECV_F0<0; send and receive in the same order",
        ),
        (
            ("0F0 0SEND_F0>1 0F1 0SEND_F1>1 0RECV_B0<1 0B0 0RECV_B1<1 0B1", "1RECV_F0<0 1F0 1B0 1SEND_B0>0 1RECV_F1<0"),
            "rank 1 has nothing for stage 1 and microbatch 1",
        ),
    ],
)
def test_messages_of_refusals(rows, words):
    partition = chain(2, gradient_bytes=0) if "in the same order" in words else chain(2)
    with pytest.raises(ProgramError, match=words):
        verify(program_of(*rows), partition)


def test_the_naive_order_of_1f1b_waits_for_ever():
    rows = (
        "0F0 0SEND_F0>1 0F1 0SEND_F1>1 0RECV_B0<1 0B0 0RECV_B1<1 0B1",
        "1RECV_F0<0 1F0 1B0 1SEND_B0>0 1F1 1B1 1SEND_B1>0",
    )
    late = rows[1].replace("1SEND_B0>0 1F1", "1SEND_B0>0 1RECV_F1<0 1F1")
    verify(program_of(rows[0], late), chain(2))
    apart = (rows[0].replace("0F1 0SEND_F1>1 0RECV_B0<1 0B0", "0RECV_B0<1 0B0 0F1 0SEND_F1>1"), late)
    verify(program_of(*apart), chain(2))
    early = rows[1].replace("1RECV_F0<0 1F0 1B0", "1RECV_F0<0 1RECV_F1<0 1F0 1B0")
    with pytest.raises(
        ProgramError, match=r"0RECV_B0<1 \(rank 0.*waits for ever, as does rank 1 in 1RECV_F1<0; move one"
    ):
        verify(program_of(apart[0], early), chain(2))


def test_wrong_values_and_own_order():
    program = program_of(*ROWS)
    rows = (tuple(replace(one, values=("x",)) if one.peer >= 0 else one for one in program.rows[0]), program.rows[1])
    with pytest.raises(ProgramError, match=r"0SEND_F0>1 .*carries the wrong values; expected hidden"):
        verify(replace(program, rows=rows), chain(2))
    with pytest.raises(ProgramError, match=r"1F0 \(rank 0, instruction 0\): it reads what 0F0 makes later"):
        verify(program_of("1F0 0F0 1B0 0B0"), chain(2))


def test_reductions():
    partition = chain(2, shared=(Shared("w", (0, 1)),))
    program = communicate(make_timetable("1f1b", Shape(2, 2, 1)), partition)
    first, second = program.rows
    with pytest.raises(ProgramError, match="REDUCE_GRAD of w is missing on rank 1; every rank that holds it sums it"):
        verify(replace(program, rows=(first, second[:-1])), partition)
    with pytest.raises(ProgramError, match="w still gets a gradient from 0B0; move it behind"):
        verify(replace(program, rows=((*first[:-2], first[-1], first[-2]), second)), partition)
    with pytest.raises(ProgramError, match=r"w lives on ranks \[0, 1\]; name a stage of each"):
        verify(replace(program, rows=((*first[:-1], replace(first[-1], peers=())), second)), partition)
    with pytest.raises(ProgramError, match="x is not to be summed here"):
        verify(replace(program, rows=((*first[:-1], replace(first[-1], values=("x",))), second)), partition)


def test_another_number_of_stages():
    with pytest.raises(
        ProgramError, match="2 rows for 2 ranks and 2 stages, the partition 3 stages; compile both again"
    ):
        verify(program_of(*ROWS), chain(3))


def test_memory_limits():
    costs = [StageCost(1, 2, 1, parameter_bytes=100, trainable_bytes=100, saved_bytes=10)] * 2
    partition = chain(2, costs, bytes=0, gradient_bytes=0)
    program = communicate(make_timetable("gpipe", Shape(2, 2, 4)), partition)
    verify(program, partition, limits=(440, 440))
    with pytest.raises(
        MemoryLimitError, match=r"1F3 \(rank 1.*holds 440 bytes here \(400 .*1 more than its limit of 439; use"
    ):
        verify(program, partition, limits=(440, 439))
    with pytest.raises(PipecompileError, match="1 memory limits for 2 ranks; give one for each rank"):
        verify(program, partition, limits=(440,))
