"""A network that outputs the parameters of a registration at once, alone and with a few refining steps after it.

python examples/amortised.py [FOLDER]        figures go to FOLDER, ./figures unless it is given

It learns without known answers: what it says is judged by the objective of `register` itself, in `evaluate`.
"""

import argparse
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.func import functional_call, grad_and_value

import fnreg
from fnreg import FFD, Image, Mapping, adam, bending, mse

TRANSFORM = FFD(stride=4)
SAME = {"objective": mse + 0.03 * bending, "padding": "border"}


def pairs(count: int, *, seed: int = 0) -> tuple[tuple[Image, Image], tuple[Image, Image]]:
    """So many pairs of digits to learn from, and pairs of images of which none is among these."""
    images = torch.stack([torch.stack([i.data for i in fnreg.data.digits(d, 30)]) for d in range(10)])
    generator = torch.Generator().manual_seed(seed)

    def drawn(low: int, high: int, count: int) -> tuple[Image, Image]:
        digit = torch.randint(10, (count,), generator=generator)
        first, second = torch.rand(count, high - low, generator=generator).argsort(1)[:, :2].T + low
        grid = fnreg.Grid((28, 28))
        return Image(images[digit, first], grid), Image(images[digit, second], grid)

    return drawn(0, 20, count), drawn(20, 30, max(10, count // 10))


class Network(nn.Module):
    """Two images to spline coefficients (D, lattice)."""

    def __init__(self, lattice: tuple[int, ...]) -> None:
        super().__init__()
        self.lattice, parts = lattice, [(2, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1)]
        layers = [m for a, b, stride in parts for m in (nn.Conv2d(a, b, 3, stride, 1), nn.LeakyReLU(0.1))]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(64 * 7 * 7, 2 * lattice[0] * lattice[1])
        nn.init.normal_(self.head.weight, std=1e-4)  # it begins with the identity
        nn.init.zeros_(self.head.bias)

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.head(self.features(torch.cat([fixed, moving], 1)).flatten(1))
        return {"coefficients": found.unflatten(1, (2, *self.lattice))}


def loss(network: Network, weights: dict[str, torch.Tensor], fixed: Image, moving: Image) -> torch.Tensor:
    """The mean objective of what a network with these weights says."""
    params = functional_call(network, weights, (fixed.data, moving.data))
    mapping = Mapping(params, fixed.grid, TRANSFORM)
    return fnreg.evaluate(fixed, moving, mapping, **SAME)[0].mean()


def learn(data: tuple[Image, Image], *, rounds: int, seed: int = 0) -> tuple[Network, list[float]]:
    """A network that has seen 64 pairs in each round, and its losses."""
    torch.manual_seed(seed)
    network, losses = Network(TRANSFORM.lattice(data[0].grid).shape), []
    weights, optimizer = dict(network.named_parameters()), torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(rounds):
        some = torch.randint(len(data[0].data), (64,))
        images = (Image(side.data[some], side.grid) for side in data)
        slopes, value = grad_and_value(loss, argnums=1)(network, {n: w.detach() for n, w in weights.items()}, *images)
        for name, weight in weights.items():
            weight.grad = slopes[name]
        losses.append(float(value))
        optimizer.step()
    return network, losses


@torch.no_grad()
def compare(network: Network, data: tuple[Image, Image], counts: tuple[int, ...]) -> dict[str, list[tuple[float, ...]]]:
    """(steps, mean objective, seconds for all pairs) from the network's answer, in shorter steps, and the identity."""
    (fixed, moving), found = data, {"network": [], "identity": []}
    for name, rows in found.items():
        for steps in counts:
            begin, refined = time.perf_counter(), name == "network"
            initial = network(fixed.data, moving.data) if refined else None
            given = {"initial": initial, "optimizer": adam(0.1 if refined else 0.3, decay=0.1), "steps": steps}
            result = fnreg.register(fixed, moving, TRANSFORM, **given, **SAME, levels=1, stop=None)
            rows.append((steps, float(result.value.mean()), time.perf_counter() - begin))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("figures"))
    parser.add_argument("--count", type=int, default=1000, help="pairs to learn from (default: 1000)")
    parser.add_argument("--rounds", type=int, default=600, help="of learning (default: 600)")
    options = parser.parse_args()
    train, test = pairs(options.count)
    network, losses = learn(train, rounds=options.rounds)
    found = compare(network, test, (0, 3, 10, 30, 100))
    left, right = (figure := Figure((8, 3.5), layout="constrained")).subplots(1, 2)
    left.plot(losses)
    left.set(xlabel="round", ylabel="objective of the training pairs")
    for name, rows in found.items():
        for steps, value, seconds in rows:
            print(f"from the {name}, {steps} steps: objective {value:.4f}, {1e3 * seconds / len(test[0].data):.2f} ms")
        right.plot([r[2] for r in rows], [r[1] for r in rows], "o-", label=f"from the {name}")
    right.set(xlabel="seconds for all pairs", ylabel="objective of other pairs")
    right.legend()
    options.folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.folder / "amortised_course.png")
    with torch.no_grad():
        alone = Mapping(network(test[0].data, test[1].data), test[0].grid, TRANSFORM)
    fnreg.plot.batch(*test, fnreg.warp(test[1], alone)).savefig(options.folder / "amortised_pairs.png")
    print(f"figures are in {options.folder}")


if __name__ == "__main__":
    main()
