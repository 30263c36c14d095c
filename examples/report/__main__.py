"""One HTML file that shows a run: its scores, its curves, and attention accumulating, epoch by epoch, on photographs.

    python examples/report --voc-root VOCdevkit/VOC2012 --run runs/voc/seed0 --out report.html

The run is what voc/reproduce.py leaves for one seed. Its first stage is needed; of the others, what is there is shown,
and the page says what is missing. The page holds all its pictures: it opens without a server and fetches nothing.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "voc"))

from files import ends_with, whole_file
from finished_run import FinishedRun
from page import make_page


def main() -> None:
    """Read a run, write its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc-root", type=Path, required=True, help="folder with JPEGImages, ImageSets, ...")
    parser.add_argument("--run", type=Path, required=True, help="folder of one seed, with attention/ in it")
    parser.add_argument("--out", type=Path, required=True, help="the page (.html)")
    parser.add_argument("--images", type=int, default=8, help="gains, and failures, beside the watched (default: 8)")
    parser.add_argument("--failure", type=float, default=30, help="IoU in percent below which one is (default: 30)")
    arguments = parser.parse_args()
    if arguments.images < 0:
        parser.error(f"--images: expected at least 0, got {arguments.images}")
    if not 0 <= arguments.failure <= 100:
        parser.error(f"--failure: expected 0 to 100 percent, got {arguments.failure:g}")
    with ends_with(f"--out {arguments.out}", "choose a place that can be written to"):
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.out.is_dir():
        raise SystemExit(f"--out {arguments.out} is a folder; expected a file such as report.html")
    run = FinishedRun(arguments.run, arguments.voc_root)
    page = make_page(run, arguments.voc_root, most=arguments.images, failure=arguments.failure / 100)
    with ends_with(f"--out {arguments.out}", "make room, or choose another place"), whole_file(arguments.out) as file:
        file.write_text(page, encoding="utf-8")
    print(f"done: {arguments.out}, {len(page) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
