"""The files of a build as text: made of a plan, a program and the stages' sources, and read again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipecompile.errors import BuildError
from pipecompile.ir import Program
from pipecompile.ir.json_text import parse
from pipecompile.plan import Plan
from pipecompile.plan_file import check_together, read_plan

Files = Mapping[str, str]


def build_files(plan: Plan, program: Program, sources: tuple[str, ...]) -> dict[str, str]:
    """The contents of a build directory by file name."""
    files = {
        "plan.json": json.dumps(plan.to_json(), indent=1),
        "program.json": json.dumps(program.to_json()),
        "program.txt": f"{program}\n",
    }
    return files | {f"stages/stage_{index}.py": source for index, source in enumerate(sources)}


def plan_and_program(files: Files) -> tuple[Plan, Program]:
    """A build's plan and program, which belong together; BuildError or ProgramError where they are malformed.

    The program is not proved yet.
    """
    plan = read_plan(_json_of(files, "plan.json"))
    program = Program.from_json(_json_of(files, "program.json"))
    check_together(plan, program)
    return plan, program


def _json_of(files: Files, name: str) -> Any:
    if name not in files:
        raise BuildError(f"the build has no {name}; compile again")
    return parse(files[name], f"the build's {name}", remedy="compile again")
