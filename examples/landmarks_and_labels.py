"""Landmarks and labels: two slices of a brain without a common contrast, aligned by what is known about them.

python examples/landmarks_and_labels.py [FOLDER]        figures go to FOLDER, ./figures unless it is given
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

    # The moving slice is inverted, as if it came from another scanner. What maps one to the other is known.
    fixed, moving = fnreg.data.brain()
    truth = fnreg.data.brain_truth()
    inverted = fnreg.Image(1 - moving.data, moving.grid)

    # A label for the head, and five landmarks, placed by hand: up to 3 mm wrong, the last one far off.
    torch.manual_seed(0)
    places = torch.tensor([[70.0, 60.0], [150.0, 60.0], [110.0, 130.0], [75.0, 190.0], [150.0, 190.0]]).double()
    found = truth.map_points(places) + 3 * (2 * torch.rand(5, 2).double() - 1)
    found[-1] += 40
    labels = [(image.gaussian(3.0).data > 0.1).long() for image in (fixed, moving)]
    one = fnreg.Subject(fixed, labels=labels[0], points=places)
    other = fnreg.Subject(inverted, labels=labels[1], points=found)

    # Huber's function keeps the wrong landmark from pulling harder than the others.
    points = fnreg.landmarks(delta=3.0)
    objectives = {
        "mean squares": fnreg.mse,
        "landmarks": points,
        "labels": fnreg.dice,
        "edges": fnreg.ngf,
        "landmarks, then all": [points, points, 0.01 * points + fnreg.dice + fnreg.ngf, fnreg.dice + fnreg.ngf],
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    where = fixed.grid.points()[labels[0].flatten() > 0]
    for name, objective in objectives.items():
        result = fnreg.register(one, other, fnreg.Rigid(), objective=objective, levels=4, steps=options.steps)
        error = (result.map_points(where) - truth.map_points(where)).norm(dim=1).mean()
        print(f"{name}: {error:.2f} mm from the true map in the mean over the head")
        overview = fnreg.plot.checkerboard(fixed, result.warp(moving), unit="mm")
        overview.savefig(options.folder / f"landmarks_and_labels_{name.replace(', ', '_').replace(' ', '_')}.png")
    print(f"figures are in {options.folder}")


if __name__ == "__main__":
    main()
