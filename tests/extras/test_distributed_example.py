"""examples/distributed.py under torchrun, stopped and resumed with other numbers of processes."""

import shutil
import time
from itertools import pairwise

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_distributed import EXAMPLE, alone, run, start

from oaa_lib import AttentionAccumulator


@pytest.mark.slow
@alone
def test_the_example_is_stopped_and_goes_on_with_other_numbers_of_processes(tmp_path):
    """2 processes until they are stopped, 4 for one epoch more, then one without torchrun for another one."""
    options = ["--images", 40, "--out", tmp_path]  # 2 and 4 divide 40: no sampler repeats an image
    with start(2, EXAMPLE, *options, "--epochs", 10_000) as stopped:
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob("epoch-*")) and stopped.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        stopped.terminate()
        _, errors = stopped.communicate()
    assert list(tmp_path.glob("epoch-*")), errors[-5000:]
    checkpoint = max(tmp_path.glob("epoch-*"))
    epochs = int(checkpoint.name.removeprefix("epoch-"))
    shutil.copytree(checkpoint, tmp_path / "then")

    maps = []
    for number in (4, 0):
        epochs += 1
        status, out, errors = run(number, EXAMPLE, *options, "--epochs", epochs, "--resume")
        assert status == 0, errors[-5000:]
        assert out.count("maps that passed the gate") == 5
        assert "cue mIoU of the accumulated maps: " in out
        assert [path.name for path in tmp_path.glob("epoch-*")] == [f"epoch-{epochs:05d}"]
        maps.append(AttentionAccumulator.load(tmp_path / "maps.safetensors"))
        told = maps[-1].statistics()
        assert torch.equal(told.offered, epochs * told.pairs)  # every image once in every epoch, whoever saw it
        assert (told.accepted + told.skipped <= told.offered).all()

    then = AttentionAccumulator.load(tmp_path / "maps.safetensors")
    dcp.load({"accumulator": then.reset()}, checkpoint_id=tmp_path / "then", no_dist=True)
    assert then.offered > 0
    for before, after in pairwise([then, *maps]):
        assert (before.counts <= after.counts).all()
        assert (before[range(40)] <= after[range(40)]).all()
