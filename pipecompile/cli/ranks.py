"""Starts the processes of ``pipecompile run``, as torchrun does, and says in one line how they ended."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence


def start_ranks(processes: int, words: Sequence[str]) -> int:
    """Run ``pipecompile run`` with ``words`` in so many processes; the exit code of all.

    Processes tell their own errors; torchrun's account of the same is left out. A signal to this process ends them.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)}
    logging.disable(logging.ERROR)
    command = ["--standalone", "--nproc-per-node", str(processes), "-m", "pipecompile", "run", *words]
    try:
        run(parse_args(command))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"pipecompile: rank {rank} was ended by {failure.signal_name()}", file=sys.stderr)
        return 1
    except SignalException as error:
        return 128 + int(error.sigval)
    finally:
        logging.disable(logging.NOTSET)
        for each, handler in handlers.items():
            signal.signal(each, handler)
    return 0
