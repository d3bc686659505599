"""Mutation: whatever a reference interpreter finds wrong in a changed program, verify refuses, naming an instruction."""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, field, replace

from pipecompile.errors import ProgramError, ScheduleError
from pipecompile.ir import Instruction, Partition, Program, Shape, Shared, StageCost, Transfer
from pipecompile.passes.communicate import chain, communicate
from pipecompile.passes.replicas import for_replicas
from pipecompile.passes.schedules import find_schedule, make_timetable, schedule_names
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
    summed: dict[int, list[int]] = field(default_factory=dict)
    weights: dict[tuple[int, int | str], list[int]] = field(default_factory=dict)
    made: dict[int, dict[int, int]] = field(default_factory=dict)
    used: dict[tuple[int, int | str], int] = field(default_factory=dict)
    parts: dict[tuple[frozenset[int], int], list[int]] = field(default_factory=dict)

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
        if one.op == "UPDATE":
            return 1, self.update(rank, one)
        if one.op == "REDUCE_REPLICAS":
            if one.values or one.peers:
                raise Wrong("a sum over replicas of something else")
            self.summed.setdefault(one.stage, []).append(self.gradients[one.stage])
            return 1, []
        if not one.op.startswith(("SEND", "RECV")):
            self.compute(rank, one)
            return 1, []
        tickets = []
        count = 0
        while at + count < len(row) and row[at + count].op.startswith(("SEND", "RECV", "REDUCE_REPLICAS")):
            if row[at + count].op == "REDUCE_REPLICAS":
                self.post(rank, row, at + count)
            else:
                tickets.append(self.message(rank, row[at + count]))
            count += 1
        return count, tickets

    def update(self, rank: int, one: Instruction) -> list:
        """Makes the next version of some weights: at once if nobody shares them, else when all that do are there."""
        key = one.values[0] if one.values else one.stage
        if len(one.values) > 1 or one.version != len(self.versions(rank, key)):
            raise Wrong("makes a version that is not the next")
        if not one.values and one.peers:
            raise Wrong("a stage's own weights are on no other rank")
        stages = self.holders(rank, key)
        first = self.used.get((rank, key), 0)
        self.used[rank, key] = one.microbatch + 1
        part = sum(self.made.get(s, {}).get(m, 0) for s in stages for m in range(first, one.microbatch + 1))
        if not one.values:
            self.versions(rank, key).append(mix(self.versions(rank, key)[-1], part))
            return []
        group = frozenset({rank, *(self.program.shape.placement[p] for p in one.peers)})
        calls = self.sums.setdefault(group, {}).setdefault(rank, [])
        calls.append(f"{key}@{one.version}")
        self.parts.setdefault((group, len(calls) - 1), []).append(part)
        return [("sum", group, len(calls) - 1, calls[-1], rank)]

    def holders(self, rank: int, key: int | str) -> list[int]:
        """The stages of a rank that have these weights."""
        if isinstance(key, int):
            return [key]
        shared = next((s for s in self.partition.shared if s.parameter == key), None)
        if shared is None:
            raise Wrong("updates what is not shared")
        return [s for s in shared.stages if self.program.shape.placement[s] == rank]

    def versions(self, rank: int, key: int | str) -> list[int]:
        return self.weights.setdefault((rank, key), [mix("weights", key)])

    def read(self, rank: int, one: Instruction) -> list[int]:
        """The weights that a computation reads: its stage's own, and the shared ones as their first stage says."""
        if one.version < 0:
            return []
        wanted: list[tuple[int | str, int]] = [(one.stage, one.version)]
        for shared in self.partition.shared:
            if one.stage in shared.stages:
                first = ("FORWARD", min(shared.stages), one.microbatch)
                named = [o.version for row in self.program.rows for o in row if (o.op, o.stage, o.microbatch) == first]
                wanted.append((shared.parameter, named[0] if named else -1))
        if any(not 0 <= version < len(self.versions(rank, key)) for key, version in wanted):
            raise Wrong("reads a version that is not there")
        return [self.versions(rank, key)[version] for key, version in wanted]

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
            _, group, index, name, *_ = ticket
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
            if ticket[0] == "sum" and len(ticket) > 4:
                _, group, index, name, rank = ticket
                found = self.versions(rank, name.split("@")[0])
                found.append(mix(found[-1], sum(self.parts[group, index])))
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
        weights = self.read(rank, one)
        inputs = mix(stage, m, *weights, *(self.values[rank, value, m, source] for value, source in reads))
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
        made = self.made.setdefault(stage, {})
        made[m] = made.get(m, 0) + gradient
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
        sums = sorted(self.summed.items())
        weights = sorted((str(key), versions) for key, versions in self.weights.items())
        return sorted(self.gradients.items()), sorted(self.halves), sorted(totals.items()), whole, sums, weights


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
    updating = [
        (communicate(make_timetable(name, Shape(4, 4, 6)), partition), partition)
        for name in ("pipedream", "pipedream-2bw")
        for partition in (chain(4, shared=(Shared("w", (0, 3)), Shared("v", (1, 2)))), SKIPS)
    ]
    return [*found, *updating, *((for_replicas(program, 2), partition) for program, partition in found[::2])]


