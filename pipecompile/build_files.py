"""The files of a build as text: made of a plan, a program and the stages' sources, and read again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipecompile.errors import BuildError
from pipecompile.ir import Program
from pipecompile.plan import Plan

Files = Mapping[str, str]


def build_files(plan: Plan, program: Program, sources: tuple[str, ...]) -> dict[str, str]:
    """The contents of a build directory by file name."""
    files = {
        "plan.json": json.dumps(plan.to_json(), indent=1),
        "program.json": json.dumps(program.to_json()),
        "program.txt": f"{program}\n",
    }
    return files | {f"stages/stage_{index}.py": source for index, source in enumerate(sources)}


def json_of(files: Files, name: str) -> Any:
    """A build's JSON file by name; BuildError if it is missing or malformed."""
    try:
        return json.loads(files[name])
    except KeyError:
        raise BuildError(f"the build has no {name}; compile again") from None
    except ValueError as error:
        raise BuildError(f"the build's {name} is no JSON: {error}; compile again") from error
