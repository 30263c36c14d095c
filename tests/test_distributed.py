"""Many processes: what all of them have seen, as if one had seen everything.

distributed_worker.py says what each process does; it runs under torchrun with 4, 2 and 1 of them. Here one process sees
everything, and the results are compared.
"""

import functools
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_worker import CASES, LABELS, LATEST, ONCE, ROUNDS, SAVED, SIZES, Pictures, snapshot
from reference import same

from oaa_lib import AttentionAccumulator
from oaa_lib.maps import processes

WORLDS = (4, 2, 1)
WORKER = Path(__file__).with_name("distributed_worker.py")
EXAMPLE = WORKER.parents[1] / "examples" / "distributed.py"
EXACT = {"counts", "missed", "synchronized", "skipped", "offered", "totals_then", "offsets", "classes"}
# A float32 operation on numbers in [0, 1] errs by 2**-24 at most, and so does a sum of t of them divided by t. A pair
# meets fewer than 30 maps here; each is an update of three operations, each of 3 exchanges about ten. One map more or
# less would change an average of 30 by about 1e-2.
ROUNDING = 128 * 2**-24


def start(processes: int, script: Path, *arguments: object) -> "subprocess.Popen[str]":
    """`torchrun --standalone`, which takes a free port; 0 processes: one, without it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[1])}
    group = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes else []
    command = [sys.executable, *map(str, (*group, script, *arguments))]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(processes: int, script: Path, *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    with start(processes, script, *arguments) as process:
        try:
            out, errors = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends the others
            raise
    return process.returncode, out, errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def everything(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """What each rank found, by the number of processes. The 4 come first: the others load what they have saved."""
    found = {}
    for world in WORLDS:
        status, _, errors = run(world, WORKER, folder)
        assert status == 0, errors[-5000:]
        found[world] = [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]
    return found


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def ranks(everything: dict[int, list[dict[str, Any]]], world: int) -> list[dict[str, Any]]:
    return everything[world]


@functools.cache
def one_process(name: str, rounds: int) -> dict[str, Any]:
    """What it holds after having seen everything."""
    case = {**CASES, **ONCE}[name]
    accumulator = case.accumulator()
    for turn in range(rounds):
        case.show(accumulator, turn)
    return snapshot(accumulator)


def check_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Counts exactly, maps to a tolerance; apart from what only the processes know."""
    for name, value in expected.items():
        if name == "maps":
            torch.testing.assert_close(found[name].double(), value.double(), rtol=0, atol=tolerance)
        elif name in EXACT - {"synchronized", "totals_then"}:
            assert torch.equal(found[name], value), name
        elif name == "statistics":
            assert all(map(torch.equal, found[name], value))
    assert torch.equal(found["synchronized"], expected["counts"])
    totals = torch.stack([expected[name] for name in ("skipped", "offered")])
    assert torch.equal(found["totals_then"], totals)


def tolerance_of(name: str) -> float:
    if name.startswith("max"):
        return 0
    return 30 * 2**-11 if "float16" in name else ROUNDING  # an own mean in float16 rounds at each of up to 30 updates


def bits(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != "statistics"}


# The control: the events are worth it


def test_the_shards_are_uneven_and_the_events_have_everything():
    for name in (*CASES, *ONCE):
        state = one_process(name, ROUNDS)
        assert (state["counts"] == 0).any(), name  # image 4
        assert 10 < state["counts"].max() < 30, name
        assert (state["skipped"] > 0).all(), name
        offered, accepted, *_ = state["statistics"]
        assert (accepted < offered - state["skipped"]).any(), name  # the gate refuses some
        if "missed" in state:
            assert ("crops" in name) == bool((state["missed"] > 0).any()), name
    for world in (2, 4):
        for turn in range(ROUNDS):
            seen = []
            for rank in range(world):
                accumulator = CASES["max, uint8"].accumulator()
                CASES["max, uint8"].show(accumulator, turn, rank, world)
                seen.append(accumulator.accumulated)
            idle = 1 if world == 4 or turn == 0 else 0
            assert [bool(part.any()) for part in seen].count(False) == idle
            assert (torch.stack(seen).sum(0) > 1).any() == (world - idle > 1)  # accepted by several


# Equal to one process


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_after_every_round_all_hold_what_one_process_would(ranks, name):
    for turn in range(ROUNDS):
        expected = one_process(name, turn + 1)
        for found in ranks:
            state, _ = found["every_round"][name][turn]
            check_same(state, expected, tolerance_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ONCE)