def mutate(program: Program, draw: random.Random) -> Program:
    """One random change of one kind."""
    rows = [list(row) for row in program.rows]
    rank = draw.randrange(len(rows))
    row = rows[rank]
    kind = draw.choice(
        (
            "drop",
            "twice",
            "swap",
            "next",
            "move",
            "rank",
            "redirect",
            "microbatch",
            "op",
            "values",
            "sum",
            "version",
            "update",
        )
    )
    sums = [i for i, one in enumerate(row) if one.op.startswith("REDUCE")]
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
        row[at] = replace(
            row[at],
            op=draw.choice(
                ("FORWARD", "BACKWARD", "SEND_F", "RECV_F", "SEND_B", "RECV_B", "REDUCE_REPLICAS", "UPDATE")
            ),
        )
    elif kind == "version" and row[at].version >= 0:
        row[at] = replace(row[at], version=row[at].version + draw.choice((-1, 1)))
    elif kind == "update" and (places := [i for i, one in enumerate(row) if one.op == "UPDATE"]):
        row.insert(draw.randrange(len(row)), row.pop(draw.choice(places)))
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


def try_mutants(found: list[tuple[Program, Partition]], count: int, seed: int) -> tuple[int, int]:
    """How many of ``count`` mutants are wrong, and how many are refused although they are right; AssertionError for a
    wrong one that is not refused."""
    draw = random.Random(seed)
    known = [(program, partition, outcome(program, partition)) for program, partition in found]
    assert not [right for _, _, right in known if isinstance(right, str)]
    wrong = refused_but_right = 0
    for _ in range(count):
        program, partition, right = draw.choice(known)
        mutant = mutate(program, draw)
        if mutant == program:
            continue
        is_wrong = outcome(mutant, partition) != right
        message = refusal(mutant, partition)
        if message:
            assert re.search(r"\d(F|B|I|W|SEND_[FB]|RECV_[FB])-?\d|REDUCE_|UPDATE", message), message
            refused_but_right += not is_wrong
        else:
            assert not is_wrong, f"{program.schedule}: not refused:\n{mutant}"
        wrong += is_wrong
    return wrong, refused_but_right


def test_every_mutant_that_is_wrong_is_refused_with_an_instruction():
    wrong, refused_but_right = try_mutants(subjects(), MUTANTS, seed=0)
    assert wrong > 0.6 * MUTANTS
    assert refused_but_right < 0.03 * MUTANTS  # only instructions that stand twice, or messages that nothing needs


def test_a_right_program_comes_back():
    for program, partition in subjects():
        assert verify(program, partition) is program


def every_schedule() -> list[tuple[Program, Partition]]:
    """All schedules over loops and Vs, on a chain with shared parameters and, at four stages, on one with skips."""
    found = subjects()
    long = chain(8, shared=(Shared("w", (0, 7)), Shared("v", (1, 2, 5))))
    for name in schedule_names():
        each = find_schedule(name).per_rank
        for stages, partition in ((4, SKIPS), (8, long)):
            ranks = stages // (each or 2)
            for microbatches in (2, ranks, ranks + 3):
                try:
                    timetable = make_timetable(name, Shape(stages, ranks, microbatches), partition=partition)
                except ScheduleError:
                    continue
                found.append((communicate(timetable, partition), partition))
    return found


def main(count: int) -> None:
    found = every_schedule()
    wrong, refused = try_mutants(found, count, seed=1)
    names = sorted({program.schedule for program, _ in found})
    print(f"{count} mutants of {len(found)} programs ({', '.join(names)}): {wrong} wrong, all refused by name; "
          f"{refused} refused although the reference finds them right")  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]))
