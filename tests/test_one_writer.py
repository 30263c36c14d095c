"""One file has one writer: accumulators, processes, threads, and files that vanish or were left behind.

Run as a program, this file is a process without threads that forks others, see `forks.Forks`.
"""

import contextlib
import copy
import errno
import os
import pickle
import shutil
import signal
import sys
import threading
import time

import pytest
import torch
from forks import fork, say, serve
from reference import same, snapshot

from oaa_lib import AttentionAccumulator, View
from oaa_lib.maps import locking, replacing

LABELS = torch.ones(6, 3)
SCORE_MAPS = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 0.01


def build(path=None, **options):
    return AttentionAccumulator(LABELS, (4, 4), fusion="mean", gate=None, path=path, **options)


def fill(accumulator, times=1):
    for _ in range(times):
        accumulator.update(range(6), SCORE_MAPS)
    return accumulator


CHANGES = {
    "update": fill,
    "reset": lambda accumulator: accumulator.reset(),
    "merge": lambda accumulator: accumulator.merge(fill(build())),
    "load_state_dict": lambda accumulator: accumulator.load_state_dict(fill(build()).state_dict()),
}


def refusals(accumulator, error):
    """The messages with which each change is refused; nothing is changed."""
    before, messages = snapshot(accumulator), []
    for change in CHANGES.values():
        try:
            change(accumulator)
            messages.append("")
        except error as refusal:
            messages.append(str(refusal))
        assert same(snapshot(accumulator), before)
    return messages


# A second accumulator


def test_a_second_accumulator_of_one_process_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "maps"
    os.symlink(path, tmp_path / "link")
    first = fill(build(path))
    monkeypatch.chdir(tmp_path)
    for other in (path, tmp_path / "link", "maps", "../" + tmp_path.name + "/maps"):
        with pytest.raises(BlockingIOError, match=r"maps is in use by .*another accumulator.*a path of its own"):
            build(other, resume=True)
    assert AttentionAccumulator.load(path).accepted == 18  # reading is free, and does not let anybody in
    with pytest.raises(BlockingIOError, match="in use"):
        build(path, resume=True)
    fill(first)
    del first
    assert build(path, resume=True).accepted == 36


# A forked child


def change_in_a_child(path):
    accumulator = fill(build(path))
    if fork() == 0:
        say([*refusals(accumulator, BlockingIOError), accumulator.attention(0).mean().item()])
        del accumulator
        os._exit(0)
    os.wait()
    fill(accumulator)
    say(accumulator.accepted)


def test_a_forked_child_reads_and_changes_nothing(forks, tmp_path, capfd):
    forks.start(change_in_a_child, tmp_path / "maps")
    *messages, mean = forks.hear()
    assert all("maps is in use by another process, from which this one was forked" in each for each in messages)
    assert mean == pytest.approx(fill(build()).attention(0).mean().item())
    assert forks.hear() == 36
    assert forks.end() == 0
    assert capfd.readouterr().err == ""
    assert build(tmp_path / "maps", resume=True).accepted == 36


def leave_a_child(path):
    accumulator = fill(build(path))
    if fork() == 0:
        say(accumulator.accepted)
        signal.pause()
    signal.pause()


def test_a_child_that_outlives_its_parent_does_not_keep_the_file(forks, tmp_path):
    forks.start(leave_a_child, tmp_path / "maps")
    assert forks.hear() == 18
    forks.kill()
    assert fill(build(tmp_path / "maps", resume=True)).accepted == 36


def fork_while_a_thread_works(path):
    accumulator, working = fill(build()), threading.Event()

    def hold():
        with accumulator._store.turn.lock:
            working.set()
            time.sleep(30)

    threading.Thread(target=hold, daemon=True).start()
    working.wait()
    if fork() == 0:
        say(fill(accumulator).accepted)
        os._exit(0)
    os.wait()


def test_a_child_forked_while_a_thread_works_does_not_wait_for_it(forks, tmp_path):
    assert forks.ask(fork_while_a_thread_works, tmp_path) == 36


def fork_while_a_file_is_named(path):
    """As another thread does that starts workers just then; they live on."""
    replace = os.replace

    def meanwhile(*names):
        if fork() == 0:
            signal.pause()
        replace(*names)

    os.replace = meanwhile
    accumulator = fill(build(path))
    for _ in range(2):
        accumulator.save(f"{path}.saved")
    say(accumulator.accepted)


def test_a_child_forked_while_a_file_is_named_keeps_nothing_locked(forks, tmp_path):
    assert forks.ask(fork_while_a_file_is_named, tmp_path / "maps") == 18
    assert fill(build(tmp_path / "maps", resume=True)).accepted == 36
    fill(build()).save(tmp_path / "maps.saved")


# A file that is gone


def deleted(path):
    os.unlink(path)


def moved(path):
    os.rename(path, f"{path}.moved")


def replaced_by_a_copy(path):
    shutil.copy(path, f"{path}.copy")
    os.replace(f"{path}.copy", path)


def replaced_by_save(path):
    build().save(path)


