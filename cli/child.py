"""A command that runs in a process group of its own, so that all of it can be ended; and the signals meant for it.

If we are in the terminal's foreground, the command takes our place there while it runs: it can read, and Ctrl-C goes to
it alone. It cannot be suspended there (Ctrl-Z): nobody would see that it stands still while its lease is kept.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Self

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

_POLL_S = 0.02


class Signalled(BaseException):
    """A signal came while no command was running that it could be passed on to."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Child:
    """The running command. `woken` is set when it has ended. OSError if it cannot be started."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], woken: threading.Event) -> None:
        self._terminal = _foreground()
        self._process = subprocess.Popen(command, env=environment, process_group=0)
        self._lend_terminal(self._process.pid)
        self._woken = woken
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="leases-command", daemon=True).start()

    def _watch(self) -> None:
        while True:
            # It is left unreaped: until `result` its number cannot become another process's.
            seen = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
            if seen is None or seen.si_code not in (os.CLD_STOPPED, os.CLD_TRAPPED):
                break
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOHANG)
            if self._terminal is not None:
                self.send(signal.SIGCONT)
        self._ended.set()
        self._woken.set()

    @property
    def group(self) -> int:
        """The number of its process group."""
        return self._process.pid

    @property
    def running(self) -> bool:
        return not self._ended.is_set()

    def send(self, number: int) -> None:
        """Send a signal to the whole group; harmless once it is gone."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def result(self) -> int:
        """Wait for the end; the exit code as a shell says it: 128 + n for a signal."""
        self._ended.wait()  # else the watch would find nobody to wait for
        code = self._process.wait()
        self._lend_terminal(os.getpgrp())
        return 128 - code if code < 0 else code

    def end(self, grace_s: float) -> None:
        """End the group: TERM, and what is left of it after the grace, KILL."""
        give_up_at = time.monotonic() + grace_s
        self.send(signal.SIGTERM)
        self.send(signal.SIGCONT)  # one that is stopped could not act on the TERM
        if self._ended.wait(max(0.0, grace_s)):
            self.result()
            while self._group_lives() and time.monotonic() < give_up_at:
                time.sleep(_POLL_S)
        self.send(signal.SIGKILL)
        self.result()

    def _group_lives(self) -> bool:
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def _lend_terminal(self, group: int) -> None:
        if self._terminal is None:
            return
        before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # we may be in the background by now
        with suppress(OSError):
            os.tcsetpgrp(self._terminal, group)
        signal.signal(signal.SIGTTOU, before)
        if group == self._process.pid:
            self.send(signal.SIGCONT)  # it may have wanted to read before it was its turn


class Guard:
    """A shell that ends a command's group should this process die without having done so: SIGKILL asks nobody.

    It reads from a pipe of which this process has the only other end, and which the system closes with it.
    """

    # Without `--` before the group: not every shell's kill knows it.
    _SCRIPT = 'read _; kill -TERM "-$1"; kill -CONT "-$1"; sleep "$2"; kill -KILL "-$1"'

    def __init__(self, group: int, grace_s: float) -> None:
        reading, self._writing = os.pipe()
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", self._SCRIPT, "leases-guard", str(group), str(math.ceil(grace_s))],
            stdin=reading,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(reading)

    def dismiss(self) -> None:
        """The command has ended: there is nothing to guard any more."""
        self._process.kill()
        self._process.wait()
        os.close(self._writing)


def _foreground() -> int | None:
    """The terminal on stdin, if we are in its foreground."""
    with suppress(OSError, ValueError, AttributeError):
        descriptor = sys.stdin.fileno()
        if os.isatty(descriptor) and os.tcgetpgrp(descriptor) == os.getpgrp():
            return descriptor
    return None


class Signals:
    """While it is entered, signals go to the command, or raise `Signalled` while there is none.

    One that is ignored (nohup) stays ignored.
    """

    def __init__(self) -> None:
        self._child: Child | None = None
        self._starting = False
        self._early: list[int] = []
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # were it ignored, no child's end could be waited for
        for number in FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave

    def _caught(self, number: int, _frame: FrameType | None) -> None:
        if self._starting:
            self._early.append(number)
        elif self._child is not None:
            self._child.send(number)
        else:
            raise Signalled(number)

    def start(self, command: Sequence[str], environment: Mapping[str, str], woken: threading.Event) -> Child:
        """Start the command; a signal that comes meanwhile reaches it."""
        self._starting = True
        try:
            self._child = Child(command, environment, woken)
        finally:
            self._starting = False
        for number in self._early:
            self._child.send(number)
        return self._child

    def ended(self) -> None:
        """The command has ended: signals are ours again."""
        self._child = None
