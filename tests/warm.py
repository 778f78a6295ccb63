"""Daemons without the seconds of their imports: copies of a process that has imported everything.

``start`` makes one; from ``main`` on it is what ``python -m deca_node`` would have made. As a
program this file is the process that is copied: it reads a JSON request a line from stdin, answers
each with a line on stdout, and when stdin closes it ends, and all that it started with it.
"""

import functools
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

# --- the process that is copied


def import_all() -> None:
    """What a daemon imports until it trains a Llama."""
    if "deca_node.node" not in sys.modules:
        import transformers.models.llama.modeling_llama
        import transformers.models.llama.tokenization_llama  # noqa: F401

        import deca_node.cli
        import deca_node.node  # noqa: F401

        gc.collect()
        gc.freeze()  # copies do not touch, and so share, what is there


def become(
    arguments: Sequence[str],
    env: Mapping[str, str],
    log: str,
    first: Callable[[], None] = lambda: None,
) -> NoReturn:
    """Turn a copy of this process into ``deca-node``.

    Args:
        arguments: of the command.
        env: its environment.
        log: the file that what it says is appended to.
        first: called in its own session, with the files of the process that was copied still open.
    """
    code = 1
    try:
        os.setsid()
        first()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for copy in (1, 2):
            os.dup2(out, copy)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.closerange(3, 1024)
        os.environ.clear()
        os.environ.update(env)
        random.seed()
        from deca_node.cli import main

        main(list(arguments))
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # noqa: BLE001 - below are the frames of the process that was copied
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Forked:
    """A copy of this process, with the part of Popen's interface that is used here."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit status, minus the signal's number when one ended it, None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self) -> None:
        """Until it has ended."""
        while self.poll() is None:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)


def _serve() -> None:
    import_all()
    started: dict[int, Forked] = {}
    try:
        _answer(started)
    finally:
        for process in started.values():
            process.send_signal(signal.SIGKILL)


def _answer(started: dict[int, Forked]) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        match request.pop("do"):
            case "start":
                pid = os.fork()
                if pid == 0:
                    become(**request)
                started[pid] = Forked(pid)
                answer["pid"] = pid
            case "signal":
                started[request["pid"]].send_signal(request["number"])
            case "poll":
                answer["code"] = started[request["pid"]].poll()
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


# --- for tests


class _Source:
    """The process that is copied, as this one sees it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"],
            cwd=Path(__file__).parents[1],
            # What is read when a library is loaded is the same for all.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C is for the tests alone, which end it when they are done.
            start_new_session=True,
            text=True,
        )

    def ask(self, do: str, **about: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps({"do": do, **about}) + "\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


@functools.cache
def _source() -> _Source:
    return _Source()


class Process:
    """What another process started for us, with the part of Popen's interface that tests use."""

    def __init__(self, ask: Callable[..., dict[str, Any]], pid: int) -> None:
        self._ask, self.pid = ask, pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        if self._code is None:
            self._code = self._ask("poll", pid=self.pid)["code"]
        return self._code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        self._ask("signal", pid=self.pid, number=int(number))

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not.
        """
        limit = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if limit is not None and time.monotonic() > limit:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            time.sleep(0.05)  # between two questions to another process
        return code


def start(arguments: Sequence[str], env: Mapping[str, str], log: Path) -> Process:
    """Start ``deca-node`` with arguments; what it says is appended to ``log``."""
    about = {"arguments": list(arguments), "env": dict(env), "log": str(log)}
    ask = _source().ask
    return Process(ask, ask("start", **about)["pid"])


if __name__ == "__main__":
    _serve()