def folder_moved(path):
    os.rename(os.path.dirname(path), os.path.dirname(path) + "-moved")


@pytest.mark.parametrize("vanish", [deleted, moved, replaced_by_a_copy, replaced_by_save, folder_moved])
def test_a_file_that_was_deleted_moved_or_replaced_is_noticed_and_the_maps_can_be_saved(vanish, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    accumulator = fill(build(folder / "maps"))
    vanish(str(folder / "maps"))
    for message in refusals(accumulator, FileNotFoundError):
        assert "maps was deleted, moved or replaced while its maps were in use; they are still here: save()" in message
    accumulator.save(tmp_path / "saved")
    assert same(snapshot(AttentionAccumulator.load(tmp_path / "saved")), snapshot(fill(build())))


def test_a_file_that_comes_back_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    accumulator = fill(build("maps"))
    os.rename("maps", "elsewhere")
    with pytest.raises(FileNotFoundError, match="deleted, moved or replaced"):
        fill(accumulator)
    os.rename("elsewhere", "maps")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir("folder")  # the path was meant from where it was opened
    assert fill(accumulator).accepted == 36


def test_a_link_to_nothing_is_no_path(tmp_path):
    os.symlink(tmp_path / "nothing", tmp_path / "link")
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"expected path .*, got .*link, a link to no file; remove the link"):
            build(tmp_path / "link", resume=resume)
    assert os.listdir(tmp_path) == ["link"]


# Threads


