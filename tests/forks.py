"""Processes for tests to kill: a program without threads that forks others, which run functions of a test's file."""

import contextlib
import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback

import pytest
import torch

LIMIT = 120  # seconds that a child may take
SILENCE = LIMIT + 60  # seconds after which the server itself must hang


def say(value) -> None:
    tell("said", json.dumps(value))


def tell(*words) -> None:
    """One line, in one call: a process that is killed, or two that speak at once, tear none."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def fork() -> int:
    """As `os.fork`. A child that takes too long says on stderr where it is, and ends: an alarm is not inherited."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(LIMIT)
    return pid


def serve(functions) -> None:
    """Fork a child for each line [function, *arguments] that comes in; tell its number, and how it ended."""
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGALRM, chain=True)
    for line in sys.stdin:
        function, *arguments = json.loads(line)
        pid = fork()
        if pid == 0:
            tell("began", os.getpid())
            try:
                functions[function](*arguments)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        tell("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


class Forks:
    """A process that forks others, one at a time: to start one from nothing and import torch takes seconds."""

    def __init__(self, script) -> None:
        self._script = script
        self._open()

    def _open(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", self._script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
            start_new_session=True,  # a group of its own, which ends as one
        )
        self._heard = b""
        self.pid = None

    def _line(self) -> list[str]:
        """The next line that comes, as its first word and the rest."""
        while b"\n" not in self._heard:
            ready, _, _ = select.select([self._server.stdout], [], [], SILENCE)
            part = os.read(self._server.stdout.fileno(), 1 << 16) if ready else b""
            if not part:
                raise ChildProcessError(f"the server of {self._script} {'ended' if ready else 'hangs'}")
            self._heard += part
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode().split(maxsplit=1)

    def start(self, function, *arguments) -> None:
        self._server.stdin.write((json.dumps([function.__name__, *map(str_of_path, arguments)]) + "\n").encode())
        kind, pid = self._line()
        assert kind == "began"
        self.pid = int(pid)

    def hear(self):
        """What the child says."""
        kind, value = self._line()
        if kind == "ended":
            self.pid = None
        assert kind == "said", "the child ended without a word"
        return json.loads(value)

    def wait_until(self, condition) -> None:
        """Wait for something that the child does without a word."""
        while not condition():
            assert not self._heard, "the child said something instead"
            assert not select.select([self._server.stdout], [], [], 0)[0], "the child said something, or ended, instead"
            time.sleep(0.0002)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.end() == -signal.SIGKILL

    def end(self) -> int:
        """How the child ended: its exit code, or the signal that killed it, negative."""
        kind, code = self._line()
        while kind != "ended":
            kind, code = self._line()
        self.pid = None
        return int(code)

    def run(self, function, *arguments) -> int:
        self.start(function, *arguments)
        return self.end()

    def ask(self, function, *arguments):
        self.start(function, *arguments)
        answer = self.hear()
        assert self.end() == 0
        return answer

    def clear(self) -> None:
        """After a test that failed: begin anew, whatever it has left, so that no other one fails with it."""
        if self.pid is not None:
            self._end()
            self._open()

    def close(self) -> None:
        self._server.stdin.close()
        try:
            assert self._server.wait(LIMIT) == 0
        finally:
            self._end()

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)  # with all that it has forked
        self._server.wait()
        self._server.stdin.close()
        self._server.stdout.close()


def str_of_path(value):
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def serving(script):
    """For a fixture: a server of the functions of a test's file, which calls `serve(globals())` as a program."""
    if not hasattr(os, "fork"):
        pytest.skip("needs processes that fork")
    forks = Forks(script)
    yield forks
    forks.close()
