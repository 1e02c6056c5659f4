"""What the registration tests share: grids stored in every way, images with a formula, laws alone and vmapped."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fnreg import (
    FFD,
    SVF,
    SVFFD,
    TPS,
    Diffeomorphism,
    Displacement,
    GaussNewton,
    Grid,
    Held,
    Image,
    Mapping,
    Sequential,
    Transform,
    adam,
    fields,
    native,
    stack,
)
from fnreg.filters import gaussian
from fnreg.pytree import tree_flatten, tree_map, tree_unflatten, tree_vmap
from fnreg.transforms.linear import (
    Affine,
    Homogeneous,
    IsotropicScaling,
    Rigid,
    Rotation,
    Scaling,
    Shearing,
    Similarity,
    Translation,
)
from fnreg.transforms.rotation import angle_to_matrix, rotation_vector_to_matrix

ANY_DIMENSION: tuple[Transform, ...] = (
    Translation(),
    Scaling(),
    IsotropicScaling(),
    Affine(),
    Homogeneous(),
    Held(Affine(), ("matrix",)),
    Sequential((Translation(), Sequential((Scaling(), Affine())))),
)
TURNING: tuple[Transform, ...] = (
    Rotation(),
    Rigid(),
    Similarity(),
    Shearing(),
    Held(Similarity(), ("rotation", "log_size")),
    Sequential((Rigid(), Shearing(), Affine())),
)


def transforms_of(dimension: int) -> tuple[Transform, ...]:
    """Every transform that exists in a dimension."""
    return ANY_DIMENSION if dimension == 1 else ANY_DIMENSION + TURNING


# Maps that are not linear; their grids may have two voxels along an axis.
FIELDS: tuple[Transform, ...] = (Displacement(), SVF(3), Diffeomorphism(), FFD(2), SVFFD(2, 3))
BENT: tuple[Transform, ...] = (
    *FIELDS,
    TPS(5),
    Sequential((SVFFD(2, 3), Affine())),
    Sequential((FFD(2), Held(Affine(), ("matrix",)))),
    Sequential((Affine(), Displacement())),
)

# What registers in the scenes below.
WARPS: tuple[Transform, ...] = (Displacement(), SVF(4), Diffeomorphism(), FFD(4), SVFFD(4, 4))

# A law that runs for every transform and dimension needs fewer examples of each.
few = hypothesis.settings(max_examples=max(3, hypothesis.settings.default.max_examples // 6))

EVERY = [(transform, dimension) for dimension in (1, 2, 3) for transform in transforms_of(dimension)]
EVERY_ID = [f"{dimension}-{transform}" for transform, dimension in EVERY]
BENDING = [(transform, dimension) for dimension in (1, 2, 3) for transform in BENT]
BENDING_ID = [f"{dimension}-{transform}" for transform, dimension in BENDING]


def tensor(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """Numbers in [-1, 1); NumPy's, which vmap does not mind."""
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, shape))


# -- grids ---------------------------------------------------------------------------------------------------------


def orientation(dimension: int, turn: Tensor, mirror: bool = False) -> Tensor:
    """A direction from a turn (3,) in radians, with its last axis flipped or not."""
    eye = torch.eye(dimension, dtype=torch.float64)
    rotation = {1: lambda: eye, 2: lambda: angle_to_matrix(turn[:1]), 3: lambda: rotation_vector_to_matrix(turn)}
    flip = torch.cat([torch.ones(dimension - 1), torch.tensor([-1.0 if mirror else 1.0])]).to(torch.float64)
    return rotation[dimension]() * flip


