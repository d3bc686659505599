"""The thread that beats ends with the runtime: one that is in the store while Python shuts down aborts the process."""

from __future__ import annotations

import gc
import threading

from torch.distributed import TCPStore

from pipecompile.runtime.sentry import Sentry
from tests.runtime.handmade import program_of


def test_the_thread_has_ended_when_its_sentry_is_gone() -> None:
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    sentry = Sentry(store, "here", program_of(), process=0, processes=1, timeout_s=3)
    (pulse,) = [thread for thread in threading.enumerate() if thread.name == "here pulse"]
    assert pulse.is_alive()
    del sentry
    gc.collect()
    assert not pulse.is_alive()
