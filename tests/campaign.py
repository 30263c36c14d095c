"""A campaign against the accumulator: kills, damage, full disks, interrupts, forks, random steps; no part of the tests.

    python -m tests.campaign --seed 0

It prints a table of tries and failures, and exits with 1 if something failed. docs/trust.md shows one.
"""

import argparse
import contextlib
import errno
import functools
import gc
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings
from hypothesis import seed as seeded
from hypothesis.stateful import run_state_machine_as_test
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(__file__))  # as pytest does it

import campaign_work as work
import test_damage as damage
from forks import Forks
from moments import Interrupt, at_each, count
from reference import same, snapshot, what_was_left
from test_disk import KINDS, endless, show
from test_state_machine import Machine

from oaa_lib import AttentionAccumulator
from oaa_lib.maps import mapped as mapping
from oaa_lib.maps.mapped import MappedStore

RENEWED = 25  # tries after which a new file is made
load = AttentionAccumulator.load


class Campaign:
    """What is tried, and what has become of it.

    Attributes:
        tries: how often, by kind.
        failures: a sentence for each.
    """

    def __init__(self, seed, folder):
        self.seed, self.folder = seed, Path(folder)
        self.tries, self.failed, self.failures = Counter(), Counter(), []
        self.work = Forks(work.__file__)

    @contextlib.contextmanager
    def attempt(self, name):
        """One try; an error is a failure."""
        kind = [name]
        try:
            yield kind
        except Exception as error:
            self.failed[kind[0]] += 1
            self.failures.append(f"{kind[0]}, try {self.tries[kind[0]]}: {type(error).__name__}: {error}")
        finally:
            self.tries[kind[0]] += 1

    def room(self):
        """An empty folder."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        return self.folder / "maps"


def new_case(path, rng, in_a_file=True):
    """A kind, a scale and a file with a journal that holds a change of all maps, or little of it."""
    kind, scale, one_step = rng.choice(list(KINDS)), rng.choice([2, 12]), rng.random() < 0.6
    journal = 1 << 20 if one_step else 1
    accumulator = endless(kind, path if in_a_file else None, scale=scale, journal=journal)
    return accumulator, kind, scale, one_step or not in_a_file


def kills(campaign, tries):
    """SIGKILL at any moment of a stream of operations on a mapped file; the file is gone on with."""
    rng, forks = random.Random(campaign.seed), campaign.work
    for number in tqdm(range(tries), "kills"):
        if number % RENEWED == 0:
            path, first, saved = campaign.room(), 0, None
            kind, scale, one_step = new_case(path, rng)[1:]
            twin, log = endless(kind, scale=scale), Path(f"{path}.log")
        with campaign.attempt("kill while opening") as name:
            log.write_bytes(b"")
            pause = rng.choice([0, 0.0005])
            forks.start(work.keep_operating, kind, path, scale, campaign.seed, first, pause)
            forks.hear()
            reports = rng.choice([0, 1])
            forks.wait_until(lambda log=log, reports=reports: log.stat().st_size >= reports)
            time.sleep(rng.uniform(0, 0.1 if pause else 0.01))
            forks.kill()
            last = first + log.stat().st_size
            for each in range(first, last):
                done, operate = work.operation(kind, scale, campaign.seed, each)
                saved = snapshot(twin) if done == "save" else saved
                operate(twin, campaign.folder / "twin")
            name[0], operate = work.operation(kind, scale, campaign.seed, last)
            name[0] = f"kill inside `{name[0]}`"
            before, found = snapshot(twin), snapshot(load(path))
            operate(twin, campaign.folder / "twin")
            assert same(found, snapshot(endless(kind, path, scale=scale))), "load and path= differ"
            what_was_left(found, before, snapshot(twin), one_step=one_step)
            if saved or "save" in name[0]:
                check_saved(f"{path}.saved", saved, before if "save" in name[0] else None)
            if "save" in name[0] and os.path.exists(f"{path}.saved"):
                saved = snapshot(load(f"{path}.saved"))
            first = last + 1
            twin.load_state_dict(found)


def check_saved(path, before, after):
    """A saved file is the one before or the one after; None: there was none before, or there is none after."""
    if not os.path.exists(path):
        assert before is None, "a saved file is gone"
        return
    found = snapshot(load(path))
    assert any(same(found, each) for each in (before, after) if each is not None), "a saved file is another"


def damaged(whole, places, rng, kind):
    """A damaged copy of a file: of its header and of each of its arrays as often."""
    content = whole
    while content == whole:
        content = once_damaged(whole, rng.choice(rng.choice(places)), rng, kind)
    return content


def once_damaged(whole, at, rng, kind):
    copy, size = bytearray(whole), len(whole)
    if kind == "flip":
        copy[at] ^= 1 << rng.randrange(8)
    elif kind == "truncation":
        return copy[: rng.randrange(size)] if rng.random() < 0.8 else copy + bytes(rng.randrange(1, 100))
    elif rng.random() < 0.5:  # a hole
        copy[at : at + 64] = bytes(len(copy[at : at + 64]))
    else:  # two words change places
        copy[at : at + 64] = copy[at + 32 : at + 64] + copy[at : at + 32]
    return copy


def refusal_of(function, *args):
    """The message with which a call is refused, or none."""
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return ""


def files_to_damage(campaign):
    """By kind of file: what it was made as, a whole one, where its parts are, and what is in it."""
    path, found = campaign.room(), {"saved file": [], "mapped file": [], "file of a killed process": []}
    for kind in damage.KINDS:
        path.unlink(missing_ok=True)
        accumulator = damage.show(damage.show(damage.build(kind, path)), 1)
        accumulator.save(campaign.folder / "saved")
        right = snapshot(accumulator)
        for among, file in (("saved file", campaign.folder / "saved"), ("mapped file", path)):
            found[among].append((kind, file.read_bytes(), parts_of(file), right))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MappedStore, "_perform", stop_when_it_is_recorded)
            with contextlib.suppress(Interrupt):
                damage.show(accumulator, 2)
            left = path.read_bytes()
        del accumulator
        gc.collect()  # an update that was cut short twice refers to itself
        expected = snapshot(damage.show(damage.show(damage.show(damage.build(kind)), 1), 2))
        found["file of a killed process"].append((kind, left, parts_of(path), expected))
    return found


def parts_of(path):
    return [part for part in damage.places(path).values() if len(part)]


def stop_when_it_is_recorded(store, changes, totals, seals, recorded):
    store._recorded[0] = recorded
    raise Interrupt


def flips(campaign, tries, what="flip"):
    """Damage of files: refused, or what is read is right; never silently something else. The file stays as it is."""
    rng = random.Random(campaign.seed)
    files, path = files_to_damage(campaign), campaign.folder / "maps"
    for number in tqdm(range(tries), what):
        among = ["saved file", "mapped file", "mapped file", "file of a killed process"][number % 4]
        kind, whole, places, right = rng.choice(files[among])
        with campaign.attempt(f"{what} in a {among}"):
            content = damaged(whole, places, rng, what)
            path.write_bytes(content)
            refusals = [read_or_refused(load, path, right)]
            assert refusals[0] or among != "saved file", "damage went unnoticed"
            if among != "saved file":
                assert path.read_bytes() == content, "load has changed the file"
                refusals.append(read_or_refused(functools.partial(damage.build, kind), path, right))
                assert any(refusals) == all(refusals), refusals
            if any(refusals):
                assert all(str(path) in refusal for refusal in refusals), refusals
                assert path.read_bytes() == content, "the file is refused, and changed"


def read_or_refused(opening, path, right):
    """The message with which a file is refused; none if all that is read is right."""
    accumulators = []
    refusal = refusal_of(lambda: accumulators.append(opening(path)))
    assert all(same(snapshot(each), right) for each in accumulators), "other maps, silently"
    return refusal


def flips_in_use(campaign, tries):
    """A bit of a mapped file that is in use: `verify()` tells, or it lies where nothing is kept."""
    rng = random.Random(campaign.seed)
    for number in tqdm(range(tries), "flips in use"):
        if number % RENEWED == 0:
            path = campaign.room()
            kind = rng.choice(list(damage.KINDS))
            accumulator = damage.show(damage.show(damage.build(kind, path)), 1)
            right, places = snapshot(accumulator), damage.places(path)
            file = os.open(path, os.O_RDWR)
        with campaign.attempt("flip in a file in use, `verify()`"):
            name = rng.choice([each for each in places if each not in ("header", "journal", "recorded")])
            at = rng.choice(places[name])
            byte = os.pread(file, 1, at)
            os.pwrite(file, bytes([byte[0] ^ 1 << rng.randrange(8)]), at)
            told = refusal_of(accumulator.verify)
            os.pwrite(file, byte, at)
            assert "damaged" in told, f"damage of the {name} went unnoticed"
            accumulator.verify()
            assert same(snapshot(accumulator), right)
        if number % RENEWED == RENEWED - 1 or number == tries - 1:
            os.close(file)
            del accumulator


def full_disks(campaign, tries):
    """No room (RLIMIT_FSIZE) to make a file, to save, to update: an error and the old file, or all is well."""
    rng, forks = random.Random(campaign.seed), campaign.work
    for number in tqdm(range(tries), "full disks"):
        way = ["path", "save", "update"][number % 3]
        with campaign.attempt(f"full disk, `{way}`"):
            path, kind = campaign.room(), rng.choice(list(KINDS))
            if way != "path":
                show(endless(kind, path, journal=1), 1)
                endless(kind).save(f"{path}.saved")
                old = snapshot(load(f"{path}.saved"))
            before = snapshot(load(path)) if way != "path" else None
            told = forks.ask(work.run_out_of_room, kind, path, way, rng.randrange(20_000))
            assert told in (None, errno.EFBIG), told
            assert not [name for name in os.listdir(campaign.folder) if name.endswith(".partial")], "a stray"
            if way == "path":
                assert path.exists() == (told is None)
                show(endless(kind, path), 1)  # whether it is made now or was
            elif way == "save":
                assert same(snapshot(load(f"{path}.saved")), old if told else before)
            else:
                assert told is None, "an update of a mapped file takes no room"
                expected = endless(kind)
                show(expected, 1)
                show(expected, 100)
                assert same(snapshot(endless(kind, path)), snapshot(expected))


class Alarm:
    """Raises `Interrupt` from a signal after some time, if that comes while it is armed."""

    def __init__(self):
        self.armed = False
        self.before = signal.signal(signal.SIGALRM, self)

    def __call__(self, *_):
        if self.armed:
            self.armed = False
            raise Interrupt

    def interrupted(self, delay, function, *args):
        """Whether a call was interrupted after so many seconds."""
        try:
            self.armed = True
            signal.setitimer(signal.ITIMER_REAL, delay)
            function(*args)
            self.armed = False
        except Interrupt:
            return True
        finally:
            self.armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        return False


def interrupts(campaign, tries):
    """An exception at any bytecode, or from a signal at any time: all or nothing, and the accumulator goes on."""
    rng, number, alarm, progress = random.Random(campaign.seed), 0, Alarm(), tqdm(total=tries, desc="interrupts")
    while progress.n < tries:
        if number % RENEWED == 0:
            accumulator = None
            path, in_a_file = campaign.room(), rng.random() < 0.6
            accumulator, kind, scale, one_step = new_case(path, rng, in_a_file)
            twin, saved = endless(kind, scale=scale), None
        number += 1
        name, operate = work.operation(kind, scale, campaign.seed, number)
        before, began = snapshot(twin), time.perf_counter()
        operate(twin, path.parent / "twin")
        after, duration = snapshot(twin), time.perf_counter() - began
        how = rng.choice(["a signal", "any bytecode"])
        if how == "a signal":
            came = alarm.interrupted(rng.uniform(1e-6, 1.5 * duration), operate, accumulator, path)
        else:
            twin.load_state_dict(before)
            moment = rng.randrange(1, int(1.5 * count(operate, twin, path.parent / "twin", event="opcode")))
            came = stop_at(moment, operate, accumulator, path)
        with campaign.attempt(f"interrupt of `{name}` by {how}") if came else contextlib.nullcontext():
            progress.update(came)
            found = snapshot(accumulator)
            what_was_left(found, before, after, one_step=one_step)
            assert came or same(found, after)
            if how == "a signal":
                in_another_thread(accumulator.statistics)
            else:  # Python deals with no signal between the end of a `with` and the release of its lock
                accumulator._store.turn.forked()
            if in_a_file:
                accumulator.verify()
                assert same(snapshot(load(path)), found), "the file holds something else"
            if name == "save":
                check_saved(f"{path}.saved", saved, before)
            if os.path.exists(f"{path}.saved"):
                saved = snapshot(load(f"{path}.saved"))
            assert not [each for each in os.listdir(path.parent) if each.endswith(".partial")], "a stray"
        twin.load_state_dict(snapshot(accumulator))
    progress.close()
    signal.signal(signal.SIGALRM, alarm.before)


def stop_at(moment, function, *args):
    def action(number):
        if number == moment:
            raise Interrupt

    try:
        at_each(action, function, *args, event="opcode")
    except Interrupt:
        return True
    return False


def in_another_thread(function):
    """Call it in another thread, which no lock may keep waiting."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "another thread waits for a lock"