@st.composite
def grids(draw: Any, dimension: int, count: int = 3, low: int = 2, high: int = 5) -> list[Grid]:
    """`count` grids of one size: anisotropic, oblique, far from the origin, some of them reflected."""
    size = [draw(st.integers(low, high)) for _ in range(dimension)]
    numbers = st.floats(-1, 1, allow_subnormal=False)

    def three(scale: float) -> Tensor:
        return scale * tensor([draw(numbers) for _ in range(3)])

    return [
        Grid(
            size,
            spacing=(three(1.2).exp())[:dimension],
            center=three(100.0)[:dimension],
            direction=orientation(dimension, three(3.0), draw(st.booleans())),
        )
        for _ in range(count)
    ]


def storages(dimension: int) -> Iterator[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """Every order of the axes with every choice of flips: 2, 8 or 48."""
    yield from itertools.product(
        itertools.permutations(range(dimension)), itertools.product((False, True), repeat=dimension)
    )


def stored(image: Image, order: tuple[int, ...], flips: tuple[bool, ...]) -> Image:
    """The same physical image with its axes (x first) in another order, some of them running backwards."""
    grid, dimension = image.grid, image.grid.ndim
    # Tensor axes run the other way round: grid axis k is data axis -1 - k.
    data = image.data.flip([-1 - k for k in range(dimension) if flips[k]]) if any(flips) else image.data
    data = data.permute(*range(data.ndim - dimension), *[data.ndim - 1 - k for k in reversed(order)])
    signs = tensor([-1.0 if flip else 1.0 for flip in flips])
    direction = (grid.direction * signs)[..., list(order)]
    made = Grid(
        [grid.size[k] for k in order], spacing=grid.spacing[..., list(order)], center=grid.center, direction=direction
    )
    return Image(data.contiguous(), made)


# -- parameters ----------------------------------------------------------------------------------------------------


def random_step(transform: Transform, domain: Any, seed: int, size: float) -> Any:
    """A step whose entries are in [-size, size) voxels."""
    leaves, spec = tree_flatten(transform.zero_step(domain))
    some = [size * uniform(*leaf.shape, seed=seed + 1000 * n) for n, leaf in enumerate(leaves)]
    return tree_unflatten(some, spec)


def random_params(transform: Transform, domain: Any, seed: int, size: float = 0.3) -> Any:
    """Parameters away from the identity; those that are held too."""
    if isinstance(transform, Held):
        return random_params(transform.transform, domain, seed, size)
    return transform.retract(transform.init(domain), random_step(transform, domain, seed, size), domain)


def random_mapping(transform: Transform, domain: Any, seed: int, size: float = 0.3) -> Mapping:
    return Mapping(random_params(transform, domain, seed, size), domain, transform)


def smooth_step(transform: Transform, domain: Grid, seed: int, size: float, sigma: float = 2.0) -> Any:
    """A step of fields that are smooth and no entry of which exceeds `size` voxels; other leaves are a tenth of it."""

    def smooth(leaf: Tensor) -> Tensor:
        if leaf.ndim <= 2 and domain.ndim > 1:
            return 0.1 * size * leaf
        made = gaussian(leaf, sigma) if leaf.ndim == domain.ndim + 1 else leaf
        return size * made / made.abs().max()

    return tree_map(smooth, random_step(transform, domain, seed, 1.0))


def smooth_mapping(transform: Transform, domain: Grid, seed: int = 0, size: float = 1.0, sigma: float = 2.0) -> Mapping:
    """A map away from the identity that does not fold, where `size` is not large beside `sigma`."""
    params, left = transform.init(domain), size
    while left > 1e-9:  # no single step may be larger than a Diffeomorphism takes
        params = transform.retract(params, smooth_step(transform, domain, seed, min(left, 0.5), sigma), domain)
        left -= 0.5
    return Mapping(params, domain, transform)


def least_determinant(mapping: Mapping) -> float:
    """Of the map's derivative at the voxels of its domain; not positive where it folds."""
    return float(fields.determinant(mapping.displacement(), mapping.domain).min())


# -- laws ----------------------------------------------------------------------------------------------------------


def each(items: list[Any]) -> list[Any]:
    """The items of one structure, and the batch of them."""
    return [*items, stack(items)]


def law(function: Callable[..., tuple[Any, Any]], *arguments: list[Any], atol: float, rtol: float = 0.0) -> None:
    """What `function` finds and what it expects agree for every item of the arguments, alone and under vmap."""
    for items in zip(*arguments, strict=True):
        found, expected = function(*items)
        close(found, expected, atol=atol, rtol=rtol)
    batches = [stack(items) for items in arguments]
    found, expected = tree_vmap(function, [None] * len(batches), *batches)
    close(found, expected, atol=atol, rtol=rtol)


def close(found: Any, expected: Any, *, atol: float, rtol: float = 0.0) -> None:
    """Two trees have one structure, and their leaves agree."""
    leaves, spec = tree_flatten(found)
    others, other = tree_flatten(expected)
    assert spec == other
    assert leaves
    for a, b in zip(leaves, others, strict=True):
        assert_close(a, b, atol=atol, rtol=rtol)


def equal_bits(found: Any, expected: Any) -> bool:
    """Whether two trees agree to the last bit; NaN equals NaN."""
    leaves, spec = tree_flatten(found)
    others, other = tree_flatten(expected)
    if spec != other or not leaves:
        return False
    return all(
        torch.equal(torch.isnan(a), torch.isnan(b)) and torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))
        for a, b in zip(leaves, others, strict=True)
        if isinstance(a, Tensor)
    )


