"""A thousand pairs in one call: digits turned and shifted at random, by amounts that are known, and found again.

python examples/thousand_pairs.py [FOLDER]  figures go to FOLDER, ./figures unless it is given
"""

import argparse
import time
from pathlib import Path

import torch

import fnreg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("figures"))
    parser.add_argument("--count", type=int, default=1000, help="of pairs (default: 1000)")
    options = parser.parse_args()
    count, random = options.count, torch.Generator().manual_seed(0)

    # Fixed images: a batch (B, 1, 28, 28) on one grid that all share. Each moving image is its fixed one, seen through
    # a rigid map of its own: up to 20 degrees and 2 pixels.
    fixed, _ = fnreg.data.digit_pairs(count)
    angles = torch.deg2rad(40 * torch.rand(count, 1, generator=random, dtype=torch.float64) - 20)
    shifts = 4 * torch.rand(count, 2, generator=random, dtype=torch.float64) - 2
    truth = fnreg.Mapping({"rotation": angles, "translation": shifts}, fixed.grid, fnreg.Rigid())
    moving = fnreg.warp(fixed, truth.inverse(), fixed.grid)

    # The leading axis makes it a batch; nothing else differs from one pair.
    begin = time.perf_counter()
    result = fnreg.register(fixed, moving, fnreg.Rigid(), levels=2)
    seconds = time.perf_counter() - begin
    print(f"{count} pairs in {seconds:.1f} s, {count / seconds:.0f} pairs per second")

    # A pair that fails is marked with the cause, raises nothing and touches no neighbour.
    for code in result.status[~result.ok].tolist():
        print(f"a pair failed: {fnreg.Status(code).remedy}")
    points = fixed.grid.center_crop(20).points()  # where the digits are
    error = (result.map_points(points) - truth.map_points(points)).norm(dim=2).mean(1)  # (B,)
    print(f"{int(result.ok.sum())} ended well, {int((error < 0.5).sum())} nearer than half a pixel to the true map;")
    print(f"distance in pixels: {error.median():.3f} in the median, {error.max():.3f} at most")

    options.folder.mkdir(parents=True, exist_ok=True)
    title = f"The first of {count} pairs"
    figure = fnreg.plot.batch(fixed, moving, result.warp(moving), title=title)
    figure.savefig(options.folder / "thousand_pairs.png")
    fnreg.plot.losses(result, objective="mean squared difference").savefig(options.folder / "thousand_pairs_losses.png")
    print(f"figures are in {options.folder}")


if __name__ == "__main__":
    main()
