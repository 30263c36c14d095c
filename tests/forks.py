"""Processes for tests to kill: a program without threads that forks others, which run functions of a test's file."""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import traceback

import pytest
import torch


def say(value):
    print("said", json.dumps(value), flush=True)


def serve(functions) -> None:
    """Fork a child for each line [function, *arguments] that comes in; tell its number, and how it ended."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        function, *arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            faulthandler.register(signal.SIGALRM, chain=True)
            signal.alarm(120)  # should the tests themselves be killed
            print("began", os.getpid(), flush=True)
            try:
                functions[function](*arguments)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


class Forks:
    """A process that forks others, one at a time: to start one from nothing and import torch takes seconds."""

    def __init__(self, script) -> None:
        self.pid = None
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, function, *arguments) -> None:
        self.server.stdin.write(json.dumps([function.__name__, *map(str_of_path, arguments)]) + "\n")
        self.server.stdin.flush()
        kind, pid = self.server.stdout.readline().split(maxsplit=1)
        assert kind == "began"
        self.pid = int(pid)

    def hear(self):
        """What the child says."""
        kind, value = self.server.stdout.readline().split(maxsplit=1)
        if kind == "ended":
            self.pid = None
        assert kind == "said", "the child ended without a word"
        return json.loads(value)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.end() == -signal.SIGKILL

    def end(self) -> int:
        """How the child ended: its exit code, or the signal that killed it, negative."""
        kind, code = self.server.stdout.readline().split(maxsplit=1)
        while kind != "ended":
            kind, code = self.server.stdout.readline().split(maxsplit=1)
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
        """End what a test that failed has left."""
        if self.pid is not None:
            self.kill()

    def close(self) -> None:
        self.server.stdin.close()
        self.server.stdout.close()
        assert self.server.wait() == 0


def str_of_path(value):
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def serving(script):
    """For a fixture: a server of the functions of a test's file, which calls `serve(globals())` as a program."""
    if not hasattr(os, "fork"):
        pytest.skip("needs processes that fork")
    forks = Forks(script)
    yield forks
    forks.close()
