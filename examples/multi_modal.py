"""Two contrasts of one head: which similarity finds a known motion, whatever became of the intensities.

python examples/multi_modal.py [FOLDER]        figures go to FOLDER, ./figures unless it is given
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

    # The moving slice gets another contrast: some tissues change their order, and the coil shades one side.
    fixed, moving = fnreg.data.brain()
    truth = fnreg.data.brain_truth()
    shade = torch.linspace(0.6, 1.4, moving.grid.shape[1], dtype=moving.data.dtype)
    other = fnreg.Image((3 * moving.data).sin().abs() * shade, moving.grid)

    similarities = {
        "mean squares": fnreg.mse,
        "correlation": fnreg.ncc,
        "mutual information": fnreg.mi,
        "correlation ratio": fnreg.correlation_ratio,
        "local correlation, squared": fnreg.lncc(radius=4),
        "edges": fnreg.ngf,
        "self-similarity": fnreg.mind,
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    where = fixed.grid.points()[fixed.gaussian(3.0).data.flatten() > 0.1]
    errors: dict[str, float] = {}
    for name, similarity in similarities.items():
        result = fnreg.register(fixed, other, fnreg.Rigid(), objective=similarity, levels=4, steps=options.steps)
        errors[name] = float((result.map_points(where) - truth.map_points(where)).norm(dim=1).mean())
        print(f"{name}: {errors[name]:.2f} mm from the true map in the mean over the head")
    best = min(errors, key=errors.__getitem__)
    result = fnreg.register(fixed, other, fnreg.Rigid(), objective=similarities[best], levels=4, steps=options.steps)
    figures = {
        "before_and_after": fnreg.plot.overview(fixed, other, result.warp(other), unit="mm", title=best),
        "checkerboard": fnreg.plot.checkerboard(fixed, result.warp(other), unit="mm"),
    }
    for name, figure in figures.items():
        figure.savefig(options.folder / f"multi_modal_{name}.png")
    print(f"figures are in {options.folder}")


if __name__ == "__main__":
    main()