def test_gathered_maps_are_those_of_one_process(ranks, name):
    for found in ranks:
        state, _, _ = found["once_only"][name]
        check_same(state, one_process(name, ROUNDS), ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["every_round", "once_only", "small_buckets", "in_files", "through_a_sampler"])
def test_all_ranks_end_equal_to_the_bit(ranks, scenario):
    def check(first: Any, other: Any) -> None:
        if isinstance(first, dict):
            assert first.keys() == other.keys()
            for name in first:
                check(first[name], other[name])
        elif isinstance(first, (list, tuple)):
            for values in zip(first, other, strict=True):
                check(*values)
        else:
            assert torch.equal(first, other) if isinstance(first, torch.Tensor) else first == other

    for other in ranks[1:]:
        check(ranks[0][scenario], other[scenario])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *LATEST])
def test_a_second_synchronize_in_a_row_changes_nothing(ranks, name):
    for found in ranks:
        for once, twice in found["every_round"][name]:
            assert same(bits(once), bits(twice))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *ONCE])
def test_the_size_of_the_buckets_makes_no_difference(ranks, name):
    for found in ranks:
        check_same(found["small_buckets"][name], one_process(name, ROUNDS), tolerance_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["max", "mean", "noisy-or"])
def test_it_needs_little_memory_beside_the_maps(ranks, world, fusion):
    """Buckets of 2048 float32 pixels, maps of 16 buckets; with crops. A mean keeps a copy of its maps and counts."""
    for found in ranks:
        peak, maps = found["memory"][fusion]
        assert maps == 16 * 4 * 2048
        assert peak < 4 * 4 * 2048 + (2 * maps if fusion == "mean" else 0)


# The latest maps


@pytest.mark.slow
@pytest.mark.parametrize("name", LATEST)
def test_the_latest_map_is_that_of_the_rank_that_has_accepted_most(ranks, world, name):
    case = LATEST[name]
    state = snapshot(case.accumulator())
    for turn in range(ROUNDS):
        alone = [snapshot(case.accumulator()) for _ in range(world)]
        for rank in range(world):
            accumulator = case.accumulator()
            accumulator.load_state_dict(state)
            case.show(accumulator, turn, rank, world)
            alone[rank] = snapshot(accumulator)
        accepted = np.stack([values["counts"] - state["counts"] for values in alone])
        winner = accepted.argmax(0)  # the first one in a tie
        pixels = np.prod(SIZES, 1).repeat(np.sum(LABELS, 1)) if "sizes" in name else 6 * 5  # of each pair
        latest = np.stack([values["maps"] for values in alone]).reshape(world, -1)
        latest = latest[winner.repeat(pixels), np.arange(latest.shape[1])]
        for found in ranks:
            once, _ = found["every_round"][name][turn]
            assert np.array_equal(once["maps"].flatten(), latest)
        state = bits(ranks[0]["every_round"][name][turn][0])


# Refused by all, or by none


@pytest.mark.slow
def test_a_moving_average_is_refused_on_all_ranks_with_the_reason(ranks):
    for found in ranks:
        assert "depends on the order of its maps" in found["order_matters"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ONCE)
def test_gathered_fusions_are_refused_the_second_time_on_all_ranks(ranks, name):
    for found in ranks:
        before, message, after = found["once_only"][name]
        assert "can be synchronised once only" in message
        assert same(bits(before), bits(after))


DIFFERENT = [
    "labels",
    "keys",
    "map size",
    "map size of each image",
    "fusion",
    "dtype",
    "last synchronize",
    "last synchronize, nothing accepted",
]


@pytest.mark.slow
@pytest.mark.parametrize("what", DIFFERENT)
def test_one_rank_that_holds_something_else_is_told_to_all(ranks, world, what):
    for found in ranks:
        message, before, after = found["one_is_different"][what]
        if world == 1:
            assert message is None
        else:
            assert "expected the same labels, keys, map size, fusion and dtype on all proces" in message
            assert same(bits(before), bits(after))


@pytest.mark.slow
def test_after_a_refusal_the_group_still_works(ranks):
    for found in ranks:
        assert found["one_is_different"].keys() == {*DIFFERENT, "alike"}
        check_same(found["one_is_different"]["alike"], one_process("max, uint8", 1), 0)


@pytest.mark.slow
def test_if_one_rank_cannot_all_are_told_and_that_one_why(ranks):
    *others, last = [found["one_cannot"] for found in ranks]
    assert "whose process ended between two synchronizations" in last
    assert all("another process of the group cannot synchronize" in message for message in others)


def test_without_a_process_group_the_error_says_what_to_do():
    accumulator = CASES["max, uint8"].accumulator()
    with pytest.raises(RuntimeError, match="init_process_group first, or leave synchronize out"):
        accumulator.synchronize()


