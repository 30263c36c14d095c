"""Something happens at a given moment of what the library does: an exception, a kill, a look at a file."""

import itertools
import os
import shutil
import sys

import oaa_lib

LIBRARY = os.path.dirname(oaa_lib.__file__)


class Interrupt(BaseException):
    """Stands for Ctrl-C."""


def at_each(action, function, *args, of=LIBRARY, event="line"):
    """Run a function, and an action, which is given its number, before each line or opcode of files in a folder."""
    numbers = itertools.count(1)

    def trace(frame, what, argument):
        if not frame.f_code.co_filename.startswith(of):
            return None
        frame.f_trace_opcodes = event == "opcode"
        if what == event:
            action(next(numbers))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return function(*args)
    finally:
        sys.settrace(before)


def count(function, *args, of=LIBRARY, event="line") -> int:
    """How many lines or opcodes of these files a function runs."""
    numbers = [0]
    at_each(numbers.append, function, *args, of=of, event=event)
    return numbers[-1]


def interrupted(steps, function, *args, event="line") -> bool:
    """Run a function and raise before those of all lines of the library that it runs; whether it came to that."""

    def action(number):
        if number in steps:
            raise Interrupt

    try:
        at_each(action, function, *args, event=event)
    except Interrupt:
        return True
    return False


def copied(path, name) -> str:
    """A copy of a file, beside it."""
    return shutil.copyfile(path, os.path.join(os.path.dirname(path), name))
