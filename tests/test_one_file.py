"""examples/oaa_in_one_file.py on six drawn images: the maps are those of examples/voc, and faulty folders are named."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from oaa_lib import AttentionAccumulator

EXAMPLES = Path(__file__).parents[1] / "examples"
EPOCHS, SEED = 5, 2  # 30 images in batches of 5: six steps, whose batches cross the ends of passes


def run(script, *options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, options)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """Six square images of up to two classes in VOC layout, one of them without any."""
    root = tmp_path_factory.mktemp("voc")
    (root / "JPEGImages").mkdir()
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    module, rng, lines = runpy.run_path(str(EXAMPLES / "drawn_images.py")), np.random.default_rng(9), []
    for i in range(6):
        pixels, mask = module["draw_image"](rng)
        lines.append(" ".join([f"image{i}", *(str(c - 1) for c in np.unique(mask) if c)]))
        picture = Image.fromarray((255 * pixels).astype(np.uint8))
        picture.save(root / "JPEGImages" / f"image{i}.jpg", quality=95)
    (root / "ImageSets" / "Segmentation" / "train_cls.txt").write_text("\n".join(lines) + "\n")
    assert [line.count(" ") for line in lines].count(0) == 1
    (root / "classes.txt").write_text("\n".join(module["CLASSES"]))
    return root


@pytest.fixture(scope="module")
def out(voc, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    run("oaa_in_one_file.py", voc, folder, "--epochs", EPOCHS, "--seed", SEED)
    return folder


@pytest.mark.slow
def test_its_maps_are_those_of_the_pipeline(voc, out, tmp_path):
    recipe = ["--recipe", "small", "--backbone", "efficientnet_lite0", "--batch-size", 5, "--seed", SEED]
    length = ["--iterations", 6, "--drop-at", 5, "--workers", 0, "--device", "cpu"]
    run("voc/train_attention.py", "--voc-root", voc, "--out", tmp_path / "run", *recipe, *length)
    mine = AttentionAccumulator.load(out / "maps.safetensors")
    theirs = AttentionAccumulator.load(tmp_path / "run" / "max.safetensors")
    assert mine.pairs.classes.tolist() == theirs.pairs.classes.tolist()
    assert torch.equal(mine.counts, theirs.counts)
    assert 0 < mine.accepted < mine.offered == theirs.offered
    # Pixels are scaled by other operations, which round otherwise: a step of 8 bits here and there.
    first, second = (torch.cat([maps.attention(i) for i in range(6)]) for maps in (mine, theirs))
    assert (first - second).abs().max() < 1.5 / 255
    assert (first != second).float().mean() < 0.1
    assert (first > 0).float().mean() > 0.1


@pytest.mark.slow
def test_every_image_gets_a_label_of_its_classes(voc, out):
    shown = set()
    for line in (voc / "ImageSets" / "Segmentation" / "train_cls.txt").read_text().splitlines():
        name, *classes = line.split()
        with Image.open(out / "pseudo_labels" / f"{name}.png") as label:
            assert (label.mode, label.size) == ("P", (64, 64))
            values = set(np.unique(np.asarray(label)).tolist())
        assert values <= {0, 255, *(int(c) + 1 for c in classes)}
        shown |= values - {0, 255}
    assert shown  # six steps do not teach every class, but some


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"is not in VOC layout: expected .*train_cls\.txt"),
        ("image0 1\nlost 0\n", r"train_cls\.txt: there is no photograph of 'lost'"),
        ("image0 cat\n", r"train_cls\.txt, line 1: expected lines NAME ID.*got 'image0 cat'"),
        ("image0\n", r"expected labels in .*train_cls\.txt"),
    ],
)
def test_a_folder_in_another_layout_is_named_and_nothing_is_written(voc, tmp_path, content, message):
    lists = tmp_path / "voc" / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (tmp_path / "voc" / "JPEGImages").symlink_to(voc / "JPEGImages")
    if content is not None:
        (lists / "train_cls.txt").write_text(content)
    with pytest.raises(SystemExit, match=message):
        run("oaa_in_one_file.py", tmp_path / "voc", tmp_path / "out")
    assert not (tmp_path / "out").exists()
