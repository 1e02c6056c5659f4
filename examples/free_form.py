"""Free-form deformation: one nine bent into another, by maps that bend easily and by maps that do not.

python examples/free_form.py [FOLDER]       figures go to FOLDER, ./figures unless it is given
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

    # First what needs no bending. What lies outside of the moving image is black, as its border is.
    fixed, moving = fnreg.data.digits(9, count=2)
    turn = fnreg.Stage(fnreg.Rotation(), optimizer=fnreg.sgd(10.0))
    alike = fnreg.register(fixed, moving, [turn, fnreg.Stage(fnreg.Similarity(), levels=2)], padding="border")
    print(f"similarity: mean squared difference {alike.value:.4f}")

    # Then a control point at every second pixel. Weights with an axis are a batch: one pair, three registrations.
    weights = torch.tensor([1e-4, 1e-2, 1.0])
    result = fnreg.register(
        fixed, moving, fnreg.FFD(stride=2), objective=fnreg.mse + weights * fnreg.bending, then=alike.mapping,
        steps=options.steps, padding="border",
    )  # fmt: skip
    lowest = result.jacobian().data.amin(dim=(1, 2, 3))
    for weight, difference, least in zip(weights, result.terms["mse"], lowest, strict=True):
        told = "folds" if least <= 0 else "does not fold"
        print(f"bending x {weight:g}: {difference:.5f}, smallest determinant {least:.2f}, {told}")

    # The part of each map that bends, as lines: of 28 x 28 pixels, but drawn at 512 x 512.
    options.folder.mkdir(parents=True, exist_ok=True)
    spline, (params, domain) = fnreg.FFD(stride=2), (result.mapping.params[0], result.mapping.domain[0])
    for number, weight in enumerate(weights.tolist()):
        bent = fnreg.Mapping({name: leaf[number] for name, leaf in params.items()}, domain, spline)
        lines = fnreg.plot.warped_grid(bent, unit="pixels", title=f"bending x {weight:g}")
        lines.savefig(options.folder / f"free_form_{number}.png")
        warped = fnreg.warp(moving, alike.mapping @ bent, fixed.grid)
        overview = fnreg.plot.overview(fixed, moving, warped, unit="pixels", title=f"bending x {weight:g}")
        overview.savefig(options.folder / f"free_form_{number}_overview.png")
    print(f"figures are in {options.folder}")


if __name__ == "__main__":
    main()
