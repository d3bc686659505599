"""Lets a process that torchrun ends say why first.

When one process has died, torchrun ends the others within a tenth of a second, and kills them after thirty more.
"""

from __future__ import annotations

import os
import signal
import threading
import time

GRACE_S = 5.0


def outlive_sigterm() -> None:
    """On SIGTERM, end after ``GRACE_S`` only; where someone else handles it, or torchrun is not there, do nothing."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    if threading.current_thread() is not threading.main_thread():
        return
    heard, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    threading.Thread(target=_end_late, args=(heard,), name="pipecompile SIGTERM", daemon=True).start()


def _end_late(heard: int) -> None:
    """The wake-up descriptor tells of signals at once, whatever the main thread waits for."""
    while os.read(heard, 1) != bytes([signal.SIGTERM]):
        pass
    time.sleep(GRACE_S)
    os._exit(128 + signal.SIGTERM)
