"""Grid search: where gradient descent sticks, look everywhere first. A search is a batch of mappings.

python examples/grid_search.py [FOLDER]     figures go to FOLDER, ./figures unless it is given
"""

import argparse
import math
from pathlib import Path

import torch

import fnreg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("figures"))
    parser.add_argument("--starts", type=int, default=36, help="angles from which to descend (default: 36)")
    options = parser.parse_args()

    fixed, moving = fnreg.data.digits(9, count=2)

    # Every angle at once: parameters with a leading axis are a batch, images without one are shared.
    angles = torch.arange(360, dtype=torch.float64)
    rotations = fnreg.Mapping({"rotation": torch.deg2rad(angles).unsqueeze(1)}, fixed.grid, fnreg.Rotation())
    values, _ = fnreg.evaluate(fixed, moving, rotations)
    best = int(values.argmin())
    print(f"360 angles: the lowest value is {values[best]:.4f}, at {best} degrees")

    # Plain gradient descent from the identity goes down into the nearest hollow of that curve, and stays there.
    sgd = fnreg.sgd(10.0)
    plain = fnreg.register(fixed, moving, fnreg.Rotation(), optimizer=sgd, levels=1)

    # Descent from many starts; on each finer level only the best of them go on.
    starts = fnreg.Rotation().spread(fixed.grid, options.starts)
    many = fnreg.register(fixed, moving, fnreg.Rotation(), optimizer=sgd, levels=2, starts=starts)

    marks = {}
    for name, result in (("gradient descent", plain), (f"{options.starts} starts", many)):
        angle = math.degrees(float(result.mapping.params["rotation"])) % 360
        marks[f"{name}: {angle:.1f} degrees"] = (angle, float(result.value))
        print(f"{name}: {result.value:.4f} at {angle:.2f} degrees")

    options.folder.mkdir(parents=True, exist_ok=True)
    curve = fnreg.plot.search(angles, values, objective="mean squared difference", others=marks)
    curve.savefig(options.folder / "grid_search.png")
    overview = fnreg.plot.overview(fixed, moving, many.warp(moving), unit="pixels", title="The best of all starts")
    overview.savefig(options.folder / "grid_search_overview.png")
    print(f"figures are in {options.folder}")


if __name__ == "__main__":
    main()