def forked(campaign, tries):
    """A forked child that changes its parent's accumulator: refused where that is in a file, its own copy in memory."""
    rng = random.Random(campaign.seed)
    for number in tqdm(range(tries), "forks"):
        path, in_a_file = campaign.room(), number % 2 == 0
        with campaign.attempt(f"fork, maps {'in a file' if in_a_file else 'in memory'}"):
            kind, seed, at_once = rng.choice(list(KINDS)), rng.randrange(1 << 30), rng.random() < 0.5
            campaign.work.start(work.fork_meanwhile, kind, path, in_a_file, seed, at_once)
            assert campaign.work.end() == 0, "see above"


def steps(campaign, tries):
    """Random steps against the loops in float64, see test_state_machine.py."""
    forks = Forks(sys.modules["test_state_machine"].__file__)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    fusions, examples = ["max", "mean", "latest", "noisy-or", "ema"], max(1, tries // 10 // 20)
    options = {"derandomize": False, "database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
    for number in tqdm(range(10), f"steps, {20 * examples} each"):
        fusion, mapped = fusions[number // 2], bool(number % 2)
        name = f"random step, {'in a file' if mapped else 'in memory'}"
        machine = seeded(campaign.seed)(
            type("Machine", (Machine,), {"fusion": fusion, "mapped": mapped, "forks": forks})
        )
        with campaign.attempt(name):
            run_state_machine_as_test(
                machine, settings=settings(max_examples=examples, stateful_step_count=20, **options)
            )
        campaign.tries[name] += machine.steps - 1
        if mapped:
            campaign.tries["... of these, kills"] += machine.kills
            campaign.tries["... of these, that stopped between two pairs"] += machine.torn
        forks.clear()
    dist.destroy_process_group()
    forks.close()


def table(campaign):
    rows = [f"| {kind} | {tries:,} | {campaign.failed[kind]} |" for kind, tries in campaign.tries.items()]
    return "\n".join(["| what | tries | failures |", "|---|---|---|", *rows])


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    numbers = {
        "kills": (kills, 500),
        "flips": (flips, 5000),
        "flips-in-use": (flips_in_use, 500),
        "other-damage": (lambda campaign, tries: flips(campaign, tries, "hole or swap"), 500),
        "truncations": (lambda campaign, tries: flips(campaign, tries, "truncation"), 500),
        "full-disks": (full_disks, 200),
        "interrupts": (interrupts, 500),
        "forks": (forked, 200),
        "steps": (steps, 10_000),
    }
    for name, (_, tries) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=tries, metavar="N", help=f"how many; {tries} if not given")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="campaign") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "JOURNAL_BYTES", 1)  # the smallest that serves, where nothing else is said
        campaign = Campaign(options.seed, os.path.join(folder, "files"))
        campaign.folder.mkdir()
        for name, (attack, _) in numbers.items():
            if tries := getattr(options, name.replace("-", "_")):
                attack(campaign, tries)
                campaign.work.clear()
        campaign.work.close()
    print(table(campaign))
    for failure in campaign.failures:
        print("-", failure, file=sys.stderr)
    return 1 if campaign.failures else 0


if __name__ == "__main__":
    sys.exit(main())
