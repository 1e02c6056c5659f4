"""Vector fields: composition, flows and inverses against matrices, SciPy and formulas; the same however stored."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import (
    close,
    each,
    equal_bits,
    few,
    grids,
    law,
    orientation,
    storages,
    stored,
    tensor,
    uniform,
    without_kernels,
)
from scipy import integrate, linalg, ndimage
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from fnreg import Grid, Image, fields, inverse, stack
from fnreg.fields import compose_shift, exp_shift, from_shift, invert_shift, to_shift
from fnreg.filters import gaussian

SIZES = {1: (23,), 2: (15, 13), 3: (9, 10, 8)}
SMALL = {1: (5,), 2: (4, 5), 3: (3, 4, 3)}
every_dimension = pytest.mark.parametrize("dimension", [1, 2, 3])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def oblique(size: tuple[int, ...], spacing: float = 1.0, turn: float = 0.4, mirror: bool = True) -> Grid:
    """An anisotropic grid, turned, far from the origin."""
    dimension = len(size)
    return Grid(
        size,
        spacing=spacing * tensor([1.0, 1.4, 0.7])[:dimension],
        center=tensor([30.0, -20.0, 10.0])[:dimension],
        direction=orientation(dimension, tensor([turn, -0.3, 0.6]), mirror),
    )


def wave(grid: Grid, amplitude: float = 1.0, seed: int = 0) -> Tensor:
    """A smooth world field that vanishes beyond the borders: its formula at the voxels of a grid, (D, *shape)."""
    points = grid.points()
    return wave_at(points, grid, amplitude, seed).mT.reshape(grid.ndim, *grid.shape)


def wave_at(points: Tensor, grid: Grid, amplitude: float, seed: int = 0) -> Tensor:
    """Its formula at points (N, D): random waves under a window over the extent of the grid."""
    half = (points - grid.center) @ grid.direction / (grid.extent / 2)  # (N, D) in [-1, 1] inside
    window = torch.where(half.abs() < 1, torch.cos(np.pi / 2 * half) ** 2, 0).prod(1, keepdim=True)
    turns = 2 * uniform(grid.ndim, grid.ndim, seed=seed + 10)
    return amplitude * window * torch.cos(half @ turns + 3 * uniform(1, grid.ndim, seed=seed + 20))


def inner(grid: Grid, margin: int) -> tuple[slice, ...]:
    return (..., *(slice(margin, -margin),) * grid.ndim)


def length(shift: Tensor) -> float:
    """The longest vector."""
    return float(shift.norm(dim=0).max())


def rms(shift: Tensor) -> float:
    return float(shift.square().sum(0).mean().sqrt())


def scipy_compose(first: Tensor, second: Tensor) -> Tensor:
    """SciPy's linear interpolation with the nearest voxel beyond the border; its axes are z, y, x."""
    where = np.indices(first.shape[1:]).astype(float) + first.numpy()[::-1]
    return first + tensor(
        np.stack([ndimage.map_coordinates(c, where, order=1, mode="nearest") for c in second.numpy()])
    )


def linear_field(matrix: Tensor, grid: Grid) -> Tensor:
    """A (p - c) at the voxels of a grid."""
    return ((grid.points() - grid.center) @ matrix.mT).mT.reshape(grid.ndim, *grid.shape)


def contraction(dimension: int, seed: int = 3) -> Tensor:
    """A matrix whose flow leaves no voxel of a cube outside of it: so no border shows."""
    return -0.3 * torch.eye(dimension, dtype=torch.float64) + 0.05 * uniform(dimension, dimension, seed=seed)


def cube(dimension: int) -> Grid:
    return Grid((9,) * dimension, spacing=1.5, center=5.0)


# -- units ---------------------------------------------------------------------------------------------------------


@every_dimension
@few
@given(data=st.data())
def test_shifts_are_differences_of_indices(dimension: int, data: Any) -> None:
    items = data.draw(grids(dimension))
    values = [uniform(dimension, *grid.shape, seed=n) for n, grid in enumerate(items)]

    def found(field: Tensor, grid: Grid) -> tuple[Any, Any]:
        ends = grid.points() + field.flatten(1).mT
        moved = (grid.world_to_index(ends) - grid.world_to_index(grid.points())).mT.reshape(field.shape)
        shift = to_shift(field, grid)
        return (shift, from_shift(shift, grid)), (moved, field)

    law(found, each(values)[:-1], items, atol=1e-10)


# -- composition ---------------------------------------------------------------------------------------------------


@every_dimension
@every_dtype
def test_composition_is_that_of_scipy(dimension: int, dtype: torch.dtype) -> None:
    size = SIZES[dimension]
    first, second = (4 * uniform(dimension, *size, seed=seed).to(dtype) for seed in (1, 2))
    found = compose_shift(first, second)
    assert found.dtype == dtype
    expected = scipy_compose(first.double(), second.double())
    assert_close(found.double(), expected, atol=1e-4 if dtype == torch.float32 else 1e-12, rtol=0)


@every_dimension
def test_composition_in_a_batch_is_that_of_each(dimension: int) -> None:
    a, b = (2 * uniform(3, dimension, *SIZES[dimension], seed=seed) for seed in (1, 2))
    together = torch.func.vmap(compose_shift)(a, b)
    assert_close(together, torch.stack([scipy_compose(x, y) for x, y in zip(a, b, strict=True)]), atol=1e-12, rtol=0)


@every_dimension
@few
@given(data=st.data())
def test_linear_maps_compose_as_their_matrices(dimension: int, data: Any) -> None:
    """Linear interpolation of linear fields is exact, where it does not reach beyond the border."""
    items = data.draw(grids(dimension, low=5, high=5))
    eye = torch.eye(dimension, dtype=torch.float64)
    a, b = (0.05 * uniform(dimension, dimension, seed=seed) for seed in (1, 2))

    def found(grid: Grid) -> tuple[Any, Any]:
        together = fields.compose(linear_field(a, grid), linear_field(b, grid), grid)
        expected = linear_field((eye + b) @ (eye + a) - eye, grid)
        spacing = grid.spacing.min() / grid.spacing.max()  # the matrix in voxels may be larger by their ratio
        keep = inner(grid, 2)
        return together[keep] * spacing, expected[keep] * spacing

    law(found, items, atol=1e-9)


