"""Clients in processes of their own, each with its connection open, that start a job at one moment."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Self

from benchmarks.contestant import Client, Opener

PATIENCE_S = 600.0

Job = Callable[..., Any]
"""`job(client, *arguments)`: a function of a module, so that it can be sent."""


@dataclass(frozen=True)
class Done:
    """What a crew did: how long from the first start to the last end, and each one's answer."""

    elapsed_s: float
    answers: list[Any]


class CrewFailed(Exception):
    """A client of the crew failed; the message is its traceback."""


class Crew:
    """So many processes with a client each; a context manager that ends them."""

    def __init__(self, opener: Opener, count: int) -> None:
        context = multiprocessing.get_context("spawn")  # a client's threads and connections do not survive a fork
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(opener, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __enter__(self) -> Self:
        try:
            for pipe in self.pipes:
                _answer(pipe)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes:
            with suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self.pipes:
            pipe.close()

    def do(self, job: Job, arguments: Sequence[Sequence[Any]]) -> Done:
        """Have each do the job with its own arguments, all at once; raise `CrewFailed` if one fails."""
        for pipe, its in zip(self.pipes, arguments, strict=True):
            pipe.send((job, its))
        for pipe in self.pipes:
            _answer(pipe)  # it has read its job
        for pipe in self.pipes:
            pipe.send("go")
        done = [_answer(pipe) for pipe in self.pipes]
        began, ended = min(each[0] for each in done), max(each[1] for each in done)
        return Done(ended - began, [each[2] for each in done])


def _answer(pipe: Connection) -> Any:
    if not pipe.poll(PATIENCE_S):
        raise CrewFailed(f"no answer in {PATIENCE_S:g} s")
    try:
        failed, answer = pipe.recv()
    except EOFError:
        raise CrewFailed("a client's process has ended") from None
    if failed:
        raise CrewFailed(answer)
    return answer


def _serve(opener: Opener, pipe: Connection) -> None:
    client: Client | None = None
    try:
        client = opener()
        pipe.send((False, None))
        while (order := pipe.recv()) is not None:
            job, arguments = order
            pipe.send((False, None))
            pipe.recv()
            began = time.monotonic()  # one clock for all processes of a machine
            answer = job(client, *arguments)
            pipe.send((False, (began, time.monotonic(), answer)))
    except EOFError:
        pass
    except BaseException:  # noqa: BLE001  # told to the parent, who raises it
        with suppress(OSError):
            pipe.send((True, traceback.format_exc()))
    finally:
        if client is not None:
            with suppress(Exception):
                client.close()
