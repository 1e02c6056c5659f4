"""A disc becomes a C and a disc again: the classic test of large deformations, with the settings of `fnreg demo`.

python examples/circle_to_c.py [FOLDER]     figures go to FOLDER, ./figures unless it is given
"""

import argparse
from pathlib import Path

import fnreg
from fnreg.circle import circle_to_c


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("figures"))
    options = parser.parse_args()

    # The disc has no hole. What fills the hole of the C comes from outside of the disc, drawn in through the slot.
    found = circle_to_c()
    print(f"registered in {found.seconds:.1f} s")
    print(f"mean squared difference {found.forward:.2e} forward, {found.backward:.2e} by the inverse")
    print("determinant {:.3f} to {:.2f}".format(*found.determinant))
    print("there and back, a point is {:.4f} pixels from itself in the mean, {:.3f} at most".format(*found.consistency))

    # A ruled disc shows the way that the points went.
    options.folder.mkdir(parents=True, exist_ok=True)
    there, back = found.result, found.inverse
    ruled = fnreg.Image(found.disc.data * (1 - fnreg.data.grid_lines(found.disc.grid, every=8.0).data), found.disc.grid)
    figures = {
        "forward": fnreg.plot.overview(found.c, ruled, there.warp(ruled), unit="pixels", title="A ruled disc"),
        "inverse": fnreg.plot.overview(found.disc, found.c, back.warp(found.c), unit="pixels", title="Back again"),
        "forward_grid": fnreg.plot.warped_grid(there, lines=41, image=found.disc, unit="pixels", title="Forward"),
        "inverse_grid": fnreg.plot.warped_grid(back, lines=41, image=found.c, unit="pixels", title="Inverse"),
        "jacobian": fnreg.plot.jacobian(there.jacobian(), unit="pixels"),
    }
    for name, figure in figures.items():
        figure.savefig(options.folder / f"circle_to_c_{name}.png")
    print(f"figures are in {options.folder}")


if __name__ == "__main__":
    main()