def flat_function(function: Callable[..., Any], tree: Any) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """A function of a tree as a function of its leaves, for gradcheck."""
    leaves, spec = tree_flatten(tree)

    def of_leaves(*values: Tensor) -> Any:
        return function(tree_unflatten(list(values), spec))

    return of_leaves, tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)


# -- images --------------------------------------------------------------------------------------------------------

# amplitude, centre, width: in units of the scene's extent about its centre; no symmetry anywhere
BLOBS = (
    (1.0, (-0.15, 0.1, 0.05), 0.20),
    (0.8, (0.2, -0.12, -0.15), 0.16),
    (-0.6, (0.05, 0.22, 0.2), 0.14),
    (0.5, (-0.22, -0.2, 0.1), 0.18),
)


def intensity(points: Tensor, extent: float = 1.0, shift: int = 0) -> Tensor:
    """A smooth scene about the origin, (N, D) to (N,); other shifts give other scenes."""
    where = points / extent
    total = torch.zeros_like(where[..., 0])
    for number, (amplitude, place, width) in enumerate(BLOBS):
        _, other, _ = BLOBS[(number + shift) % len(BLOBS)]
        center = tensor(other if shift else place)[: where.shape[-1]]
        total = total + amplitude * torch.exp(-(where - center).square().sum(-1) / (2 * width**2))
    return total


