"""Executes programs: stages, microbatches, transports and the executor. Knows the values of ``ir`` and the errors only."""

from pipecompile.runtime.agree import any_failed, first_to_say, from_first_rank, settling
from pipecompile.runtime.device import check_current, device_of
from pipecompile.runtime.executor import Ran
from pipecompile.runtime.faults import connect
from pipecompile.runtime.local import LocalRuntime
from pipecompile.runtime.main_gradients import (
    forget_main_gradient,
    gradient,
    keep_main_gradient,
    main_gradients_aside,
    set_gradient,
)
from pipecompile.runtime.microbatches import split
from pipecompile.runtime.random import begin_microbatch, own_streams, reseed, watch
from pipecompile.runtime.rank import RankRuntime
from pipecompile.runtime.recompute import compile_recomputed, recompute, recomputed
from pipecompile.runtime.replicas import World, world_of
from pipecompile.runtime.report import Gathering, report
from pipecompile.runtime.stage import Stage, make_stage
from pipecompile.runtime.stream_links import backend_here
from pipecompile.runtime.transport import Mailboxes, Transport

__all__ = [
    "Gathering",
    "LocalRuntime",
    "Mailboxes",
    "Ran",
    "RankRuntime",
    "Stage",
    "Transport",
    "World",
    "any_failed",
    "backend_here",
    "begin_microbatch",
    "check_current",
    "compile_recomputed",
    "connect",
    "device_of",
    "first_to_say",
    "forget_main_gradient",
    "from_first_rank",
    "gradient",
    "keep_main_gradient",
    "main_gradients_aside",
    "make_stage",
    "own_streams",
    "recompute",
    "recomputed",
    "report",
    "reseed",
    "set_gradient",
    "settling",
    "split",
    "watch",
    "world_of",
]
