"""The README's picture: a pair, a batch, and a disc that becomes a C.

python docs/pictures/overview.py      from the root of the repository; needs the extra `plot`
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

import fnreg
from fnreg import SVFFD, GaussNewton, Image, Rigid, Similarity, Stage
from fnreg.circle import circle_to_c

BATCH = 12


def composite(fixed: Image, moving: Image) -> torch.Tensor:
    """Fixed in green, moving in magenta: grey where they agree."""
    a, b = (image.data[0] / image.data.max() for image in (fixed, moving))
    return torch.stack([b, a, b], -1)


def mosaic(images: Image) -> torch.Tensor:
    """A batch side by side."""
    return torch.cat(list(images.data[:BATCH, 0]), 1)


def ruled(image: Image) -> Image:
    """Crossed by lines, which show the way that points went."""
    return Image(image.data * (1 - fnreg.data.grid_lines(image.grid, every=8.0, width=1.5).data), image.grid)


def main() -> None:
    figure, axes = plt.subplots(3, 1, figsize=(9, 7.2), layout="constrained", height_ratios=[2.2, 1.7, 2.2])
    for axis in axes:
        axis.set_axis_off()

    fixed, moving = fnreg.data.brain()
    pair = fnreg.register(fixed, moving, Rigid(), solver=GaussNewton())
    grey = [(image.data[0] / image.data.max()).unsqueeze(-1).expand(-1, -1, 3) for image in (fixed, moving)]
    shown = [*grey, composite(fixed, moving), composite(fixed, pair.warp(moving))]
    axes[0].imshow(torch.cat([part.transpose(0, 1) for part in shown], 1).clamp(0, 1))
    axes[0].set_title("a pair: fixed, moving, both before, both after", fontsize=10)

    fixeds, movings = fnreg.data.digit_pairs(100)
    bent = Stage(SVFFD(4), objective=fnreg.mse + 2e-3 * fnreg.bending + 2e-3 * fnreg.diffusion)
    batch = fnreg.register(fixeds, movings, [Similarity(), bent], levels=3)
    rows = [mosaic(movings), mosaic(batch.warp(movings)), mosaic(fixeds)]
    axes[1].imshow(torch.cat(rows, 0), cmap="gray")
    count = len(batch.status)
    axes[1].set_title(f"a batch, {BATCH} of {count} in one call: moving, registered, fixed", fontsize=10)

    found = circle_to_c()
    there, back = found.result.warp(ruled(found.disc)), found.inverse.warp(ruled(found.c))
    parts = [ruled(found.disc), there, ruled(found.c), back]
    axes[2].imshow(torch.cat([part.data[0] for part in parts], 1), cmap="gray")
    axes[2].set_title("a disc to a C, and a C to a disc by the inverse, without a fold", fontsize=10)

    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