def picture(
    grid: Grid,
    mapping: Mapping | None = None,
    *,
    extent: float,
    channels: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Image:
    """The image whose value at p is the scene at T(p), without any interpolation."""
    points = grid.points() if mapping is None else mapping.map_points(grid.points())
    values = torch.stack([intensity(points, extent, shift) for shift in range(channels)])
    return Image(values.reshape(channels, *grid.shape).to(dtype), grid)


def voxels_apart(a: Mapping, b: Mapping, grid: Grid) -> float:
    """The largest distance between two maps over the voxels of a grid, in the grid's smallest spacing."""
    points = grid.points()
    distance = (a.map_points(points) - b.map_points(points)).norm(dim=-1).max()
    return float(distance / grid.spacing.min())


EXTENT = 20.0  # of the scene of `scene`, world units
SIZES = ((32,), (20, 18), (11, 10, 9))


def scene(
    dimension: int,
    mapping: Mapping | None = None,
    *,
    turn: tuple[float, ...] = (0.0, 0.0, 0.0),
    mirror: bool = False,
    spacing: float = 1.0,
    grow: int = 0,
    center: float = 0.0,
    channels: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Image:
    """A view of the scene about the origin, through a mapping where one is given, on an anisotropic grid."""
    size = [n + grow for n in SIZES[dimension - 1]]
    scale = EXTENT / max(SIZES[dimension - 1])
    grid = Grid(
        size,
        spacing=tensor([1.0, 1.1, 1.2])[:dimension] * scale * spacing,
        center=tensor([0.13, -0.21, 0.17])[:dimension] + center,  # no voxel of one image lies on one of another
        direction=orientation(dimension, tensor(turn), mirror),
    )
    return picture(grid, mapping, extent=EXTENT, channels=channels, dtype=dtype)


def moving_scene(dimension: int, **options: Any) -> Image:
    """The scene itself, on a grid that differs from that of `scene` in all ways."""
    return scene(dimension, **({"turn": (0.1, -0.15, 0.05), "mirror": True, "spacing": 0.93, "grow": 3} | options))


def known_pair(transform: Transform, dimension: int, seed: int = 5, size: float = 1.0) -> tuple[Image, Image, Mapping]:
    """Fixed, moving, and the map between them."""
    truth = random_mapping(transform, scene(dimension).grid, seed, size)
    return scene(dimension, truth), moving_scene(dimension), truth


# -- registrations -------------------------------------------------------------------------------------------------

SAME = 1e-9  # voxels, float64
DESCENT: dict[str, Any] = {"optimizer": adam(0.3)}
NEWTON: dict[str, Any] = {"solver": GaussNewton()}
both_solvers = pytest.mark.parametrize("options", [DESCENT, NEWTON], ids=["adam", "gauss-newton"])


def few_steps(options: dict[str, Any], steps: int = 6) -> dict[str, Any]:
    """A registration that is on its way: what differs between two of them has not yet healed.

    Gauss-Newton takes few, for once it has arrived rounding decides whether a last tiny step is taken.
    """
    return {"levels": 2, "steps": min(steps, 3) if options is NEWTON else steps, "stop": None, **options}


def probe(grid: Grid) -> Tensor:
    """World points in and around a grid."""
    return grid.center + grid.extent.max() * uniform(12, grid.ndim, seed=3)


def take(tree: Any, number: int) -> Any:
    """One pair of a batch all of whose leaves are batched."""
    return tree_map(lambda leaf: leaf[number] if isinstance(leaf, Tensor) else leaf, tree)


def take_batched(mapping: Mapping, number: int) -> Mapping:
    """One mapping of a batch over a shared domain."""
    return Mapping(take(mapping.params, number), mapping.domain, mapping.transform)


def several_pairs(dimension: int = 2) -> tuple[list[Image], list[Image]]:
    """Pairs whose grids differ in spacing, orientation and place; the second has nothing left to find."""
    fixed, moving = [], []
    for number in range(4):
        grid = {"turn": (0.2 * number, 0.1, -0.1), "spacing": 1 + 0.05 * number, "mirror": number == 2}
        turned = Rigid() if dimension > 1 else Affine()
        truth = random_mapping(turned, scene(dimension, **grid).grid, number, 0.0 if number == 1 else 1.0)
        fixed.append(scene(dimension, truth, **grid))
        moving.append(moving_scene(dimension, turn=(0.1, 0.1 * number, 0.0), spacing=0.9 + 0.04 * number))
    return fixed, moving


def placement(grid: Grid) -> dict[str, Tensor]:
    """All of a grid but its size."""
    return {name: getattr(grid, name) for name in ("center", "spacing", "direction")}


def inner_mask(image: Image, margin: int = 4) -> Tensor:
    """One within a margin, zero outside."""
    mask = torch.zeros(1, *image.grid.shape, dtype=image.data.dtype)
    mask[(slice(None), *(slice(margin, -margin),) * image.grid.ndim)] = 1
    return mask


def without_kernels() -> Any:
    """As on a machine without a compiler."""
    return mock.patch.object(native, "load", lambda: None)
