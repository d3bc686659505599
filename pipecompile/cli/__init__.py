"""The command line: ``pipecompile model.py --stages 8`` and its subcommands, each a module of this folder."""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import os
import sys
from collections.abc import Sequence

from pipecompile.cli.output import nobody_reads
from pipecompile.errors import PipecompileError

COMMANDS = ("compile", "run", "verify", "schedule", "partition")
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 if it did what was asked, 1 for a user's error, 2 for a usage error,
    130 if it was interrupted."""
    atexit.register(gc.freeze)  # what is left then goes with the process: looking for cycles in it takes a second
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words[0] if words and words[0] in COMMANDS else "compile"
    rest = words[1:] if words and words[0] in COMMANDS else words
    parser = argparse.ArgumentParser(
        prog="pipecompile" if name == "compile" else f"pipecompile {name}",
        epilog=f"Commands: pipecompile model.py (the default: compile), {', '.join(COMMANDS[1:])}; each has --help.",
    )
    command = importlib.import_module(f"pipecompile.cli.{name}")
    command.add_arguments(parser)
    options = parser.parse_args(rest)
    try:
        code = int(command.run(options) or 0)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not nobody_reads(sys.stdout):  # another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except PipecompileError as error:
        print(f"pipecompile: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("pipecompile: interrupted", file=sys.stderr, flush=True)
        if "RANK" in os.environ:
            os._exit(INTERRUPTED)  # torch's threads may wait for ranks that have ended
        return INTERRUPTED
