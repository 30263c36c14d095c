"""What `campaign.py` does to accumulators, in its own process and in those that it kills.

Run as a program, this file is a process without threads that forks others, see `forks.Forks`.
"""

import itertools
import os
import time

import numpy as np
from forks import fork, say, serve
from moments import LIBRARY, at_each
from reference import same, snapshot
from test_disk import endless, show

OPERATIONS = ["update", "update", "update", "merge", "reset", "load_state_dict", "save"]
SEED_OF_OTHERS = 1 << 20  # where the stream begins that is merged or loaded


def operation(kind, scale, seed, number):
    """The name of an operation of a stream that is the same in every process, and what does it."""
    name = OPERATIONS[np.random.default_rng((seed, number)).integers(len(OPERATIONS))]
    other = endless(kind, scale=scale)
    if name in ("merge", "load_state_dict"):
        for each in (0, 1):
            show(other, SEED_OF_OTHERS + 2 * number + each)
    return name, {
        "update": lambda accumulator, path: show(accumulator, number),
        "merge": lambda accumulator, path: accumulator.merge(other),
        "reset": lambda accumulator, path: accumulator.reset(),
        "load_state_dict": lambda accumulator, path: accumulator.load_state_dict(other.state_dict()),
        "save": lambda accumulator, path: accumulator.save(f"{path}.saved"),
    }[name]


def keep_operating(kind, path, scale, seed, first, pause):
    """One operation after the other; a byte in a log for each that is done."""
    accumulator = endless(kind, path, scale=scale)
    say("opened")
    with open(f"{path}.log", "ab", buffering=0) as log:
        for number in itertools.count(first):
            _, operate = operation(kind, scale, seed, number)
            if pause:  # so that a kill is as likely at every line, however little time that takes
                of = os.path.join(LIBRARY, "maps")
                at_each(lambda _: time.sleep(pause), operate, accumulator, path, of=of)
            else:
                operate(accumulator, path)
            log.write(b".")


def run_out_of_room(kind, path, way, room):
    """Say the error of what must write more than there is room for, or None."""
    import resource

    accumulator = endless(kind, None if way == "path" else path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        if way == "path":
            endless(kind, path, journal=1)
        elif way == "save":
            accumulator.save(f"{path}.saved")
        else:
            show(accumulator, 100)
        say(None)
    except OSError as error:
        say(error.errno)


def fork_meanwhile(kind, path, in_a_file, seed, at_once):
    """Use an accumulator in a forked child and, meanwhile or afterwards, here; say what is wrong."""
    accumulator = endless(kind, path if in_a_file else None)
    show(accumulator, 0)
    before = snapshot(accumulator)
    in_child, in_parent = (operation(kind, 1, seed, number) for number in (1, 2))
    if fork() == 0:
        wrong = 0
        if not in_a_file:
            in_child[1](accumulator, f"{path}.child")
        elif in_child[0] != "save":
            try:
                in_child[1](accumulator, path)
                wrong |= 1
            except BlockingIOError:
                pass
        if in_a_file and not at_once and not same(snapshot(accumulator), before):
            wrong |= 2
        os._exit(wrong)
    if not at_once:
        status = os.wait()[1]
        assert same(snapshot(accumulator), before), "a child changed what its parent holds"
    in_parent[1](accumulator, path)
    if at_once:
        status = os.wait()[1]
    assert status == 0, f"the child ended with {status}"
    expected = endless(kind)
    show(expected, 0)
    if in_parent[0] != "save":
        in_parent[1](expected, path)
    assert same(snapshot(accumulator), snapshot(expected)), "the parent holds something else"
    if in_a_file:
        accumulator.verify()
        del accumulator
        assert same(snapshot(endless(kind, path)), snapshot(expected)), "the file holds something else"
    say(None)


if __name__ == "__main__":
    serve(globals())
