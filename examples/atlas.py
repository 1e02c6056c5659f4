"""Learn an atlas by gradient: the image from which all images of a class are least bent away.

python examples/atlas.py [FOLDER]        figures go to FOLDER, ./figures unless it is given

The template is a parameter.  Each of the digits is registered from it within the loss, and the gradient goes through
the last steps of these registrations, so the template learns to be easy to register.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.func import grad_and_value

import fnreg
from fnreg import SVFFD, Image, Unrolled, adam, bending, mse

OBJECTIVE = mse + 0.03 * bending
SOLVE = fnreg.differentiable(fnreg.register, adjoint=Unrolled(last=3))


def members(digit: int, count: int) -> Image:
    """So many images of one digit, a batch."""
    images = fnreg.data.digits(digit, count)
    return Image(torch.stack([image.data for image in images]), images[0].grid)


def registered(template: torch.Tensor, images: Image, steps: int) -> fnreg.Registration:
    """The template (1, Y, X), which all share, onto every image; a velocity, so that the way back is known as well."""
    options = {"optimizer": adam(0.5, decay=0.1), "levels": 2, "steps": steps, "padding": "zeros"}
    return SOLVE(images, Image(template, images.grid), SVFFD(stride=4), objective=OBJECTIVE, **options)


def learn(images: Image, *, rounds: int, steps: int, rate: float = 200.0) -> tuple[torch.Tensor, list[float]]:
    """The template after learning, and the loss before each round.

    What pushes all images the same way is not the images' but the template's: an atlas has a mean velocity of zero,
    which a penalty on that mean sees to.
    """
    template, losses = images.data.mean(0), []
    optimizer = torch.optim.SGD([template], lr=rate, momentum=0.5)

    def loss(template: torch.Tensor) -> torch.Tensor:
        found = registered(template, images, steps)
        drift = found.mapping.params["coefficients"].mean(0).square().mean()
        return found.value.mean() + 1e-3 * drift

    for _ in range(rounds):
        template.grad, value = grad_and_value(loss)(template.detach())
        optimizer.step()
        template.clamp_(0, 1)
        losses.append(float(value))
    return template, losses


def sharpness(image: torch.Tensor) -> float:
    """Mean length of the differences of neighbours: what averaging takes away."""
    return float(sum(image.diff(dim=axis).abs().mean() for axis in (-1, -2)))


def figures(images: Image, template: torch.Tensor, losses: list[float], steps: int) -> dict[str, Figure]:
    """Mean and atlas, the course of learning, and the atlas as some of the images."""
    shown = Figure((9, 3.2), layout="constrained")
    panels = shown.subplots(1, 3)
    for axes, image, name in zip(panels, (images.data.mean(0), template), ("mean", "atlas"), strict=False):
        axes.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set(title=name, xticks=[], yticks=[])
    panels[2].plot(losses, ".-")
    panels[2].set(xlabel="round", title="loss")
    with torch.no_grad():
        warped = registered(template, images, steps).warp(Image(template, images.grid)).data
    rows = Figure((9, 3.2), layout="constrained")
    for column, (above, below) in enumerate(zip(images.data[:8], warped[:8], strict=True)):
        for row, image in enumerate((above, below)):
            axes = rows.add_subplot(2, 8, 1 + column + 8 * row)
            axes.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[], ylabel=("image", "warped atlas")[row] if column == 0 else "")
    return {"learned": shown, "members": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("figures"))
    parser.add_argument("--count", type=int, default=20, help="digits (default: 20)")
    parser.add_argument("--rounds", type=int, default=15, help="of learning (default: 15)")
    parser.add_argument("--steps", type=int, default=20, help="of each registration on each level (default: 20)")
    options = parser.parse_args()

    images = members(3, options.count)
    template, losses = learn(images, rounds=options.rounds, steps=options.steps)
    print(f"loss {losses[0]:.4f} with the mean of the images, {losses[-1]:.4f} with the atlas")
    print(
        f"sharpness {sharpness(images.data.mean(0)):.3f} of the mean, {sharpness(template):.3f} of the atlas, ", end=""
    )
    print(f"{sharpness(images.data):.3f} of the images")
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures(images, template, losses, options.steps).items():
        figure.savefig(options.folder / f"atlas_{name}.png")
    print(f"figures are in {options.folder}")


if __name__ == "__main__":
    main()
