"""Where each process of a program stands, readable by the others even when it is stopped or has died.

A process writes the position of each instruction that it begins into shared memory, which costs it 40 ns; processes of
the same host map that memory, and hold it when the writer is gone. The writer also holds a lock on it, which the system
takes away at its death, however it dies.

A round is a step, or a sum that the training loop asked for; all processes have the same ones. Places grow during it:
BEGINNING, the position of each instruction, their number (all are done; the step's messages, sums and loss are awaited)
or SUMMING, OUTSIDE, which lasts until the next round.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import secrets
import signal
import weakref

ROUND, PLACE, WAITS, TOKEN = 0, 1, 2, 3
"""The words of the memory: rounds begun, where in the last one, whether only others are waited for there (told in sums
and at the end of a step), and a number that tells this memory from any other."""
WORDS = 4
BEGINNING = -1
SUMMING = 1 << 30
"""In a sum over all ranks that the training loop asked for."""
OUTSIDE = SUMMING + 1


class Mark:
    """This process's own: ``words[PLACE] = position`` says where it is."""

    def __init__(self) -> None:
        self._file = os.memfd_create("pipecompile")
        os.ftruncate(self._file, 8 * WORDS)
        self.words = memoryview(mmap.mmap(self._file, 8 * WORDS)).cast("q")
        self.words[PLACE], self.words[TOKEN] = OUTSIDE, secrets.randbits(62)
        fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def address(self) -> str:
        """Where the others find it."""
        return json.dumps([os.getpid(), self._file, self.words[TOKEN]])


class SeenMark:
    """The mark of another process of this host."""

    def __init__(self, pid: int, file: int) -> None:
        self.pid = pid
        self._file = os.open(f"/proc/{pid}/fd/{file}", os.O_RDWR)
        weakref.finalize(self, os.close, self._file)
        self.words = memoryview(mmap.mmap(self._file, 8 * WORDS)).cast("q")

    def seen(self) -> tuple[int, ...]:
        """Its round, place, and whether it waits there."""
        return tuple(self.words[:TOKEN])

    def gone(self) -> bool:
        """Whether the process that wrote it has ended."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        fcntl.lockf(self._file, fcntl.LOCK_UN)
        return True

    def kill(self) -> None:
        """End its process, which answers nothing."""
        if not self.gone():
            os.kill(self.pid, signal.SIGKILL)


def see(address: str) -> SeenMark | None:
    """The mark at an address; None if its process is on another host, or of another user."""
    pid, file, token = json.loads(address)
    try:
        seen = SeenMark(pid, file)
    except (OSError, ValueError):
        return None
    return seen if seen.words[TOKEN] == token else None