@pytest.fixture
def switching():
    """Threads give way to each other very often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(*functions):
    errors = []

    def run(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert errors == []


@pytest.mark.parametrize("where", ["memory", "file"])
def test_threads_on_one_accumulator_take_turns(where, switching, tmp_path):
    accumulator = build(tmp_path / "maps" if where == "file" else None)
    views = [View(0, 0, 0.5, 1)] * 6
    in_threads(*[lambda: [accumulator.update(range(6), SCORE_MAPS, views=views) for _ in range(40)]] * 3)
    expected = build()
    for _ in range(120):
        expected.update(range(6), SCORE_MAPS, views=views)
    assert (accumulator.offered, accumulator.accepted) == (2160, 2160)
    torch.testing.assert_close(accumulator[range(6)], expected[range(6)])


def test_what_is_saved_while_a_thread_works_is_whole(switching, tmp_path):
    accumulator, ended = build(), threading.Event()

    def save():
        try:
            for _ in range(10):
                accumulator.save(tmp_path / "saved")
                saved = AttentionAccumulator.load(tmp_path / "saved")
                assert saved.offered == saved.accepted
                assert saved.counts.unique().numel() == 1
                statistics = accumulator.statistics()
                assert torch.equal(statistics.offered, statistics.accepted)
        finally:
            ended.set()

    def update():
        while not ended.is_set():
            fill(accumulator)

    in_threads(save, update)


def test_two_accumulators_merge_each_other_in_two_threads(switching):
    first, second = fill(build()), fill(build())
    in_threads(
        lambda: [first.merge(second) and first.reset() for _ in range(30)],
        lambda: [second.merge(first) and second.reset() for _ in range(30)],
    )


def test_an_accumulator_merges_itself():
    first, second = fill(build()), fill(build())
    assert same(snapshot(first.merge(first)), snapshot(fill(build()).merge(second)))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_has_a_turn_of_its_own(copied):
    accumulator = fill(build())
    with accumulator._store.turn.lock:
        other = copied(accumulator)
        if copied is copy.copy:
            assert other._store is accumulator._store
        else:
            in_threads(lambda: fill(other))
            assert (accumulator.accepted, other.accepted) == (18, 36)


# Names


def test_threads_that_save_to_one_path_leave_one_whole_file(switching, tmp_path):
    accumulators = [fill(build(), times) for times in (1, 2, 3)]
    in_threads(*[lambda each=each: [each.save(tmp_path / "saved") for _ in range(25)] for each in accumulators])
    assert os.listdir(tmp_path) == ["saved"]
    saved = snapshot(AttentionAccumulator.load(tmp_path / "saved"))
    assert any(same(saved, snapshot(each)) for each in accumulators)


def die_while_saving(path):
    os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)
    fill(build()).save(path)


def die_while_making(path):
    os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)
    build(path)


def save_slowly(path):
    fsync = os.fsync

    def wait(number):
        say(os.listdir(os.path.dirname(path)))
        time.sleep(1)
        fsync(number)

    os.fsync = wait
    fill(build(), 2).save(path)


OTHERS = [
    "maps.partial",
    "maps.12.partial",
    "maps.1.0123abcd.partial.gz",
    "other.1.0123abcd.partial",
    "mapsx1.ab.partial",
]


@pytest.mark.parametrize("die", [die_while_saving, die_while_making])
@pytest.mark.parametrize("by", ["save", "path"])
def test_what_killed_processes_left_is_removed_by_the_next_one(die, by, forks, tmp_path):
    for name in OTHERS:
        (tmp_path / name).touch()
    os.symlink(tmp_path / "maps.partial", tmp_path / "maps.1.0123abcd.partial")
    for _ in range(2):
        forks.start(die, tmp_path / "maps")
        assert forks.end() == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) > len(OTHERS) + 1
    if by == "save":
        build().save(tmp_path / "maps")
    else:
        build(tmp_path / "maps")
    assert sorted(os.listdir(tmp_path)) == sorted(["maps", "maps.1.0123abcd.partial", *OTHERS])


def test_what_a_living_process_is_writing_is_not_removed(forks, tmp_path):
    forks.start(save_slowly, tmp_path / "maps")
    assert len(forks.hear()) == 1
    fill(build()).save(tmp_path / "maps")
    assert len(os.listdir(tmp_path)) == 2
    assert forks.end() == 0
    assert os.listdir(tmp_path) == ["maps"]
    assert AttentionAccumulator.load(tmp_path / "maps").accepted == 36


def test_a_name_beside_the_file_is_never_a_second_name_of_it(tmp_path, monkeypatch):
    links = []

    def look(*arguments, **named):
        links.extend(entry for entry in os.scandir(tmp_path) if entry.stat().st_nlink > 1)

    before = sys.gettrace()
    sys.settrace(lambda *arguments: look() or (lambda *arguments: look()))
    try:
        build(tmp_path / "maps").save(tmp_path / "saved")
    finally:
        sys.settrace(before)
    assert links == []


def test_a_file_that_appears_at_the_last_moment_is_not_replaced(tmp_path, monkeypatch):
    fsync = os.fsync

    def meanwhile(number):
        monkeypatch.setattr(os, "fsync", fsync)
        (tmp_path / "maps").write_text("mine")
        fsync(number)

    monkeypatch.setattr(os, "fsync", meanwhile)
    with pytest.raises(FileExistsError, match="maps exists"):
        build(tmp_path / "maps")
    assert (tmp_path / "maps").read_text() == "mine"
    assert os.listdir(tmp_path) == ["maps"]


# What is no file


@pytest.mark.parametrize("kind", ["FIFO", "device"])
def test_what_is_no_regular_file_is_refused_at_once(kind, tmp_path):
    path = tmp_path / "maps"
    if kind == "FIFO":
        os.mkfifo(path)
    else:
        os.symlink("/dev/zero", path)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits"))
    signal.alarm(20)
    try:
        for opening in (AttentionAccumulator.load, lambda path: build(path, resume=True)):
            with pytest.raises(ValueError, match=r"maps is no accumulator file: it is no regular file"):
                opening(path)
        with contextlib.suppress(FileExistsError):
            build(path)
            pytest.fail("replaces it")
    finally:
        signal.alarm(0)


if __name__ == "__main__":
    serve(globals())


# File systems without locks, systems without them, and races


def no_locks(file):
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_file_system_without_locks_takes_saved_files_and_no_mapped_ones(tmp_path, monkeypatch):
    for module in (locking, replacing):
        monkeypatch.setattr(module, "try_lock", no_locks)
    accumulator = fill(build())
    accumulator.save(tmp_path / "saved")
    assert same(snapshot(AttentionAccumulator.load(tmp_path / "saved")), snapshot(accumulator))
    with pytest.raises(OSError, match=r"cannot be locked \(No locks available\); keep it on a local disk"):
        build(tmp_path / "mapped")


def test_a_system_without_locks_saves_whole_files(tmp_path, monkeypatch):
    monkeypatch.setattr(replacing, "fcntl", None)
    for accumulator in (fill(build()), fill(build(), 2)):
        accumulator.save(tmp_path / "saved")
        assert same(snapshot(AttentionAccumulator.load(tmp_path / "saved")), snapshot(accumulator))
    assert [each.name for each in tmp_path.iterdir()] == ["saved"]


def test_a_folder_that_cannot_be_opened_is_written_to(tmp_path, monkeypatch):
    def opened(path, *arguments, **named):
        if path == tmp_path:
            raise OSError(errno.EACCES, "Permission denied")
        return real(path, *arguments, **named)

    real = os.open
    monkeypatch.setattr(os, "open", opened)
    accumulator = fill(build())
    accumulator.save(tmp_path / "saved")
    assert same(snapshot(AttentionAccumulator.load(tmp_path / "saved")), snapshot(accumulator))


def test_a_file_that_is_replaced_while_it_is_being_opened_is_not_taken(tmp_path, monkeypatch):
    def opened(path, mode):
        times.append(mode)
        if len(times) == 2:  # once for the lock, then for the maps
            os.replace(tmp_path / "other", path)
        return real(path, mode)

    fill(build(tmp_path / "maps"))
    shutil.copy(tmp_path / "maps", tmp_path / "other")
    times, real = [], locking.open_regular
    monkeypatch.setattr(locking, "open_regular", opened)
    with pytest.raises(FileNotFoundError, match="was replaced while it was being opened"):
        build(tmp_path / "maps", resume=True)
    assert build(tmp_path / "maps", resume=True).offered == 18