@every_dimension
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "plain"])
def test_a_step_before_a_map_is_what_its_formula_says(dimension: int, kernel: bool) -> None:
    """W s d(i) + u(i + s d(i)), with derivatives by all that is given, alone and in a batch."""
    domains = [oblique(SMALL[dimension]), oblique(SMALL[dimension], turn=-0.7, spacing=1.3)]
    scale = tensor(0.6)
    steps, fields_of = ([uniform(dimension, *grid.shape, seed=s + n) for n, grid in enumerate(domains)] for s in (0, 5))

    def found(d: Tensor, u: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        expected = (0.6 * grid.vectors_to_world @ d.flatten(1)).reshape(d.shape)
        return fields.compose_step(d, u, grid, scale), expected + compose_shift(0.6 * d, u) - 0.6 * d

    def of_spacing(d: Tensor, u: Tensor, spacing: Tensor, scale: Tensor) -> Tensor:
        grid = Grid(SMALL[dimension], spacing=spacing, direction=domains[0].direction)
        return fields.compose_step(d, u, grid, scale)

    with nullcontext() if kernel else without_kernels():
        law(found, steps, fields_of, domains, atol=1e-12)
        given = (0.3 * steps[0], fields_of[0], domains[0].spacing.clone(), scale)
        assert gradcheck(of_spacing, tuple(leaf.clone().requires_grad_() for leaf in given))


@every_dimension
def test_composition_associates_to_the_error_of_interpolation(dimension: int) -> None:
    errors = []
    for scale in (1, 2):
        grid = oblique(tuple(scale * n for n in (24, 20, 16)[:dimension]), spacing=1 / scale)
        a, b, c = (wave(grid, 1.5, seed) for seed in (0, 1, 2))
        left = fields.compose(fields.compose(a, b, grid), c, grid)
        errors.append(rms(left - fields.compose(a, fields.compose(b, c, grid), grid)))
    assert 0 < errors[0] < 0.02
    assert errors[1] < errors[0] / 3  # second order in the spacing


@every_dimension
def test_a_field_at_points_and_on_another_grid_is_that_of_images(dimension: int) -> None:
    grid, onto = oblique(SIZES[dimension]), oblique(SIZES[dimension][::-1], spacing=0.9, turn=0.5, mirror=False)
    field = wave(grid)
    image = Image(field, grid)
    assert_close(fields.sample_field(field, grid, onto.points()), image.sample(onto.points()), atol=0, rtol=0)
    assert_close(fields.resample_field(field, grid, onto), image.resample(onto).data, atol=1e-12, rtol=0)
    zeros = fields.resample_field(field + 1, grid, Grid((2,) * dimension, center=1e3), padding="zeros")
    assert_close(zeros, torch.zeros_like(zeros))


# -- inverses ------------------------------------------------------------------------------------------------------


@every_dimension
def test_fields_beyond_the_border_are_what_the_padding_says(dimension: int) -> None:
    """And points of less precision lose no more than their own."""
    grid = oblique(SMALL[dimension])
    field = uniform(dimension, *grid.shape)
    wide = grid.pad(1)
    inside = (..., *(slice(1, -1),) * dimension)
    for padding, ring in (("border", None), ("zeros", 0.0), (7.0, 7.0)):
        found = fields.resample_field(field, grid, wide, padding=padding)
        assert_close(found[inside], field, atol=1e-9, rtol=0)
        if ring is not None:
            assert_close(found[:, *(0,) * dimension], torch.full((dimension,), ring).double(), atol=1e-9, rtol=0)
        at = fields.sample_field(field, grid, wide.points(), padding=padding)
        assert_close(at.mT.reshape(found.shape), found, atol=1e-9, rtol=0)
    few_digits = wide.points().float()
    at = fields.sample_field(field, grid, few_digits)
    assert torch.equal(at, fields.sample_field(field, grid, few_digits.double()))


@every_dimension
def test_the_inverse_of_a_linear_map_is_that_of_its_matrix(dimension: int) -> None:
    grid, matrix = cube(dimension), -contraction(dimension)  # its inverse is a contraction
    eye = torch.eye(dimension, dtype=torch.float64)
    inverse, residual = fields.invert(linear_field(matrix, grid), grid)
    assert_close(inverse, linear_field(torch.linalg.inv(eye + matrix) - eye, grid), atol=1e-12, rtol=0)
    assert residual < 1e-12


STRONG = {1: 2.4, 2: 2.2, 3: 2.2}  # rms voxels: the derivative exceeds 1, the determinant stays positive


def strong(dimension: int, dtype: torch.dtype = torch.float64, factor: float = 1.0) -> Tensor:
    grid, generator = Grid((20,) * dimension), torch.Generator().manual_seed(3)
    amplitude = factor * STRONG[dimension]
    return fields.random_field(grid, amplitude=amplitude, smoothness=5, generator=generator, dtype=dtype)


@every_dimension
@every_dtype
def test_a_strong_field_is_inverted_to_rounding(dimension: int, dtype: torch.dtype) -> None:
    shift = strong(dimension, dtype)
    assert 0 < fields.determinant(shift, Grid((20,) * dimension)).min() < 0.7
    tight = 2e-5 if dtype == torch.float32 else 1e-12
    inverse, residual = invert_shift(shift, iterations=20)
    assert inverse.dtype == residual.dtype == dtype
    assert residual < tight
    assert length(scipy_compose(inverse.double(), shift.double())) < tight


@every_dimension
def test_more_iterations_leave_no_more(dimension: int) -> None:
    shift = strong(dimension, factor=1.5)
    left = [float(invert_shift(shift, iterations=count).residual) for count in (*range(12), 400)]
    assert left[0] == pytest.approx(length(shift), rel=1e-12)  # none at all is the identity
    assert all(after <= before for before, after in itertools.pairwise(left))
    assert left[2] < left[0]
    assert left[-1] < 1e-12


def test_newton_converges_where_the_fixed_point_iteration_does_not() -> None:
    x = torch.arange(20.0, dtype=torch.float64)
    shift = (1.5 * (x - 9.5))[None]  # |Du| > 1: each fixed-point step leads further away
    inverse, residual = invert_shift(shift)
    assert_close(inverse[0], (1 / 2.5 - 1) * (x - 9.5), atol=1e-12, rtol=0)
    assert residual < 1e-12


@pytest.mark.parametrize(("dimension", "seed", "amplitude"), [(1, 4, 2.0), (2, 1, 2.5), (2, 6, 3.0)])
def test_steps_that_overshoot_are_halved(dimension: int, seed: int, amplitude: float) -> None:
    """These have an inverse that full steps of Newton's method do not find."""
    grid, generator = Grid((20,) * dimension), torch.Generator().manual_seed(seed)
    shift = fields.random_field(grid, amplitude=amplitude, smoothness=5, generator=generator, dtype=torch.float64)
    assert fields.determinant(shift, grid).min() > 0.1
    inverse, residual = invert_shift(shift, iterations=30)
    assert max(residual, length(scipy_compose(inverse, shift))) < 1e-12


def folded_between_voxels() -> Tensor:
    """Two rows of which one voxel steps over its neighbour, while those around it stay in order (2, 5, 8)."""
    shift = torch.zeros(2, 5, 8, dtype=torch.float64)
    shift[0, 2, 3:5] = tensor([0.6, -0.6])
    return shift


@every_dimension
def test_a_fold_has_several_origins_and_the_residual_does_not_say_so(dimension: int) -> None:
    size, grid = (9,) * dimension, Grid((9,) * dimension)
    shift = torch.zeros(dimension, *size, dtype=torch.float64)
    shift[0, ..., 4] = 3.0
    shift[0, ..., 5] = 7.0
    shift[0, ..., 6] = -3.0
    inverse, residual = invert_shift(shift.clone(), iterations=200)
    assert residual == pytest.approx(length(scipy_compose(inverse, shift)), abs=1e-12)
    assert residual < 1e-12  # a continuous map reaches every place
    assert fields.folds(shift, grid) > 0
    assert fields.folded_cells(shift, grid) > 0
    assert fields.inverse_consistency(inverse, shift, grid).largest < 1e-12
    assert fields.inverse_consistency(shift, inverse, grid).largest > 0.5  # voxels 6 come back as others


def test_cells_fold_that_differences_across_two_voxels_do_not_see() -> None:
    shift = folded_between_voxels()
    assert fields.folds(shift, Grid((8, 5))) == 0
    assert fields.folded_cells(shift, Grid((8, 5))) == 2  # above and below


@every_dimension
def test_folded_cells_are_those_where_the_interpolated_map_turns_over(dimension: int) -> None:
    """Against the determinants of SciPy's linear interpolation, looked at just inside of each corner."""
    total = 0
    for seed in range(5):
        grid = oblique(SMALL[dimension], turn=0.3 * seed)
        shift = (0.9 if dimension == 1 else 0.5) * uniform(dimension, *grid.shape, seed=seed)
        eps, folded = 1e-6, 0
        for cell in itertools.product(*(range(n - 1) for n in grid.shape)):
            least = np.inf
            for corner in itertools.product((0, 1), repeat=dimension):
                inner = np.array(cell) + np.where(corner, 1 - 10 * eps, 10 * eps)
                columns = []
                for axis in range(dimension):
                    both = np.stack([inner - eps * np.eye(dimension)[axis], inner + eps * np.eye(dimension)[axis]], 1)
                    ends = [
                        both[k] + ndimage.map_coordinates(shift[-1 - k].numpy(), both, order=1)
                        for k in range(dimension)
                    ]
                    columns.append(np.array([(e[1] - e[0]) / (2 * eps) for e in ends]))
                least = min(least, np.linalg.det(np.stack(columns, 1)))
            folded += least <= 0
        assert folded == fields.folded_cells(from_shift(shift, grid), grid)
        total += folded
    assert total > 0


@pytest.mark.parametrize(
    ("size", "amplitude", "smoothness", "seed"),
    [((48, 48), 5.0, 3.0, 1), ((48, 48), 5.0, 3.0, 2), ((48, 48), 6.0, 4.0, 3), ((20, 20, 20), 3.5, 2.5, 3)],
)
def test_maps_that_squeeze_are_inverted_though_newton_alone_is_stuck(
    size: tuple[int, ...], amplitude: float, smoothness: float, seed: int
) -> None:
    """Flows whose determinant goes from 0.01 to 30: with halved steps alone half a voxel or more is left."""
    grid, generator = Grid(size), torch.Generator().manual_seed(seed)
    velocity = fields.random_field(grid, amplitude=1.0, smoothness=smoothness, generator=generator, dtype=torch.float64)
    shift = exp_shift(amplitude * velocity, 7, midpoint=True)
    assert 0 < fields.determinant(shift, grid).min() < 0.1
    inverse, residual = invert_shift(shift, iterations=300)
    assert max(residual, length(scipy_compose(inverse, shift))) < 1e-10


def test_voxels_are_inverted_alone_as_together() -> None:
    """Pairs that need few iterations and pairs that need many: none waits for, or stops with, another."""
    easy, hard = 0.1 * strong(2), strong(2, factor=2.0)
    together = torch.func.vmap(lambda u: invert_shift(u, iterations=60))(torch.stack([easy, hard, easy]))
    for number, one in enumerate((easy, hard, easy)):
        alone = invert_shift(one, iterations=60)
        assert_close(together.field[number], alone.field, atol=1e-12, rtol=0)
        assert_close(together.residual[number], alone.residual, atol=1e-12, rtol=0)


# -- there and back ------------------------------------------------------------------------------------------------


@every_dimension
@few
@given(data=st.data())
def test_two_translations_miss_by_their_sum(dimension: int, data: Any) -> None:
    (grid,) = data.draw(grids(dimension, 1, low=4, high=6))
    ones = torch.ones(dimension, *grid.shape, dtype=torch.float64)
    a, b = (0.9 * uniform(dimension, seed=seed) for seed in (1, 2))  # voxels
    there, back = (from_shift(ones * c.reshape(-1, *(1,) * dimension), grid) for c in (a, b))
    found = fields.inverse_consistency(there, back, grid)
    voxels, world = (a + b).norm(), (grid.vectors_to_world @ (a + b)).norm()
    for value, expected in zip(found, (world, world, voxels, voxels), strict=True):
        assert_close(value, expected, atol=1e-9, rtol=1e-9)


@every_dimension
def test_there_and_back_is_that_of_scipy(dimension: int) -> None:
    grid = oblique(SIZES[dimension])
    u, w = wave(grid, 2.0), -wave(grid, 1.7, seed=1)
    shift, back = to_shift(u, grid), to_shift(w, grid)
    ends = np.indices(grid.shape) + shift.numpy()[::-1]
    inside = np.all([(e >= 0) & (e <= n - 1) for e, n in zip(ends, grid.shape, strict=True)], 0)
    away = scipy_compose(shift, back)[:, inside]
    world = (grid.vectors_to_world @ away).norm(dim=0)
    found = fields.inverse_consistency(u, w, grid)
    expected = world.mean(), world.max(), away.norm(dim=0).mean(), away.norm(dim=0).max()
    for value, number in zip(found, expected, strict=True):
        assert_close(value, number, atol=1e-12, rtol=1e-9)
    assert 0 < inside.sum() < inside.size or dimension == 1


def test_where_nothing_stays_there_is_no_way_back() -> None:
    away = torch.full((2, 3, 4), 50.0)
    assert all(bool(value.isnan()) for value in fields.inverse_consistency(away, -away, GRID))
    away[:, 1, 1] = torch.nan
    away[:, 0, 0] = 0
    assert all(bool(value.isnan()) for value in fields.inverse_consistency(away, -away, GRID))


def test_a_voxel_on_the_border_stays_and_one_is_enough() -> None:
    """By hand: of two voxels half a unit apart the first goes nowhere and comes back by 3, the other leaves."""
    grid = Grid((2,), spacing=0.5)
    there, back = torch.tensor([[0.0, 0.25]]), torch.tensor([[3.0, 9.0]])
    assert [float(value) for value in fields.inverse_consistency(there, back, grid)] == [3.0, 3.0, 6.0, 6.0]
    still = torch.zeros(1, 2)
    assert [float(value) for value in fields.inverse_consistency(still, back, grid)] == [6.0, 9.0, 12.0, 18.0]
    assert [float(value) for value in fields.inverse_consistency(still, -back, grid)] == [6.0, 9.0, 12.0, 18.0]


@every_dimension
def test_the_inverse_of_the_inverse_is_the_field(dimension: int) -> None:
    errors = []
    for scale in (1, 2):
        grid = oblique(tuple(scale * n for n in (24, 20, 16)[:dimension]), spacing=1 / scale)
        field = wave(grid, 1.5)
        again = fields.invert(fields.invert(field, grid).field, grid).field
        errors.append(rms(again - field))
        assert length(field) > 0.8
    assert errors[0] < 0.02
    assert errors[1] < errors[0] / 2.5  # the error of the interpolation


# -- flows ---------------------------------------------------------------------------------------------------------


@every_dimension
@every_dtype
def test_the_flow_of_a_linear_field_is_that_of_its_matrix(dimension: int, dtype: torch.dtype) -> None:
    """Linear interpolation is exact here, so the formula of scaling and squaring holds to rounding."""
    grid, matrix, eye = cube(dimension), contraction(dimension), torch.eye(dimension, dtype=torch.float64)
    velocity = linear_field(matrix, grid).to(dtype)
    atol = 1e-5 if dtype == torch.float32 else 1e-12
    errors: dict[bool, list[float]] = {False: [], True: []}
    for steps, midpoint in itertools.product((0, 1, 3, 4), (False, True)):
        h = 2.0**-steps
        first = eye + h * matrix + (h * h / 2 * matrix @ matrix if midpoint else 0)
        expected = linear_field(torch.linalg.matrix_power(first, 2**steps) - eye, grid)
        shift = exp_shift(to_shift(velocity, grid), steps, midpoint=midpoint)
        assert shift.dtype == dtype
        assert_close(from_shift(shift, grid).double(), expected, atol=atol, rtol=0)
        truth = linear_field(torch.linalg.matrix_exp(matrix) - eye, grid)
        errors[midpoint].append(length(from_shift(shift, grid).double() - truth))
    if dtype == torch.float64:
        assert errors[False][2] / errors[False][3] == pytest.approx(2, rel=0.1)  # steps 3 and 4
        assert errors[True][2] / errors[True][3] == pytest.approx(4, rel=0.1)
        found = fields.exp(velocity, grid, squarings=10)
        assert_close(found, linear_field(torch.linalg.matrix_exp(matrix) - eye, grid), atol=1e-6, rtol=0)


@every_dimension
def test_flows_are_those_of_an_ode_solver(dimension: int) -> None:
    """To the error of the interpolation, which falls with the spacing."""
    errors = []
    for scale in (1, 2):
        grid = oblique(tuple(scale * n for n in (16, 14, 10)[:dimension]), spacing=1 / scale)
        points = grid.points()[:: 1 if dimension < 3 else 7 * scale]

        def right(_: float, flat: Any, grid: Grid = grid) -> Any:
            where = tensor(flat).reshape(-1, grid.ndim)
            return wave_at(where, grid, 2.0).flatten().numpy()

        solved = integrate.solve_ivp(right, (0, 1), points.flatten().numpy(), rtol=1e-6, atol=1e-6).y[:, -1]
        truth = tensor(solved).reshape(points.shape) - points
        found = fields.exp(wave(grid, 2.0), grid).flatten(1).mT[:: 1 if dimension < 3 else 7 * scale]
        assert truth.norm(dim=1).max() > 1
        errors.append(float((found - truth).square().sum(1).mean().sqrt()))
    assert errors[0] < 0.03
    assert errors[1] < errors[0] / 2.5


@every_dimension
def test_the_flow_of_nothing_is_the_identity(dimension: int) -> None:
    grid = oblique(SIZES[dimension])
    zero = torch.zeros(dimension, *grid.shape, dtype=torch.float64)
    for steps in (None, 0, 3):
        assert torch.equal(fields.exp(zero, grid, squarings=steps), zero)
    assert torch.equal(fields.invert(zero, grid).field.abs(), zero)
    assert fields.log(zero, grid).residual == 0


@every_dimension
def test_a_flow_back_undoes_the_flow(dimension: int) -> None:
    grid = oblique((24, 20, 16)[:dimension])
    shift = to_shift(wave(grid, 2.0), grid)

    def left(steps: int, midpoint: bool) -> float:
        there, back = (exp_shift(v, steps, midpoint=midpoint) for v in (shift, -shift))
        return rms(compose_shift(there, back))

    plain = [left(steps, False) for steps in range(6)]
    assert rms(shift) > 0.5
    assert all(b < 0.75 * a for a, b in itertools.pairwise(plain[:3]))
    assert max(plain[4:]) < 0.03
    assert max(left(steps, True) for steps in (2, 3, 4, 5)) < 0.02


def test_the_number_of_squarings_brings_all_vectors_below_half_a_voxel() -> None:
    grid = Grid((4, 3), spacing=(2.0, 1.0))
    for voxels, expected in ((0.0, 0), (0.49, 0), (0.5, 1), (0.99, 1), (1.0, 2), (3.9, 3), (100.0, 8)):
        velocity = torch.zeros(2, 3, 4)
        velocity[0, 1, 2] = 2 * voxels  # world units
        assert fields.needed_squarings(velocity, grid) == expected
    velocity[1, 0, 0] = torch.nan
    velocity[1, 0, 1] = torch.inf
    assert fields.needed_squarings(velocity, grid) == 8
    assert fields.needed_squarings(velocity.requires_grad_(), grid) == 8
    assert fields.needed_squarings(torch.full((2, 3, 4), torch.nan), grid) == 0
    assert fields.needed_squarings(torch.tensor([[torch.inf, 5.0, 0.0, 0.0]]), Grid((4,))) == 4
    for vector, expected in ((0.4, 0.0), 0), ((0.4, 0.4), 1):  # voxels: one by one, however many
        shift = torch.tensor(vector).reshape(2, 1, 1).expand(2, 3, 4)
        assert fields.needed_squarings(from_shift(shift, grid), grid) == expected
    assert fields.needed_squarings(torch.full((2, 3, 4), 2.0**90), grid) == 92  # their squares overflow float32
    assert_close(
        fields.exp(velocity[:, :2, 2:].detach(), Grid((2, 2)), squarings=None).isfinite().all(), torch.tensor(True)
    )


@every_dimension
def test_a_flow_on_a_coarser_grid_is_nearly_that_on_the_grid(dimension: int) -> None:
    grid = oblique((24, 20, 16)[:dimension])
    velocity = wave(grid, 1.5)
    fine = fields.exp(velocity, grid, squarings=4)
    assert_close(fields.exp(velocity, grid, squarings=4, on=grid), fine, atol=1e-10, rtol=0)
    coarse = fields.exp(velocity, grid, on=grid.downsample())
    assert coarse.shape == fine.shape
    assert 1e-4 < rms(coarse - fine) < 0.12 * rms(fine)


@every_dimension
def test_the_logarithm_undoes_the_exponential(dimension: int) -> None:
    grid = oblique((24, 20, 16)[:dimension])
    velocity = wave(grid, 2.0)
    displacement = fields.exp(velocity, grid)
    found = fields.log(displacement, grid)
    start = length(to_shift(fields.exp(displacement, grid) - displacement, grid))  # what v = u leaves
    again = fields.exp(found.velocity, grid, squarings=fields.needed_squarings(displacement, grid) + 1)
    assert found.residual == pytest.approx(length(to_shift(again - displacement, grid)), rel=1e-9)
    assert found.residual < 0.25 * start
    assert rms(found.velocity - velocity) < 0.3 * rms(displacement - velocity)
    assert rms(found.velocity - velocity) < 0.02


@every_dimension
def test_higher_terms_bring_the_logarithm_nearer(dimension: int) -> None:
    grid = oblique((24, 20, 16)[:dimension])
    displacement = fields.exp(wave(grid, 2.0), grid)
    one, two = (fields.log(displacement, grid, iterations=1, terms=terms).residual for terms in (1, 2))
    assert two < one
    none = fields.log(displacement, grid, iterations=0)
    assert torch.equal(none.velocity, displacement)
    assert none.residual > one


@every_dimension
@pytest.mark.parametrize("amplitude", [0.5, 4.0])
def test_of_the_velocities_on_the_way_the_one_that_misses_least_is_returned(dimension: int, amplitude: float) -> None:
    """As a whole, and not voxel by voxel."""
    grid = oblique(SMALL[dimension])
    velocity = displacement = amplitude * pair(grid)[0]
    missed: list[tuple[float, Tensor]] = []
    for _ in range(4):
        missing = fields.compose(displacement, fields.exp(-velocity, grid, squarings=5), grid)
        missed.append((length(to_shift(missing, grid)), velocity))
        velocity = fields.bch(velocity, missing, grid)
    best = min(missed, key=lambda item: item[0])[1]
    assert torch.equal(fields.log(displacement, grid, iterations=3, squarings=5).velocity, best)


@every_dimension
def test_what_is_not_given_has_the_values_that_are_told(dimension: int) -> None:
    grid = oblique((12, 10, 8)[:dimension])
    u, v = wave(grid, 2.0), wave(grid, seed=1)
    steps = fields.needed_squarings(u, grid) + 1
    told = fields.log(u, grid, iterations=5, terms=2, squarings=steps)
    assert equal_bits(fields.log(u, grid), told)
    others = ({"iterations": 1}, {"terms": 1}, {"squarings": steps + 1})
    assert not any(equal_bits(fields.log(u, grid, **other), told) for other in others)
    assert_close(fields.bch(u, v, grid), u + v + fields.lie_bracket(u, v, grid) / 2)
    assert equal_bits(fields.exp(u, grid), fields.exp(u, grid, squarings=steps - 1))
    assert not equal_bits(fields.invert(u, grid, iterations=1), fields.invert(u, grid))
    shift = to_shift(u, grid)
    assert torch.equal(exp_shift(shift, 1), compose_shift(shift / 2, shift / 2))
    assert not fields.log(u.clone().requires_grad_(), grid).residual.requires_grad


# -- the Lie algebra -----------------------------------------------------------------------------------------------


def commutator(a: Tensor, b: Tensor) -> Tensor:
    return a @ b - b @ a


@pytest.mark.parametrize("dimension", [2, 3])
@few
@given(data=st.data())
def test_the_bracket_of_linear_fields_is_the_commutator(dimension: int, data: Any) -> None:
    items = data.draw(grids(dimension, low=2, high=4))
    a, b, c = (uniform(dimension, dimension, seed=seed) for seed in (1, 2, 3))

    def found(grid: Grid) -> tuple[Any, Any]:
        v, w, z = (linear_field(matrix, grid) for matrix in (a, b, c))

        def bracket(left: Tensor, right: Tensor) -> Tensor:
            return fields.lie_bracket(left, right, grid)

        jacobi = bracket(v, bracket(w, z)) + bracket(w, bracket(z, v)) + bracket(z, bracket(v, w))
        found = bracket(v, w), bracket(w, v), jacobi
        expected = linear_field(commutator(a, b), grid)
        return found, (expected, -expected, torch.zeros_like(v))

    law(found, items, atol=1e-9)


@pytest.mark.parametrize("dimension", [2, 3])
def test_the_series_is_that_of_the_logarithm_of_matrices(dimension: int) -> None:
    """What each order leaves falls by its own power."""
    grid = oblique((3,) * dimension)
    a, b = (uniform(dimension, dimension, seed=seed) for seed in (1, 2))
    for terms in (1, 2, 3, 4):
        errors = []
        for scale in (0.1, 0.05):
            truth = linalg.logm(linalg.expm(scale * a.numpy()) @ linalg.expm(scale * b.numpy()))
            v, w = linear_field(scale * a, grid), linear_field(scale * b, grid)
            errors.append(length(fields.bch(v, w, grid, terms=terms) - linear_field(tensor(truth), grid)))
        assert errors[0] / errors[1] == pytest.approx(2 ** (terms + 1), rel=0.15), terms


@pytest.mark.parametrize("dimension", [2, 3])
def test_the_flow_of_the_series_is_one_flow_after_the_other(dimension: int) -> None:
    grid = oblique((24, 20, 16)[:dimension])
    v, w = wave(grid, 1.0, seed=0), wave(grid, 1.0, seed=1)
    both = fields.compose(fields.exp(w, grid), fields.exp(v, grid), grid)  # w acts first
    left = [rms(fields.exp(fields.bch(v, w, grid, terms=terms), grid) - both) for terms in (1, 2, 3)]
    assert left[1] < 0.5 * left[0]
    assert left[2] < 1.1 * left[1]
    assert rms(fields.exp(fields.bch(w, v, grid), grid) - both) > 1.5 * left[0]  # the other sign is worse than none


# -- derivatives ---------------------------------------------------------------------------------------------------


@every_dimension
@few
@given(data=st.data())
def test_the_derivative_of_a_parabola_is_exact_up_to_the_border(dimension: int, data: Any) -> None:
    items = data.draw(grids(dimension, low=3, high=5))
    linear = uniform(dimension, dimension, seed=1)
    square = 0.1 * uniform(dimension, dimension, dimension, seed=2)
    square = square + square.mT

    def found(grid: Grid) -> tuple[Any, Any]:
        points = grid.points() - grid.center
        values = points @ linear.mT + 0.5 * torch.einsum("ckm,nk,nm->nc", square, points, points)
        slope = linear + torch.einsum("ckm,nm->nck", square, points)  # (N, D, D)
        field = values.mT.reshape(dimension, *grid.shape)
        eye = torch.eye(dimension, dtype=torch.float64)
        matrices = fields.jacobian(field, grid).flatten(2).movedim(2, 0)
        dets, divergence = fields.determinant(field, grid).flatten(), fields.divergence(field, grid).flatten()
        det = torch.stack([torch.linalg.det(eye + each) for each in slope])
        return (matrices, dets, divergence), (eye + slope, det, slope.diagonal(dim1=1, dim2=2).sum(1))

    law(found, items, atol=1e-8)


@every_dimension
def test_an_axis_of_two_voxels_has_a_difference_and_one_of_one_has_none(dimension: int) -> None:
    for n in (1, 2):
        size = (n,) + (4,) * (dimension - 1)
        grid = Grid(size, spacing=1.5)
        matrix = uniform(dimension, dimension, seed=4)
        slope = fields.jacobian(linear_field(matrix, grid), grid).flatten(2)[..., 0] - torch.eye(dimension)
        expected = matrix.clone()
        if n == 1:
            expected[:, 0] = 0
        assert_close(slope, expected, atol=1e-12, rtol=0)


def test_the_curl_of_a_turn_is_twice_its_rate() -> None:
    for mirror in (False, True):
        flat, solid = oblique((4, 5), mirror=mirror), oblique((4, 5, 3), mirror=mirror)
        turn = tensor([[0.0, -0.3], [0.3, 0.0]])
        assert_close(fields.curl(linear_field(turn, flat), flat), torch.full((5, 4), 0.6, dtype=torch.float64))
        axis = tensor([0.2, -0.5, 0.4])
        cross = torch.linalg.cross(axis.expand(solid.numel, 3), solid.points()).mT.reshape(3, *solid.shape)
        expected = (2 * axis).reshape(3, 1, 1, 1).expand(3, *solid.shape)
        assert_close(fields.curl(cross, solid), expected, atol=1e-12, rtol=0)


def test_a_curl_has_no_divergence() -> None:
    grid = oblique((6, 5, 7))
    field = fields.random_field(grid, amplitude=1.0, smoothness=1.0, dtype=torch.float64)
    source = fields.divergence(fields.curl(field, grid), grid)
    assert fields.divergence(field, grid).abs().max() > 0.1
    assert source.abs().max() < 1e-12


def test_an_axis_of_one_voxel_folds_nothing() -> None:
    """Cells of a line folded are those of a plane and of a space that are one voxel wide."""
    line = torch.tensor([[0.0, 0.3, -1.2, -1.2, 0.4, -0.9]])
    expected = int(fields.folded_cells(line, Grid((6,))))
    assert expected == 2
    flat = torch.stack([line, torch.ones(1, 6)])  # (2, 1, 6)
    assert int(fields.folded_cells(flat, Grid((6, 1)))) == expected
    assert (
        int(fields.folded_cells(torch.stack([flat[:1], 0 * flat[:1], flat[1:]]).squeeze(1)[:, None], Grid((6, 1, 1))))
        == expected
    )


def test_voxels_none_of_which_has_arrived_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    shift = 2 * gaussian(uniform(2, 12, 10), 1.5)
    together = invert_shift(shift)
    monkeypatch.setattr(inverse, "TOGETHER", 0)
    alone = invert_shift(shift)
    assert float(together.residual) < 1e-12 and float(alone.residual) < 1e-12
    assert_close(alone.field, together.field, atol=1e-10, rtol=0)


@every_dimension
def test_volumes_multiply_under_composition(dimension: int) -> None:
    errors = []
    for scale in (1, 2):
        grid = oblique(tuple(scale * n for n in (24, 20, 16)[:dimension]), spacing=1 / scale)
        a, b = wave(grid, 1.5, 0), wave(grid, 1.5, 1)
        moved = grid.points() + a.flatten(1).mT
        second = fields.sample_field(fields.determinant(b, grid).expand(dimension, *grid.shape), grid, moved)[:, 0]
        product = fields.determinant(a, grid).flatten() * second
        found = fields.determinant(fields.compose(a, b, grid), grid).flatten()
        errors.append(float((found - product).square().mean().sqrt()))
    assert errors[0] < 0.1
    assert errors[1] < errors[0] / 1.7


# -- statistics ----------------------------------------------------------------------------------------------------


@every_dimension
def test_statistics_are_those_of_numpy(dimension: int) -> None:
    grid = oblique(SIZES[dimension])
    field = fields.random_field(
        grid, amplitude=2.0, smoothness=1.0, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    det = fields.determinant(field, grid).numpy()
    mask = torch.zeros(1, *grid.shape)
    mask[0, ..., 2:7] = 1
    for inside, chosen in ((np.ones(grid.shape, bool), None), (mask[0].numpy() > 0, mask)):
        found = fields.statistics(field, grid, mask=chosen)
        values = det[inside]
        assert 0 < (values <= 0).mean() < 0.5 or chosen is not None
        assert float(found.folds) == pytest.approx((values <= 0).mean())
        assert float(found.min_determinant) == pytest.approx(values.min())
        assert float(found.max_determinant) == pytest.approx(values.max())
        assert float(found.sd_log_determinant) == pytest.approx(np.log(values[values > 0]).std())
        assert float(found.max_displacement) == pytest.approx(np.linalg.norm(field.numpy(), axis=0)[inside].max())
    assert int(fields.folds(field, grid)) == (det <= 0).sum()


@every_dimension
def test_a_mirrored_axis_folds_everywhere(dimension: int) -> None:
    grid = cube(dimension)
    mirror = torch.zeros(dimension, dimension, dtype=torch.float64)
    mirror[0, 0] = -2
    assert int(fields.folds(linear_field(mirror, grid), grid)) == grid.numel
    assert int(fields.folds(0 * linear_field(mirror, grid), grid)) == 0
    flat = linear_field(mirror / 2, grid)  # all of an axis goes to one place: a determinant of 0 is a fold
    assert int(fields.folds(flat, grid)) == grid.numel


def test_what_is_not_a_number_is_said() -> None:
    grid = Grid((6, 5))
    field = 0.1 * uniform(2, 5, 6)
    field[0, 2, 3] = torch.nan
    lost = int(fields.determinant(field, grid).isnan().sum())
    assert 0 < lost < 10
    assert int(fields.folds(field, grid)) == lost
    found = fields.statistics(field, grid)
    assert all(bool(value.isnan()) for value in found[1:])
    assert float(found.folds) == pytest.approx(lost / 30)
    away = torch.ones(1, 5, 6)
    away[..., 1:] = 0
    assert all(bool(value.isfinite()) for value in fields.statistics(field, grid, mask=away))
    assert all(bool(value.isnan()) for value in fields.statistics(field, grid, mask=torch.zeros(1, 5, 6)))
    assert fields.invert(field, grid).residual.isnan()
    assert fields.invert(field, grid).field.isnan().any()
    assert fields.exp(field, grid).isnan().any()
    assert fields.exp(field, grid).isfinite().any()
    assert fields.log(field, grid).residual.isnan()


# -- fields with a formula -----------------------------------------------------------------------------------------


@every_dimension
@few
@given(data=st.data())
def test_an_affine_field_moves_points_as_its_matrix(dimension: int, data: Any) -> None:
    items = data.draw(grids(dimension))
    matrix = torch.eye(dimension + 1, dtype=torch.float64)
    matrix[:dimension] += 0.3 * uniform(dimension, dimension + 1)

    def found(grid: Grid) -> tuple[Any, Any]:
        field = fields.affine_field(matrix, grid, dtype=torch.float64)
        ones = torch.ones(grid.numel, 1, dtype=torch.float64)
        moved = torch.cat([grid.points(), ones], 1) @ matrix.mT
        return field.flatten(1).mT, moved[:, :dimension] - grid.points()

    law(found, items, atol=1e-9)
    assert fields.affine_field(matrix, items[0]).dtype == torch.float32


@every_dimension
def test_a_random_field_is_seeded_centred_and_as_large_as_asked(dimension: int) -> None:
    grid = oblique(SIZES[dimension])

    def make(seed: int, **options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return fields.random_field(grid, amplitude=2.5, smoothness=2.0, generator=generator, **options)

    field = make(1, dtype=torch.float64)
    assert rms(field) == pytest.approx(2.5, rel=1e-12)
    assert field.flatten(1).mean(1).abs().max() < 1e-12
    assert torch.equal(field, make(1, dtype=torch.float64))
    assert not torch.equal(field, make(2, dtype=torch.float64))
    assert_close(make(1), field.float())
    one = fields.random_field(Grid((1,) * dimension), amplitude=1.0, smoothness=1.0)
    assert torch.equal(one, torch.zeros_like(one))


@pytest.mark.parametrize("smoothness", [2.5, 4.0])
def test_a_random_field_is_as_smooth_as_asked_in_the_world(smoothness: float) -> None:
    """Of white noise under a Gaussian, mean (df/dx)^2 / mean f^2 is 1 / (2 sigma^2), along any axis."""
    grid = Grid((160, 120), spacing=(0.8, 1.2))
    field = fields.random_field(
        grid, amplitude=1.0, smoothness=smoothness, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    slope = fields.jacobian(field, grid) - torch.eye(2, dtype=torch.float64).reshape(2, 2, 1, 1)
    rough = slope.square().mean((2, 3)).sum(0) / field.square().mean((1, 2)).sum()
    assert_close(rough, torch.full((2,), 1 / (2 * smoothness**2), dtype=torch.float64), rtol=0.15, atol=0)


# -- storage and batches -------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Callable[[Tensor, Tensor, Grid], Any]] = {
    "compose": lambda u, v, g: fields.compose(u, v, g),
    "invert": lambda u, v, g: fields.invert(u, g),
    "exp": lambda u, v, g: fields.exp(u, g, squarings=3),
    "log": lambda u, v, g: fields.log(u, g, iterations=2, terms=3, squarings=2),
    "bch": lambda u, v, g: fields.bch(u, v, g, terms=4),
    "jacobian": lambda u, v, g: fields.jacobian(u, g).flatten(0, 1),
    "determinant": lambda u, v, g: fields.determinant(u, g)[None],
    "divergence": lambda u, v, g: fields.divergence(u, g)[None],
    "statistics": lambda u, v, g: fields.statistics(u, g),
    "folds": lambda u, v, g: fields.folds(u, g),
    "folded_cells": lambda u, v, g: fields.folded_cells(u, g),
    "inverse_consistency": lambda u, v, g: fields.inverse_consistency(u, v, g),
    "curl": lambda u, v, g: fields.curl(u, g) if g.ndim == 3 else fields.curl(u, g)[None],
}
cases = [(name, d) for name in EVERYTHING for d in (1, 2, 3) if name != "curl" or d > 1]
everything = pytest.mark.parametrize(("name", "dimension"), cases)


def pair(grid: Grid, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two rough fields of about a voxel."""
    size = 0.5 * float(grid.spacing.min())
    return tuple(size * uniform(grid.ndim, *grid.shape, seed=seed + number) for number in (1, 2))  # type: ignore[return-value]


@everything
def test_results_do_not_depend_on_how_a_field_is_stored(name: str, dimension: int) -> None:
    grid = oblique(SMALL[dimension])
    u, v = pair(grid)
    function = EVERYTHING[name]
    plain = function(u, v, grid)
    ways = list(storages(dimension))
    for order, flips in ways[:: 1 if dimension < 3 else 7]:
        one, two = stored(Image(u, grid), order, flips), stored(Image(v, grid), order, flips)
        found = function(one.data, two.data, one.grid)
        parts = zip(*((x,) if isinstance(x, Tensor) else x for x in (found, plain)), strict=True)
        for a, b in parts:
            expected = stored(Image(b, grid), order, flips).data if b.ndim == dimension + 1 else b
            assert_close(a, expected, atol=1e-9, rtol=0)


@everything
@every_dtype
def test_a_batch_with_grids_of_its_own_is_each_of_its_fields(name: str, dimension: int, dtype: torch.dtype) -> None:
    items = [oblique(SMALL[dimension], spacing=s, turn=t) for s, t in ((1.0, 0.4), (0.8, 1.0), (1.2, -0.3))]
    pairs = [tuple(field.to(dtype) for field in pair(grid, seed)) for seed, grid in enumerate(items)]
    function = EVERYTHING[name]
    batch = [torch.stack(parts) for parts in zip(*pairs, strict=True)]
    together = torch.func.vmap(function)(*batch, stack(items))
    for number, (fields_of, grid) in enumerate(zip(pairs, items, strict=True)):
        alone = function(*fields_of, grid)
        exact = function(*(field.double() for field in fields_of), grid)
        for a, b, c in zip(*((x,) if isinstance(x, Tensor) else x for x in (together, alone, exact)), strict=True):
            assert b.dtype == (torch.int64 if "fold" in name else dtype)
            assert_close(a[number], b, atol=1e-5 if dtype == torch.float32 else 1e-10, rtol=1e-5)
            if name != "statistics":  # the spread of logarithms near 0 is no matter of float32
                assert_close(b.double(), c.double(), atol=1e-3, rtol=1e-3)


# -- derivatives by fields and grids -------------------------------------------------------------------------------


def smooth_pair(dimension: int) -> tuple[Tensor, Tensor]:
    """Shifts whose samples lie off the knots."""
    u, v = (0.17 * uniform(dimension, *SMALL[dimension][::-1], seed=seed) + 0.21 for seed in (5, 6))
    return u.requires_grad_(), v.requires_grad_()


@every_dimension
def test_gradients_of_shifts(dimension: int) -> None:
    u, v = smooth_pair(dimension)
    assert gradcheck(compose_shift, (u, v), check_forward_ad=True)
    assert gradgradcheck(compose_shift, (u, v))
    for midpoint in (False, True):
        assert gradcheck(lambda x, m=midpoint: exp_shift(x, 2, midpoint=m), (u,))
    assert invert_shift(u).residual < 1e-12
    assert gradcheck(lambda x: invert_shift(x).field, (u,), check_forward_ad=True)
    assert gradgradcheck(lambda x: invert_shift(x).field, (u,))


@every_dimension
def test_gradients_of_inverses_in_every_mode(dimension: int) -> None:
    u, _ = (x.detach() for x in smooth_pair(dimension))

    def energy(x: Tensor) -> Tensor:
        return invert_shift(x).field.square().sum()

    batch = torch.stack([u, -0.5 * u])
    together = torch.func.vmap(torch.func.grad(energy))(batch)
    leaf = batch.clone().requires_grad_()
    (alone,) = torch.autograd.grad(energy(leaf[0]) + energy(leaf[1]), leaf)
    assert_close(together, alone, atol=1e-12, rtol=0)
    by_rows, by_columns = (mode(lambda x: invert_shift(x).field)(u) for mode in (torch.func.jacrev, torch.func.jacfwd))
    assert_close(by_rows, by_columns, atol=1e-12, rtol=0)


@every_dimension
def test_gradients_by_field_and_grid(dimension: int) -> None:
    grid = oblique(SMALL[dimension])
    u, v = (from_shift(x.detach(), grid).requires_grad_() for x in smooth_pair(dimension))
    spacing = grid.spacing.clone().requires_grad_()

    def with_grid(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(field: Tensor, other: Tensor, s: Tensor) -> Tensor:
            return function(field, other, Grid(grid.size, spacing=s, center=grid.center, direction=grid.direction))

        return call

    for function in (
        lambda a, b, g: fields.compose(a, b, g),
        lambda a, b, g: fields.invert(a, g).field,
        lambda a, b, g: fields.exp(a, g, squarings=1),
        lambda a, b, g: fields.log(a, g, iterations=1, squarings=1).velocity,
        lambda a, b, g: fields.bch(a, b, g, terms=3),
        lambda a, b, g: fields.determinant(a, g),
    ):
        assert gradcheck(with_grid(function), (u, v, spacing))


# -- bad inputs ----------------------------------------------------------------------------------------------------

GRID = Grid((4, 3))
FIELD = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: to_shift(torch.zeros(3, 3, 4), GRID), r"\(3, 3, 4\) but the grid .*expected \(2, 3, 4\)"),
        (lambda: from_shift(FIELD.mT, GRID), r"\(2, 4, 3\)"),
        (lambda: fields.exp(FIELD[0], GRID), r"\(3, 4\)"),
        (lambda: fields.jacobian(FIELD[None], GRID), r"vmap for a batch"),
        (lambda: fields.compose(FIELD, torch.zeros(2, 4, 4), GRID), r"\(2, 4, 4\)"),
        (lambda: fields.folded_cells(FIELD[None], GRID), r"vmap for a batch"),
        (lambda: fields.inverse_consistency(FIELD, torch.zeros(2, 4, 4), GRID), r"\(2, 4, 4\) but the grid"),
        (lambda: fields.inverse_consistency(torch.zeros(3, 3, 4), FIELD, GRID), r"\(3, 3, 4\) but the grid"),
        (lambda: compose_shift(FIELD, FIELD.mT), r"\(2, 3, 4\) and \(2, 4, 3\)"),
        (lambda: exp_shift(FIELD, -1), "squarings is -1"),
        (lambda: invert_shift(FIELD, iterations=-1), "iterations is -1"),
        (lambda: fields.bch(FIELD, FIELD, GRID, terms=5), "terms is 5"),
        (lambda: fields.bch(FIELD, FIELD, GRID, terms=0), "terms is 0"),
        (lambda: fields.sample_field(FIELD, GRID, torch.zeros(2, 3)), r"\(2, 3\): expected \(N, 2\)"),
        (lambda: fields.sample_field(FIELD, GRID, torch.zeros(5, 1, 2)), r"\(5, 1, 2\): expected \(N, 2\)"),
        (lambda: fields.sample_field(FIELD, GRID, torch.zeros(2)), r"\(2,\): expected \(N, 2\)"),
        (lambda: fields.sample_field(FIELD.mT, GRID, torch.zeros(5, 2)), r"\(2, 4, 3\) but the grid"),
        (lambda: fields.resample_field(FIELD.mT, GRID, GRID), r"\(2, 4, 3\) but the grid"),
        (lambda: fields.affine_field(torch.eye(3, 4), GRID), r"\(3, 4\): expected \(3, 3\)"),
        (lambda: fields.resample_field(FIELD, GRID, Grid((4,))), "grids of 1 and 2 axes"),
        (lambda: fields.curl(torch.zeros(1, 4), Grid((4,))), "no curl"),
        (lambda: fields.affine_field(torch.eye(2), GRID), r"\(2, 2\): expected \(3, 3\)"),
        (lambda: fields.statistics(FIELD, GRID, mask=torch.zeros(3, 4)), r"\(3, 4\): expected \(1, 3, 4\)"),
        (lambda: torch.func.vmap(lambda f: fields.exp(f, GRID))(FIELD[None]), "give squarings"),
        (lambda: torch.func.vmap(lambda f: fields.log(f, GRID).velocity)(FIELD[None]), "give squarings"),
    ],
)
def test_errors_say_what_was_given_and_expected(call: Callable[[], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()


def test_whole_numbers_are_no_field() -> None:
    with pytest.raises(TypeError, match="int64"):
        fields.exp(torch.zeros(2, 3, 4, dtype=torch.int64), GRID)


@every_dimension
def test_all_stays_on_the_device_and_in_the_dtype_of_the_field(dimension: int) -> None:
    """The meta device stands in for any but the CPU, and refuses what mixes the two."""
    grid, dtype = Grid(SMALL[dimension]).to("meta"), torch.float32
    field = torch.zeros(dimension, *grid.shape, dtype=dtype, device="meta")
    scale = torch.tensor(0.5, dtype=torch.float64, device="meta")
    points = torch.zeros(4, dimension, dtype=torch.float64, device="meta")
    matrix = torch.eye(dimension + 1, dtype=torch.float32, device="meta")
    for found in (
        to_shift(field, grid),
        from_shift(field, grid),
        fields.compose(field, field, grid),
        fields.compose_step(field, field, grid, scale),
        fields.exp(field, grid, squarings=2),
        fields.exp(field, grid, squarings=1, on=grid.resize(2)),
        *fields.log(field, grid, iterations=1, squarings=1),
        fields.inverse_consistency(field, field, grid).largest_voxels,
        fields.bch(field, field, grid, terms=4),
        fields.sample_field(field, grid, points),
        fields.resample_field(field, grid, grid.resize(3)),
        fields.affine_field(matrix, grid, dtype=dtype),
        fields.random_field(grid, amplitude=1.0, smoothness=1.0, dtype=dtype),
    ):
        assert found.is_meta and found.dtype == dtype


def test_results_are_the_same_bits_again() -> None:
    u, v = pair(GRID)
    for name, function in EVERYTHING.items():
        assert equal_bits(function(u, v, GRID), function(u, v, GRID)), name
        close(function(u, v, GRID), function(u.clone(), v.clone(), GRID), atol=0)
