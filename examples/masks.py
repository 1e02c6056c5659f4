"""Masks: what is only in one of two images must not pull at the map between them.

python examples/masks.py [FOLDER]        figures go to FOLDER, ./figures unless it is given
"""

import argparse
from pathlib import Path

import torch

import fnreg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("figures"))
    parser.add_argument("--steps", type=int, default=100, help="at most so many per level (default: 100)")
    options = parser.parse_args()

    # A bright clip in the moving slice and a dark resection in the fixed one; what maps one to the other is known.
    fixed, moving = fnreg.data.brain()
    truth = fnreg.data.brain_truth()
    hole = fnreg.data.circle(fixed.grid, radius=28.0, center=(75.0, 80.0)).data
    clip = fnreg.data.circle(moving.grid, radius=22.0, center=(150.0, 190.0)).data
    operated = fnreg.Image(fixed.data * (1 - hole), fixed.grid)
    clipped = fnreg.Image(moving.data * (1 - clip) + 4 * clip, moving.grid)

    # A mask is a weight per voxel: here nothing within a few millimetres of what is only in one image counts.
    def without(image: fnreg.Image, patch: torch.Tensor) -> fnreg.Subject:
        near = fnreg.Image(patch, image.grid).gaussian(3.0).data > 0.01
        return fnreg.Subject(image, mask=(~near).to(image.data.dtype))

    one, other = without(operated, hole), without(clipped, clip)
    options.folder.mkdir(parents=True, exist_ok=True)
    where = fixed.grid.points()[fixed.gaussian(3.0).data.flatten() > 0.1]
    pairs = {
        "without masks": (operated, clipped),
        "fixed mask": (one, clipped),
        "moving mask": (operated, other),
        "both masks": (one, other),
    }
    for name, (a, b) in pairs.items():
        result = fnreg.register(a, b, fnreg.Rigid(), levels=4, steps=options.steps)
        error = (result.map_points(where) - truth.map_points(where)).norm(dim=1).mean()
        print(f"{name}: {error:.2f} mm from the true map in the mean over the head")
        overview = fnreg.plot.overview(operated, clipped, result.warp(clipped), unit="mm", title=name)
        overview.savefig(options.folder / f"masks_{name.replace(' ', '_')}.png")
    print(f"figures are in {options.folder}")


if __name__ == "__main__":
    main()
