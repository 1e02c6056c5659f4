"""One pair: two slices of a brain, rotated and shifted by a known amount, found again from coarse to fine.

python examples/one_pair.py [FOLDER]        figures go to FOLDER, ./figures unless it is given
"""

import argparse
import math
from pathlib import Path

import fnreg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("figures"))
    parser.add_argument("--steps", type=int, default=100, help="at most so many per level (default: 100)")
    options = parser.parse_args()

    # An image is data on a grid. These two have spacing 1 mm; what maps one to the other is known.
    fixed, moving = fnreg.data.brain()
    truth = fnreg.data.brain_truth()

    # The default objective is the mean squared difference, the default optimizer Adam with steps in voxels.
    result = fnreg.register(fixed, moving, fnreg.Rigid(), levels=4, steps=options.steps)

    # The result maps points of the fixed image to points of the moving image.
    points = fixed.grid.points()
    error = (result.map_points(points) - truth.map_points(points)).norm(dim=1)
    angle = math.degrees(float(result.mapping.params["rotation"]))
    print(f"rotation {angle:.3f} degrees, true 10; {result.steps.tolist()} steps, coarse to fine")
    print(f"distance from the true map: {error.mean():.4f} mm in the mean, {error.max():.4f} mm at most")

    warped = result.warp(moving)
    options.folder.mkdir(parents=True, exist_ok=True)
    overview = fnreg.plot.overview(fixed, moving, warped, unit="mm", title=f"Rigid, {angle:.2f} degrees")
    overview.savefig(options.folder / "one_pair.png")
    fnreg.plot.checkerboard(fixed, warped, unit="mm").savefig(options.folder / "one_pair_checkerboard.png")
    fnreg.plot.losses(result, objective="mean squared difference").savefig(options.folder / "one_pair_losses.png")

    # The transform as fnreg reads it back, bit for bit, and as ITK and its many users read it.
    fnreg.io.write_transform(options.folder / "one_pair.safetensors", result.mapping)
    fnreg.io.write_itk(options.folder / "one_pair.tfm", result.mapping)
    print(f"figures and transforms are in {options.folder}")


if __name__ == "__main__":
    main()
