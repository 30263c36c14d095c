"""Between stages 1b and 3: attention maps that follow the edges of the photograph.

--method pamr: pixel-adaptive refinement (`oaa_lib.pixel_adaptive_refinement`), on any device. --method crf: the
marginals of a dense CRF (extra crf) whose unary terms are the maps and a constant background (--background-level; the
threshold that is best for these maps is a good one) and whose kernels are a recipe's, on all cores. Writes
NAME_CLASS.png like export_attention.py, for evaluate_cues.py and make_pseudo_labels.py; images that are there already
are passed over.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bound import Bound
from crf import dense_crf, pydensecrf
from data import VOCFolder
from files import ends_with
from maps import check_maps, made_by, map_files, read_map, write_maps
from options import training_split
from parallel import on_all_cores
from processes import check_device
from recipes import RECIPES
from torch import Tensor
from tqdm import tqdm

from oaa_lib import pixel_adaptive_refinement


def main() -> None:
    """Run the stage."""
    arguments = parse_arguments()
    check_device(arguments.device)
    if arguments.method == "crf":
        pydensecrf()  # now, rather than in another process
    folder = VOCFolder(arguments.voc_root, training_split(arguments))
    kept: dict[str, Any] = {name: str(getattr(arguments, name)) for name in ("maps", "method", "iterations")}
    kept["maps_made_by"] = made_by(arguments.maps)
    if arguments.method == "crf":
        kept |= {"background_level": str(arguments.background_level), "crf": arguments.crf}
    out = Bound(arguments.out, kept, record="refinement.json")
    check_maps(folder, arguments.maps)
    labelled = [name for name in folder.names if folder.class_ids(name)]
    todo = out.todo(labelled, lambda name: map_files(folder, name))
    out.make()
    refine = partial(refine_image, folder=folder, arguments=arguments)
    with ends_with(f"--out {arguments.out}", "what is written stays; the same command goes on from there"):
        if arguments.method == "crf":
            seconds = on_all_cores(refine, todo, "crf")
        else:
            seconds = [refine(name) for name in tqdm(todo, desc="pamr")]
    told = f" ({np.median(seconds):.3f} s an image, files aside)" if todo else ""
    print(f"done: maps of {len(todo)} images refined{told}, {len(labelled) - len(todo)} were there -> {arguments.out}")


def parse_arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc-root", type=Path, required=True, help="folder with JPEGImages, ImageSets, ...")
    parser.add_argument("--split", help="list of the images (default: trainaug if there is one, else train)")
    parser.add_argument("--maps", type=Path, required=True, help="folder of NAME_CLASS.png")
    parser.add_argument("--out", type=Path, required=True, help="folder for the refined maps")
    parser.add_argument("--method", choices=("pamr", "crf"), required=True)
    parser.add_argument("--iterations", type=int, default=10, help="default: 10, the common setting of both methods")
    parser.add_argument("--background-level", type=float, default=0.5, help="of the CRF, in (0, 1] (default: 0.5)")
    parser.add_argument(
        "--crf", choices=RECIPES, default="release", help="recipe whose kernels it has (default: release)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of PAMR")
    arguments = parser.parse_args()
    if arguments.iterations < 1 or not 0 < arguments.background_level <= 1:
        parser.error("expected --iterations of at least 1 and --background-level in (0, 1]")
    if not arguments.maps.is_dir():
        raise SystemExit(f"{arguments.maps} is missing: expected the folder of maps (--maps)")
    if arguments.maps.resolve() == arguments.out.resolve():
        raise SystemExit(f"{arguments.out} holds the maps to refine; choose another --out")
    return arguments


def refine_image(name: str, *, folder: VOCFolder, arguments: argparse.Namespace) -> float:
    """Read, refine and write the maps of one image; returns the seconds that the method took."""
    photograph = np.asarray(folder.photograph(name))
    files = [arguments.maps / file for file in map_files(folder, name)]
    attention = torch.stack([read_map(path, folder.size(name)) for path in files])
    start = time.perf_counter()
    if arguments.method == "pamr":
        image = torch.tensor(photograph, device=arguments.device).permute(2, 0, 1)[None].float()
        maps = attention[None].to(arguments.device) / 255
        refined = pixel_adaptive_refinement(image, maps, iterations=arguments.iterations)[0].cpu()
    else:
        recipe = RECIPES[arguments.crf].evaluation
        kernels = {"gaussian": recipe.crf_gaussian, "bilateral": recipe.crf_bilateral}
        options = {"iterations": arguments.iterations, **kernels}
        refined = crf_marginals(photograph, attention / 255, arguments.background_level, **options)
    seconds = time.perf_counter() - start
    if not refined.isfinite().all():
        raise SystemExit(f"{name}: the refined maps hold NaN, so none is written; choose another --background-level")
    write_maps(arguments.out, folder, name, refined)
    return seconds


def crf_marginals(photograph: np.ndarray, attention: Tensor, background: float, **options: Any) -> Tensor:
    """(K, H, W) probabilities of the classes, from attention (K, H, W) in [0, 1] and a constant background."""
    scores = torch.cat([attention.new_full((1, *attention.shape[1:]), background), attention])
    return torch.from_numpy(dense_crf((scores / scores.sum(0)).numpy(), photograph, **options)[1:])


if __name__ == "__main__":
    main()
