"""Learn the weights of penalties from labelled pairs, by gradient through the optimum of their registrations.

python examples/learn_penalty.py [FOLDER]        figures go to FOLDER, ./figures unless it is given

Five pairs to learn from, and seven of others to judge by: hippocampi of twelve people where FNREG_DATA names a folder
with `hippocampus` of the Medical Segmentation Decathlon, else digits, whose label is what is bright.
"""

import argparse
import os
from pathlib import Path

import torch
from matplotlib.figure import Figure

import fnreg
from fnreg import FFD, Affine, Image, Implicit, Mapping, Subject, adam, bending, diffusion, mse, ncc, overlap

Known = tuple[Subject, Subject, Mapping]
DEFAULT = torch.tensor([0.1, 0.1]).log()  # of bending and diffusion
# Adam comes near the optimum, not onto it: a ridge keeps most systems solvable, and nothing is checked.
ADJOINT = Implicit(ridge=1e-4, tolerance=1e-3, iterations=200, check=None)


def people() -> list[Subject]:
    """Twelve people on one grid of 2 mm about the middle of their crops, or threes of twelve writers."""
    folder = Path(os.environ.get("FNREG_DATA", "."), "hippocampus")
    if not folder.is_dir():
        return [Subject(i.gaussian(0.7), labels=(i.data > 0.5).long()) for i in fnreg.data.digits(3, 12)]
    found, grid = [], fnreg.Grid((20, 28, 22), spacing=2.0, center=0.0)
    for path in sorted(folder.glob("*_img.nii.gz")):
        image, known = fnreg.io.read_image(path), fnreg.io.read_labels(str(path).replace("_img", "_lab"))
        placed, known = (Image(t.float(), spacing=image.grid.spacing, center=0.0) for t in (image.data, known.data))
        labels = known.resample(grid, interpolation="nearest", padding="zeros").data.long()
        found.append(Subject(placed.normalize().gaussian(1.0).resample(grid), labels=labels))
    return found


def pairs(known: list[Subject]) -> Known:
    """Each onto the next one, the last onto the first, and the affine maps between them."""
    fixed, moving = fnreg.stack(known), fnreg.stack(known[1:] + known[:1])
    return fixed, moving, fnreg.register(fixed.image, moving.image, Affine(), objective=ncc, padding="border").mapping


def registered(known: Known, logs: torch.Tensor, steps: int) -> fnreg.Registration:
    """All pairs, with derivatives by the logarithms of the weights (2,) or (B, 2)."""
    objective = mse + logs[..., 0].exp() * bending + logs[..., 1].exp() * diffusion
    options = {"optimizer": adam(0.3, decay=0.01), "padding": "border", "levels": 1, "steps": steps, "stop": None}
    solve = fnreg.differentiable(fnreg.register, adjoint=ADJOINT)
    return solve(known[0].image, known[1].image, FFD(stride=4), objective=objective, then=known[2], **options)


def soft_dice(known: Known, logs: torch.Tensor, steps: int) -> torch.Tensor:
    """One minus the overlap of labels by linear interpolation, of each pair: it has a derivative."""
    fixed, moving, found = known[0], known[1], registered(known, logs, steps)
    numbers = fnreg.metrics.classes(fixed.labels)
    sides = [torch.cat([(s.labels == k).float() for k in numbers], 1) for s in (fixed, moving)]
    warped = fnreg.warp(Image(sides[1], moving.image.grid), found.mapping, fixed.image.grid).data
    return torch.vmap(overlap.dice)(warped, sides[0])


def dice(known: Known, logs: torch.Tensor, steps: int) -> torch.Tensor:
    """The overlap of labels themselves, of each pair."""
    with torch.no_grad():
        warped = registered(known, logs, steps).warp(known[1]).labels
    return torch.stack([fnreg.metrics.dice(a, b).nanmean() for a, b in zip(warped, known[0].labels, strict=True)])


def learn(known: Known, *, rounds: int, steps: int, rate: float = 0.4) -> tuple[torch.Tensor, list[float]]:
    """The logarithms of the weights after each round, and the loss before it."""
    start, losses = DEFAULT.clone(), []
    optimizer, logs = torch.optim.Adam([start], lr=rate, betas=(0.8, 0.9)), [DEFAULT]
    for _ in range(rounds):
        each = start.expand(len(known[0].image.data), 2)  # one derivative per pair, NaN where it has no optimum
        slopes, loss = torch.func.grad_and_value(lambda x: soft_dice(known, x, steps).sum())(each)
        start.grad = slopes.nanmean(0).nan_to_num()
        optimizer.step()
        logs.append(start.clone())
        losses.append(float(loss) / len(each))
    return torch.stack(logs), losses


def figures(known: Known, logs: torch.Tensor, losses: list[float], steps: int) -> dict[str, Figure]:
    """How learning went, and the labels of the first pair."""
    course = Figure((8, 3.5), layout="constrained")
    left, right = course.subplots(1, 2)
    left.plot(losses, ".-")
    left.set(xlabel="round", ylabel="1 - soft Dice of the training pairs")
    right.plot(logs.exp(), ".-", label=["bending", "diffusion"])
    right.set(xlabel="round", ylabel="weight", yscale="log")
    right.legend()
    (fixed, moving, begin), found = known, registered(known, logs[-1], steps)
    labels = (fixed.labels, fnreg.warp(moving, begin, fixed.image.grid).labels, found.warp(moving).labels)
    return {
        "course": course,
        "labels": fnreg.plot.labels(fnreg.pytree.tree_take(fixed.image, 0), *(one[0] for one in labels)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("figures"))
    parser.add_argument("--rounds", type=int, default=8, help="of learning (default: 8)")
    parser.add_argument("--steps", type=int, default=150, help="of each registration (default: 150)")
    options, known = parser.parse_args(), people()
    train, test = pairs(known[:5]), pairs(known[5:])
    logs, losses = learn(train, rounds=options.rounds, steps=options.steps)
    for name, these in (("learned from", train), ("others", test)):
        before, after = (dice(these, x, options.steps).mean() for x in (DEFAULT, logs[-1]))
        print(f"{name}: Dice {before:.3f} with weights of 0.1, {after:.3f} with the learned ones")
    print(f"learned for bending and diffusion: {', '.join(f'{x:.2g}' for x in logs[-1].exp())}")
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures(test, logs, losses, options.steps).items():
        figure.savefig(options.folder / f"learn_penalty_{name}.png")
    print(f"figures are in {options.folder}")


if __name__ == "__main__":
    main()