@pytest.mark.slow
def test_a_group_of_some_processes(ranks, world):
    """Those in it hold what they have seen; the others are not touched."""
    case = CASES["mean, crops"]
    expected = case.accumulator()
    members = ranks[0]["a_group_of_some"][0]
    for rank in members:
        case.show(expected, 0, rank, world)
    for rank, found in enumerate(ranks):
        _, message, before, after = found["a_group_of_some"]
        if rank in members:
            assert message is None
            check_same(after, snapshot(expected), ROUNDING)
        else:
            assert message is not None
            assert same(bits(before), bits(after))


@pytest.mark.parametrize(
    ("backends", "maps_on", "expected"),
    [
        ("cpu:gloo", "cpu", "cpu"),
        ("cpu:gloo", "cuda:0", "cpu"),
        ("cpu:gloo,cuda:gloo", "cuda:0", "cpu"),
        ("cuda:nccl", "cuda:1", "cuda:1"),
        ("cuda:nccl", "cpu", "cuda"),  # the current one
        ("cpu:gloo,cuda:nccl", "cuda:1", "cuda:1"),
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
    ],
)
def test_maps_are_exchanged_where_the_backend_can(monkeypatch, backends, maps_on, expected):
    """No GPU here: only where the tensors would go."""
    answers = {"get_backend_config": backends, "get_world_size": 2, "get_rank": 0}
    for name, answer in answers.items():
        monkeypatch.setattr(dist, name, lambda group, answer=answer: answer)
    assert processes.Exchange(None, torch.device(maps_on)).device == torch.device(expected)


# Files


@pytest.mark.slow
@pytest.mark.parametrize("name", ["max, uint8", "max, float32, crops, sizes", "mean, crops"])
def test_maps_in_files_one_for_each_rank(ranks, name):
    """Opened again before each round."""
    for found in ranks:
        for turn, state in enumerate(found["in_files"][name]):
            check_same(state, one_process(name, turn + 1), tolerance_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["max, uint8", "mean, crops"])
def test_counts_in_a_file_are_whole_wherever_the_process_ended(ranks, name):
    """Of a pair both are as they were, or both as they will be: else something would count twice, or be lost."""
    total = one_process(name, 1)["counts"]
    for found in ranks:
        *_, last = found["killed"][name]
        assert [(after["synchronized"] > 0).any() for _, _, after in found["killed"][name]].count(False) > 1
        assert torch.equal(last[2]["synchronized"], total)
        for ended, before, after in found["killed"][name]:
            assert ended == (after is not last[2])
            done = after["synchronized"] > 0
            assert torch.equal(after["synchronized"], total.where(done, 0))
            assert torch.equal(after["counts"], total.where(done, before["counts"]))


# Samplers, checkpoints, states


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["max", "mean"])
def test_a_distributed_sampler(ranks, world, fusion):
    """Ten pictures; where 4 does not divide that, the sampler repeats two, and they count twice for one process too."""
    expected = Pictures.accumulator(fusion)
    for epoch in range(2):
        for rank in range(world):
            for index in Pictures().sampler(rank, world, epoch):
                expected.update([index], Pictures.attention(index, epoch)[None])
    padded = {4: 12, 2: 10, 1: 10}[world]
    assert expected.counts[:, 0].sum() == 2 * padded
    for found in ranks:
        check_same(found["through_a_sampler"][fusion], snapshot(expected), 0 if fusion == "max" else ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_is_loaded_in_place_and_whole(ranks, name):
    saved = one_process(name, ROUNDS - 1)
    for found in ranks:
        epoch, in_place, state = found["through_a_checkpoint"][name][0]
        assert epoch == ROUNDS - 1
        assert in_place
        check_same(state, saved, tolerance_of(name))
        assert state["keys"] == list("abcdef")
        assert same(bits(state), bits(ranks[0]["through_a_checkpoint"][name][0][2]))


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVED)
def test_4_save_and_4_2_or_1_go_on_as_one_process_would(ranks, name):
    expected = one_process(name, ROUNDS)
    for found in ranks:
        for state in found["through_a_checkpoint"][name][1:]:
            check_same(state, expected, tolerance_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVED)
def test_a_state_that_was_not_synchronized_may_be_loaded_by_one_alone(ranks, name):
    for found in ranks:
        check_same(found["loaded_by_one"][name], one_process(name, 2), tolerance_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVED)
def test_a_state_that_is_known_to_all_may_be_loaded_by_all_and_counts_once(ranks, name):
    for found in ranks:
        for rounds, state in enumerate(found["loaded_by_all"][name], start=2):
            check_same(state, one_process(name, rounds), tolerance_of(name))


