"""The brink: where a worker of the demo stands still, it stands still, and not a little later."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading

FREEZES = """
import threading
from leases.cli.demo.brink import freeze

def work():
    for _ in range(20):
        thaw = threading.Event()
        thaw.set()  # so it stands still once
        print("stops", flush=True)
        freeze(thaw)
        print("goes on", flush=True)

worker = threading.Thread(target=work)
worker.start()
worker.join()
"""


def test_it_stands_still_before_it_goes_on_though_other_threads_could_take_the_signal() -> None:
    command = [sys.executable, "-c", FREEZES]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        guard = threading.Timer(60, process.kill)
        guard.start()
        try:
            for _ in range(20):
                assert process.stdout.readline() == b"stops\n"
                _, status = os.waitpid(process.pid, os.WUNTRACED)
                assert os.WIFSTOPPED(status)
                said, _, _ = select.select([process.stdout], [], [], 0)
                assert not said  # a signal to the whole process let it go on a little, most of the time
                process.send_signal(signal.SIGCONT)
                assert process.stdout.readline() == b"goes on\n"
        finally:
            guard.cancel()
            process.kill()
