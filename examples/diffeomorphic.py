"""A diffeomorphism: two handwritten threes and the map between them, forward and back, without a fold.

python examples/diffeomorphic.py [FOLDER]   figures go to FOLDER, ./figures unless it is given
"""

import argparse
from pathlib import Path

import fnreg
from fnreg import Stage, bending, diffusion, mse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("figures"))
    parser.add_argument("--steps", type=int, default=100, help="at most so many per level (default: 100)")
    options = parser.parse_args()

    # Rigid, then a velocity of cubic splines whose flow over unit time is the map. With `symmetric` the objective is
    # the mean of moving onto fixed and fixed onto moving, so neither image is preferred. Bending alone leaves affine
    # velocities free, which may carry points out of the image; diffusion holds them back.
    fixed, moving = fnreg.data.digits(3, count=2)
    objective = mse + 0.03 * bending + 0.003 * diffusion
    stages = [Stage(fnreg.Rigid()), Stage(fnreg.SVFFD(stride=2), objective=objective)]
    there = fnreg.register(fixed, moving, stages, steps=options.steps, padding="border", symmetric=True)

    # To go back is to run the velocity the other way; that is a registration with fixed and moving exchanged.
    back = there.inverse()
    warped, returned = there.warp(moving), back.warp(fixed)
    forward, backward = (warped.data - fixed.data).square().mean(), (returned.data - moving.data).square().mean()
    print(f"mean squared difference {forward:.4f} forward, {backward:.4f} back")

    # What the numbers say about the map: how area changes, and where a point ends after there and back.
    jacobian = there.jacobian()
    print(f"determinant {jacobian.data.min():.2f} to {jacobian.data.max():.2f}")
    points = fixed.grid.center_crop(20).points()
    away = (back.map_points(there.map_points(points)) - points).norm(dim=1)
    print(f"a point is {away.mean():.3f} pixels from itself in the mean, {away.max():.3f} at most")

    options.folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "forward": fnreg.plot.overview(fixed, moving, warped, unit="pixels", title="Forward"),
        "inverse": fnreg.plot.overview(moving, fixed, returned, unit="pixels", title="Inverse"),
        "forward_grid": fnreg.plot.warped_grid(there, image=moving, unit="pixels", title="Forward"),
        "inverse_grid": fnreg.plot.warped_grid(back, image=fixed, unit="pixels", title="Inverse"),
        "jacobian": fnreg.plot.jacobian(jacobian, unit="pixels"),
        "flow": fnreg.plot.flow(there.mapping.displacement(fixed.grid), fixed.grid, unit="pixels"),
    }
    for name, figure in figures.items():
        figure.savefig(options.folder / f"diffeomorphic_{name}.png")
    print(f"figures are in {options.folder}")


if __name__ == "__main__":
    main()