# Without a process group torch warns.
alone = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")


@pytest.mark.slow
@alone
@pytest.mark.parametrize("name", SAVED)
def test_4_save_and_a_process_without_a_group_goes_on(everything, folder, name):
    accumulator = CASES[name].accumulator(keys=list("abcdef"))
    state = {"accumulator": accumulator, "epoch": 0}
    dcp.load(state, checkpoint_id=folder / f"{name}.dcp", no_dist=True)
    assert state["epoch"] == ROUNDS - 1
    saved = everything[4][0]["through_a_checkpoint"][name][0][2]
    assert same(accumulator.state_dict(), bits(saved))
    CASES[name].show(accumulator, ROUNDS - 1)
    found, expected = snapshot(accumulator), one_process(name, ROUNDS)
    torch.testing.assert_close(found["maps"], expected["maps"], rtol=0, atol=tolerance_of(name))
    assert torch.equal(found["counts"], expected["counts"])
    assert all(map(torch.equal, found["statistics"], expected["statistics"]))


@alone
def test_a_mean_saved_between_two_synchronizations_is_refused_later(tmp_path):
    """What a mean was at the last one is not in a checkpoint that is loaded into a new accumulator."""
    saved, loaded = (AttentionAccumulator([[1]], (2, 2), fusion="mean", gate=None) for _ in range(2))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for _ in range(2):
            saved.synchronize().update([0], torch.rand(1, 1, 2, 2))
        dcp.save({"accumulator": saved}, checkpoint_id=tmp_path)
        dcp.load({"accumulator": loaded}, checkpoint_id=tmp_path)
        assert loaded.accepted == 2
        with pytest.raises(ValueError, match="go on from a state that was saved after a synchronize"):
            loaded.synchronize()
        assert saved.synchronize().accepted == 2
    finally:
        dist.destroy_process_group()


@alone
@pytest.mark.parametrize("map_size", [(2, 2), [[2, 2], [1, 4]]])
def test_a_checkpoint_of_another_data_set_is_refused(tmp_path, map_size):
    first = AttentionAccumulator([[1, 0], [0, 1]], map_size, gate=None)
    second = AttentionAccumulator([[0, 1], [1, 0]], map_size, gate=None)
    dcp.save({"accumulator": first.update([0], torch.rand(1, 2, 2, 2))}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match="belongs to another data set or setting"):
        dcp.load({"accumulator": second}, checkpoint_id=tmp_path, no_dist=True)
    assert second.classes(0).tolist() == [1]


# Sent to the processes


def sees_some(rank: int, folder: Path, accumulators: list[AttentionAccumulator]) -> None:
    """The first process sees three maps of 0, the second one map of 1."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    for number, accumulator in enumerate(accumulators):
        for value in ([0, 0, 0], [1])[rank]:
            accumulator.update([0], torch.full((1, 1, 2, 2), float(value)), normalization=None)
        dist.barrier()
        accumulator.synchronize().save(folder / f"{number}-{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_accumulators_among_the_arguments_of_spawn_belong_to_each_process(tmp_path):
    """torch shares the memory of tensors that it sends."""
    accumulators = [AttentionAccumulator([[1]], (2, 2), fusion=fusion, gate=None) for fusion in ("mean", "max")]
    torch.multiprocessing.spawn(sees_some, (tmp_path, accumulators), 2)
    for number, expected in enumerate((1 / 4, 1)):
        for rank in range(2):
            found = AttentionAccumulator.load(tmp_path / f"{number}-{rank}")
            assert (found.accepted, found.offered) == (4, 4)
            assert torch.equal(found.attention(0), torch.full((1, 2, 2), expected))
    assert [accumulator.accepted for accumulator in accumulators] == [0, 0]


# The worked script


@pytest.fixture
def here(monkeypatch):
    """Runs the example in this process, up to where its arguments are read."""

    def run_here(*options: object) -> int:
        monkeypatch.syspath_prepend(EXAMPLE.parent)
        monkeypatch.setattr(sys, "argv", ["distributed.py", *map(str, options)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        return stop.value.code

    return run_here


@pytest.mark.slow
def test_the_example_explains_itself(here, capsys):
    assert here("--help") == 0
    out = capsys.readouterr().out
    assert "torchrun --nproc-per-node 2" in out
    assert "--resume" in out


@pytest.mark.slow
def test_the_example_overwrites_no_run(here, capsys, tmp_path):
    (tmp_path / "epoch-00001").mkdir()
    assert here("--out", tmp_path) == 2
    assert "pass --resume to go on, or take another folder" in capsys.readouterr().err
