"""Learn what to compare, through the optimiser: features of two contrasts that rigid registration aligns well by.

python examples/learn_features.py [FOLDER]        figures go to FOLDER, ./figures unless it is given

A network for each contrast makes three channels, mean squares of these are the objective, and the loss is how far from
a known motion it ends.  Judged on other motions of other slices, beside mutual information: SPM's T1 and T2 averages
where FNREG_DATA names a folder with `multimodal3d_spm`, else slices of the package, one contrast made up.
"""

import argparse
import os
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

import fnreg
from fnreg import Image, Mapping, Rigid, Unrolled, adam, mi, mse

OPTIONS = {"optimizer": adam(0.6, decay=0.2), "levels": 2, "padding": "border"}


def slices() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, fnreg.Grid]:
    """Of both contrasts, (N, 1, Y, X) to learn from and as many others to judge by, and their grid about 0."""
    if (folder := Path(os.environ.get("FNREG_DATA", "."), "multimodal3d_spm")).is_dir():
        t1, t2 = (fnreg.io.read_image(folder / f"avg152{name}.nii.gz").data[0].float() for name in ("T1", "T2"))
        sides, spacing = [[side[z : z + 1] for z in range(30, 62, 2)] for side in (t1, t2)], 2.0
    else:
        contrasts = (torch.abs, lambda data: (3 * data).sin().abs())
        sides, spacing = [[f(image.data) for image in fnreg.data.brain()] for f in contrasts], 1.0
    coarse = [Image(data, spacing=spacing, center=0.0).normalize() for side in sides for data in side]
    coarse = [image.resize([round(float(e) / 4) for e in image.grid.extent]) for image in coarse]
    a, b = torch.stack([image.data for image in coarse]).split(len(sides[0]))
    return a[::2], b[::2], a[1::2], b[1::2], coarse[0].grid


def pairs(a: torch.Tensor, b: torch.Tensor, grid: fnreg.Grid, count: int, seed: int) -> tuple[Image, Image, Mapping]:
    """Slices of one contrast seen through motions of up to 20 degrees and 20 mm, those of the other, the motions."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(len(a), (count,), generator=generator)
    turn, shift = (2 * torch.rand(count, n, generator=generator).double() - 1 for n in (1, 2))
    truth = Mapping({"rotation": 0.35 * turn, "translation": 20 * shift}, grid, Rigid())
    return fnreg.warp(Image(a[which], grid), truth, interpolation="cubic"), Image(b[which], grid), truth


class Features(nn.Module):
    """A few convolutions for each contrast, to channels in (-1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        layers = [[m for n, k in ((1, 8), (8, 8), (8, 3)) for m in (nn.Conv2d(n, k, 5, 1, 2), nn.Tanh())] for _ in "12"]
        self.first, self.second = (nn.Sequential(*each) for each in layers)

    def forward(self, fixed: Image, moving: Image) -> tuple[Image, Image]:
        return Image(self.first(fixed.data), fixed.grid), Image(self.second(moving.data), moving.grid)


def errors(found: Mapping, truth: Mapping, fixed: Image) -> torch.Tensor:
    """How far the points of each head end from the truth, in the mean, (B,) mm."""
    points, inside = fixed.grid.points(), (fixed.data > 0.1).flatten(1)
    away = (found.map_points(points) - truth.map_points(points)).square().sum(-1).clamp(min=1e-6).sqrt()
    return (away * inside).sum(1) / inside.sum(1)


def learn(a: torch.Tensor, b: torch.Tensor, grid: fnreg.Grid, *, rounds: int, steps: int, seed: int = 0):
    """The network after learning from other motions in each round, and the mean error in mm of each round."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam((network := Features()).parameters(), lr=5e-3)
    fading = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, rounds)
    solve, losses = fnreg.differentiable(fnreg.register, adjoint=Unrolled(last=10)), []
    for number in range(rounds):
        fixed, moving, truth = pairs(a, b, grid, 8, 10_000 * (seed + 1) + number)
        found = solve(*network(fixed, moving), Rigid(), objective=mse, steps=steps, **OPTIONS)
        loss = errors(found.mapping, truth, fixed).log().mean()  # pairs that are nearly there count as well
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        fading.step()
        losses.append(float(loss.detach().exp()))
    return network, losses


@torch.no_grad()
def compare(network: Features, fixed: Image, moving: Image, truth: Mapping) -> dict[str, torch.Tensor]:
    """Errors (B,) before, by mutual information and by the features, with the same steps from the same start."""
    found = {"before": Mapping(Rigid().init(fixed.grid), fixed.grid, Rigid())}
    found["mutual information"] = fnreg.register(fixed, moving, Rigid(), objective=mi, **OPTIONS).mapping
    found["features"] = fnreg.register(*network(fixed, moving), Rigid(), **OPTIONS).mapping
    return {name: errors(mapping, truth, fixed) for name, mapping in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("figures"))
    parser.add_argument("--rounds", type=int, default=100, help="of learning (default: 100)")
    options, (a, b, c, d, grid) = parser.parse_args(), slices()
    network, losses = learn(a, b, grid, rounds=options.rounds, steps=20)
    fixed, moving, truth = pairs(c, d, grid, 40, 1)
    left, right = (figure := Figure((8, 3.5), layout="constrained")).subplots(1, 2)
    left.semilogy(losses)
    left.set(xlabel="round", ylabel="training error, mm")
    for place, (name, each) in enumerate(compare(network, fixed, moving, truth).items()):
        print(f"{name}: {each.mean():.2f} mm on average, {each.median():.2f} in the median")
        right.boxplot([each.tolist()], positions=[place], tick_labels=[name])
    right.set(ylabel="error on other slices, mm", yscale="log")
    panels = (shown := Figure((11, 3.2), layout="constrained")).subplots(1, 4)
    for axes, image in zip(panels, (fixed, *network(fixed, moving), moving), strict=True):
        axes.imshow(image.data[0].detach().movedim(0, -1).add(1).div(2).clamp(0, 1).numpy(), cmap="gray")
        axes.set_axis_off()
    options.folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.folder / "learn_features_errors.png")
    shown.savefig(options.folder / "learn_features_seen.png")
    print(f"figures are in {options.folder}")


if __name__ == "__main__":
    main()
