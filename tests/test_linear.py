"""Linear transforms: the size of a step, what each family keeps, fitting, decomposition, and SimpleITK as oracle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import (
    close,
    few,
    flat_function,
    grids,
    law,
    orientation,
    picture,
    random_mapping,
    random_params,
    tensor,
    uniform,
)
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import jacrev, vmap
from torch.testing import assert_close

from fnreg import Grid, Mapping, Transform, decompose, linear_mapping, stack, warp
from fnreg.grid import homogeneous
from fnreg.pytree import tree_flatten, tree_map, tree_unflatten, tree_vmap
from fnreg.transforms.factors import nearest_rotation
from fnreg.transforms.linear import (
    Affine,
    Homogeneous,
    IsotropicScaling,
    Linear,
    Rigid,
    Rotation,
    Scaling,
    Shearing,
    Similarity,
    Translation,
)
from fnreg.transforms.rotation import angle_to_matrix, quaternion_to_matrix, rotation_vector_to_quaternion

# torch's forward mode compiles its own decompositions with torch.jit on first use.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

seeds = st.integers(0, 2**16)
LINE: tuple[Linear, ...] = (Translation(), Scaling(), IsotropicScaling(), Affine(), Homogeneous())
TURNING: tuple[Linear, ...] = (Rotation(), Rigid(), Similarity(), Shearing())
FAMILIES = [(t, d) for d in (1, 2, 3) for t in (LINE if d == 1 else LINE + TURNING)]
every_family = pytest.mark.parametrize(("transform", "dimension"), FAMILIES, ids=[f"{d}-{t}" for t, d in FAMILIES])


# -- steps ---------------------------------------------------------------------------------------------------------


@every_family
def test_one_unit_of_each_step_entry_moves_the_voxels_by_one_voxel(transform: Linear, dimension: int) -> None:
    """In the root mean square, measured along the grid's own axes."""

    @few
    @given(grids(dimension, low=2, high=6))
    def check(items: list[Grid]) -> None:
        def moved(grid: Grid) -> Any:
            zero, start = transform.zero_step(grid), transform.init(grid)

            def index(step: Any) -> Tensor:
                points = transform.points(transform.perturb(start, step, grid), grid, grid.points())
                return grid.world_to_index(points)

            slopes = [slope.flatten(2) for slope in tree_flatten(jacrev(index)(zero))[0]]
            by_entry = torch.cat(slopes, 2)  # (N, D, P)
            found = by_entry.square().sum(1).mean(0).sqrt()
            return found, torch.ones_like(found)

        law(moved, items, atol=1e-9)

    check()


@few
@given(grids(3))
def test_steps_go_along_the_axes_of_the_grid(items: list[Grid]) -> None:
    """A shift by one along axis k adds one to index k; a turn about axis k leaves that index alone."""

    def along(grid: Grid) -> Any:
        index = grid.world_to_index(grid.points())
        zero = Rigid().zero_step(grid)
        found, expected = [], []
        for k in range(3):
            unit = torch.eye(3, dtype=torch.float64)[k]
            shifted = Rigid().retract(Rigid().init(grid), {**zero, "translation": unit}, grid)
            found.append(grid.world_to_index(Rigid().points(shifted, grid, grid.points())))
            expected.append(index + unit)
            turned = Rigid().retract(Rigid().init(grid), {**zero, "rotation": unit}, grid)
            found.append(grid.world_to_index(Rigid().points(turned, grid, grid.points()))[:, k])
            expected.append(index[:, k])
        return found, expected

    law(along, items, atol=1e-9)


@every_family
def test_a_positive_step_adds_to_its_parameter(transform: Linear, dimension: int) -> None:
    """On a grid along the axes of the world: of a quaternion to its vector."""
    grid = Grid((4, 3, 2)[:dimension], spacing=(1.0, 2.0, 0.5)[:dimension], center=(0.0,) * dimension)
    zero, start = transform.zero_step(grid), transform.init(grid)
    for name, leaf in zero.items():
        for k in range(leaf.numel()):
            step = {**zero, name: torch.eye(leaf.numel(), dtype=torch.float64)[k].reshape(leaf.shape)}
            moved = transform.retract(start, step, grid)
            if isinstance(transform, Homogeneous):
                part = slice(-1, None) if name == "translation" else slice(None, -1)
                added = (moved["matrix"] - start["matrix"])[:-1, part].flatten()
            else:
                added = (moved[name] - start[name]).flatten()
            if name == "rotation" and dimension == 3:
                added = added[1:]
            assert float(added[k]) > 0 and int((added.abs() > 1e-12).sum()) == 1


@every_family
def test_an_axis_of_one_voxel_still_has_a_finite_step(transform: Linear, dimension: int) -> None:
    grid = Grid((5, 1, 4)[:dimension]) if dimension > 1 else Grid((1,))
    step = tree_map(torch.ones_like, transform.zero_step(grid))
    params = transform.retract(transform.init(grid), step, grid)
    assert all(bool(torch.isfinite(leaf).all()) for leaf in tree_flatten(params)[0])


@every_family
def test_an_axis_of_one_voxel_takes_the_steps_of_one_of_two(transform: Linear, dimension: int) -> None:
    thin, double = (
        Grid((n, 4, 3)[:dimension], spacing=(0.7, 1.0, 2.0)[:dimension], center=(0.0,) * dimension) for n in (1, 2)
    )
    step = tree_map(lambda leaf: uniform(*leaf.shape), transform.zero_step(thin))
    found, expected = (transform.retract(transform.init(grid), step, grid) for grid in (thin, double))
    close(found, expected, atol=1e-14)


def test_rotations_compose_and_stay_rotations() -> None:
    """A thousand steps leave a unit quaternion, and turn by their sum about a fixed axis."""
    grid = Grid((5, 4, 3), spacing=(1.0, 2.0, 0.5), direction=orientation(3, tensor([0.3, -0.4, 0.9])))
    params, step = Rotation().init(grid), {"rotation": tensor([0.0, 0.01, 0.0])}
    angle = float(Rotation().retract(params, step, grid)["rotation"][0].arccos()) * 2
    for _ in range(1000):
        params = Rotation().retract(params, step, grid)
    assert_close(params["rotation"].norm(), tensor(1.0), atol=1e-14, rtol=0)
    half = 1000 * angle / 2
    axis = math.sin(half) * grid.direction[:, 1]
    assert_close(params["rotation"], torch.cat([tensor([math.cos(half)]), axis]), atol=1e-9, rtol=0)


def test_a_turn_is_taken_after_the_rotation_so_far() -> None:
    grid = Grid((5, 4, 3), spacing=(1.0, 2.0, 0.5), direction=orientation(3, tensor([0.3, -0.4, 0.9])))
    before, step = random_params(Rotation(), grid, 1, 2.0), {"rotation": tensor([0.5, -1.0, 0.7])}
    turn = Rotation().matrix(Rotation().retract(Rotation().init(grid), step, grid), grid)
    after = Rotation().matrix(Rotation().retract(before, step, grid), grid)
    assert_close(after, turn @ Rotation().matrix(before, grid), atol=1e-13, rtol=0)
    assert float((after - Rotation().matrix(before, grid) @ turn).abs().max()) > 0.01


# -- what each family keeps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("transform", [Rotation(), Rigid(), Similarity()], ids=str)
def test_rigid_maps_keep_distances_and_volume(transform: Linear, dimension: int) -> None:
    @few
    @given(grids(dimension), seeds)
    def check(items: list[Grid], seed: int) -> None:
        params = [random_params(transform, grid, seed, 3.0) for grid in items]

        def kept(grid: Grid, values: Any) -> Any:
            points = grid.center + uniform(6, dimension, seed=seed)
            size = torch.exp(values["log_size"]).squeeze() if "log_size" in values else tensor(1.0)
            mapped = transform.points(values, grid, points)

            def distances(p: Tensor) -> Tensor:
                return (p[:, None] - p[None]).square().sum(-1)

            volume = torch.linalg.det(transform.matrix(values, grid)[:-1, :-1])
            return (distances(mapped), volume), (size**2 * distances(points), size**dimension)

        law(kept, items, params, atol=1e-11, rtol=1e-12)

    check()


@pytest.mark.parametrize("dimension", [2, 3])
def test_each_family_is_what_its_formula_says(dimension: int) -> None:
    """Written out by hand about the centre, in world coordinates or along the axes R of the domain."""

    @few
    @given(grids(dimension), seeds)
    def check(items: list[Grid], seed: int) -> None:
        grid = items[0]
        c, frame, points = grid.center, grid.direction, grid.center + uniform(5, dimension, seed=seed)

        def about_center(linear: Tensor, shift: Tensor | float = 0.0) -> Tensor:
            return (points - c) @ linear.mT + c + shift

        def mapped(transform: Linear) -> tuple[Any, Tensor]:
            params = random_params(transform, grid, seed, 1.0)
            return params, transform.points(params, grid, points)

        eye = torch.eye(dimension, dtype=torch.float64)
        rotation_of = angle_to_matrix if dimension == 2 else quaternion_to_matrix
        p, found = mapped(Translation())
        expected = [(found, points + p["translation"])]
        p, found = mapped(Rotation())
        expected.append((found, about_center(rotation_of(p["rotation"]))))
        p, found = mapped(Rigid())
        expected.append((found, about_center(rotation_of(p["rotation"]), p["translation"])))
        p, found = mapped(Similarity())
        turn = p["log_size"].exp() * rotation_of(p["rotation"])
        expected.append((found, about_center(turn, p["translation"])))
        p, found = mapped(IsotropicScaling())
        expected.append((found, about_center(p["log_size"].exp() * eye)))
        p, found = mapped(Scaling())
        expected.append((found, about_center(frame @ torch.diag(p["log_scale"].exp()) @ frame.mT)))
        p, found = mapped(Shearing())
        upper = eye.clone()
        places = [(0, 1)] if dimension == 2 else [(0, 1), (0, 2), (1, 2)]
        for (row, column), value in zip(places, p["shear"], strict=True):
            upper[row, column] = value
        expected.append((found, about_center(frame @ upper @ frame.mT)))
        p, found = mapped(Affine())
        expected.append((found, about_center(p["matrix"], p["translation"])))
        p, found = mapped(Homogeneous())
        expected.append((found, points @ p["matrix"][:-1, :-1].mT + p["matrix"][:-1, -1]))
        for a, b in expected:
            assert_close(a, b, atol=1e-10, rtol=0)

    check()


@few
@given(grids(3), seeds)
def test_homogeneous_and_affine_take_the_same_steps(items: list[Grid], seed: int) -> None:
    def both(grid: Grid) -> Any:
        a, h = Affine(), Homogeneous()
        step = {"matrix": uniform(3, 3, seed=seed), "translation": uniform(3, seed=seed + 1)}
        first = a.retract(a.init(grid), step, grid)
        second = a.retract(first, step, grid)
        again = h.retract(h.retract(h.init(grid), step, grid), step, grid)
        return again["matrix"], a.matrix(second, grid)

    law(both, items, atol=1e-9)


@pytest.mark.parametrize("transform", TURNING, ids=str)
def test_a_line_has_neither_rotation_nor_shear(transform: Linear) -> None:
    with pytest.raises(ValueError, match=r"a line cannot be (rotated|sheared): choose Translation, Scaling or Affine"):
        transform.init(Grid((5,)))


# -- fitting -------------------------------------------------------------------------------------------------------


@every_family
def test_a_family_fits_its_own_maps_exactly(transform: Linear, dimension: int) -> None:
    @few
    @given(grids(dimension), seeds)
    def check(items: list[Grid], seed: int) -> None:
        params = [random_params(transform, grid, seed, 0.5) for grid in items]

        def refitted(grid: Grid, values: Any) -> Any:
            matrix = transform.matrix(values, grid)
            fitted = transform.fit(matrix, grid)
            return transform.matrix(fitted, grid), matrix

        law(refitted, items, params, atol=1e-9)

    check()


@few
@given(grids(2), grids(3), seeds)
def test_a_rigid_fit_is_the_nearest_one(plane: list[Grid], space: list[Grid], seed: int) -> None:
    """No rotation is nearer to the linear part, and the centre maps right."""
    for grid in (plane[0], space[0]):
        dimension = grid.ndim
        affine = random_mapping(Affine(), grid, seed, 1.0).matrix()
        fitted = Rigid().fit(affine, grid)
        matrix = Rigid().matrix(fitted, grid)
        center = torch.cat([grid.center, torch.ones(1).double()])
        assert_close(matrix @ center, affine @ center, atol=1e-10, rtol=0)
        best = float((matrix - affine)[:-1, :-1].norm())
        for number in range(8):
            turned = random_mapping(Rotation(), grid, seed + number, 0.2).matrix()[:dimension, :dimension]
            assert float((turned @ matrix[:-1, :-1] - affine[:-1, :-1]).norm()) >= best - 1e-12
        assert_close(torch.linalg.det(matrix[:-1, :-1]), tensor(1.0), atol=1e-12, rtol=0)


def test_fits_that_drop_a_part_are_finite_and_map_the_centre_right() -> None:
    """Mirrors, shears and scales that a family lacks: what is left of them is no NaN."""
    grid = Grid((4, 5, 3), spacing=(1.0, 2.0, 0.7), center=(3.0, -2.0, 7.0))
    mirror = homogeneous(torch.diag(tensor([-2.0, 1.5, 0.5])), tensor([1.0, 2.0, 3.0]))
    for transform in (*LINE, *TURNING):
        fitted = transform.fit(mirror, grid)
        assert tree_flatten(fitted)[1] == tree_flatten(transform.init(grid))[1]
        assert all(bool(torch.isfinite(leaf).all()) for leaf in tree_flatten(fitted)[0])
        if transform.translates:
            point = grid.center.unsqueeze(0)
            expected = point @ mirror[:-1, :-1].mT + mirror[:-1, -1]
            assert_close(transform.points(fitted, grid, point), expected, atol=1e-10, rtol=0)
    assert_close(Scaling().fit(mirror, grid)["log_scale"].exp(), tensor([2.0, 1.5, 0.5]))
    assert_close(IsotropicScaling().fit(mirror, grid)["log_size"].exp() ** 3, tensor([1.5]))


# -- decomposition -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_decomposition_gives_the_matrix_back(dimension: int) -> None:
    @few
    @given(st.lists(seeds, min_size=3, max_size=3))
    def check(several: list[int]) -> None:
        matrices = [
            homogeneous(uniform(dimension, dimension, seed=n) + 0.3, 50 * uniform(dimension, seed=n)) for n in several
        ]

        def put_together(matrix: Tensor) -> Any:
            translation, factors = decompose(matrix)
            rows, columns = torch.triu_indices(dimension, dimension, 1)
            basis = torch.zeros(len(rows), dimension, dimension, dtype=torch.float64)
            basis[torch.arange(len(rows)), rows, columns] = 1
            upper = torch.eye(dimension, dtype=torch.float64) + (factors.shear[:, None, None] * basis).sum(0)
            linear = factors.rotation @ upper * factors.scale
            gram = factors.rotation.mT @ factors.rotation
            proper = torch.linalg.det(factors.rotation)
            found = homogeneous(linear, translation), gram, proper, (factors.scale[1:] > 0).double()
            eye = torch.eye(dimension, dtype=torch.float64)
            return found, (matrix, eye, tensor(1.0), torch.ones(dimension - 1, dtype=torch.float64))

        law(put_together, matrices, atol=1e-11)
        for matrix in matrices:
            mirrors = float(torch.linalg.det(matrix[:-1, :-1])) < 0
            assert (float(decompose(matrix)[1].scale[0]) < 0) == mirrors

    check()


def test_nearest_rotation_of_a_mirror_is_proper() -> None:
    for matrix in (torch.diag(tensor([1.0, 1.0, -1.0])), torch.diag(tensor([1.0, -3.0])), -torch.eye(3).double()):
        rotation = nearest_rotation(matrix)
        assert_close(torch.linalg.det(rotation), tensor(1.0), atol=1e-14, rtol=0)
        assert_close(rotation @ rotation.mT, torch.eye(len(matrix)).double(), atol=1e-14, rtol=0)


@pytest.mark.parametrize("dimension", [2, 3])
def test_nearest_rotation_of_any_stretch_is_its_rotation(dimension: int) -> None:
    """R of R S with S symmetric and positive, however flat: where an iteration towards it would still be on its way."""
    turn, frame = (orientation(dimension, tensor(angles)) for angles in ([0.5, -0.2, 0.7], [-1.0, 0.4, 0.3]))
    for exponent in range(10):
        stretch = frame @ torch.diag(tensor([1.0, 0.5**exponent, 0.1**exponent])[-dimension:]) @ frame.mT
        assert_close(nearest_rotation(turn @ stretch), turn, atol=1e-5 if exponent > 6 else 1e-8, rtol=0)
        found = nearest_rotation(turn @ stretch)
        assert_close(found.mT @ found, torch.eye(dimension).double(), atol=1e-12, rtol=0)


def test_linear_mapping_takes_a_matrix_with_or_without_its_last_row() -> None:
    grid = Grid((4, 5), center=(3.0, 1.0))
    matrix = random_mapping(Affine(), grid, 1).matrix()
    whole = linear_mapping(matrix, grid)
    assert torch.equal(whole.matrix(), matrix)
    assert torch.equal(linear_mapping(matrix[:-1], grid).matrix(), matrix)
    assert torch.equal(linear_mapping(matrix.numpy(), grid).matrix(), matrix)  # type: ignore[arg-type]
    batch = linear_mapping(stack([matrix[:-1]] * 3), grid)
    assert torch.equal(batch.matrix(), stack([matrix] * 3))
    assert batch.map_points(grid.points()).shape == (3, 20, 2)
    inside = vmap(lambda m: linear_mapping(m, grid).matrix())(stack([matrix[:-1]] * 3))
    assert torch.equal(inside, batch.matrix())
    with pytest.raises(ValueError, match=r"matrix has shape \(4, 4\): expected \(3, 3\)"):
        linear_mapping(torch.eye(4), grid)


# -- spread --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [torch.nan, torch.inf])
def test_a_matrix_that_is_none_is_refused(spoil: float) -> None:
    grid, eye = Grid((4, 5)), torch.eye(3, dtype=torch.float64)
    for matrix in (eye.index_put((torch.tensor(0), torch.tensor(2)), tensor(spoil)), 2 * eye):
        with pytest.raises(ValueError, match=r"expected finite numbers and \(0, ..., 0, 1\) in the last row"):
            linear_mapping(matrix, grid)


def test_spread_in_the_plane_is_even_from_zero_on() -> None:
    grid = Grid((4, 5), center=(3.0, 1.0))
    found = Rigid().spread(grid, 8)
    assert_close(found["rotation"].squeeze(1), torch.arange(8).double() * (2 * math.pi / 8), atol=1e-14, rtol=0)
    assert torch.equal(found["translation"], torch.zeros(8, 2).double())
    assert set(found) == {"rotation", "translation"}


@pytest.mark.parametrize("count", [1, 24, 60, 300])
def test_spread_in_space_covers_all_rotations_evenly(count: int) -> None:
    grid = Grid((4, 5, 6))
    found = Similarity().spread(grid, count)
    quaternions = found["rotation"]
    assert quaternions.shape == (count, 4)
    assert found["log_size"].shape == (count, 1)
    assert not bool(found["log_size"].any() | found["translation"].any())
    assert torch.equal(quaternions[0], tensor([1.0, 0.0, 0.0, 0.0]))
    assert_close(quaternions.norm(dim=1), torch.ones(count).double(), atol=1e-14, rtol=0)
    if count == 1:
        return

    def worst(starts: Tensor) -> float:
        """The largest angle from a random rotation to the nearest start."""
        normal = torch.from_numpy(np.random.default_rng(1).normal(size=(4000, 4)))
        probe = normal / normal.norm(dim=1, keepdim=True)
        return float(2 * (probe @ starts.mT).abs().amax(1).clamp(max=1).arccos().max())

    # A ball of angle a about each start holds (a - sin a) / pi of all rotations; together they must hold all.
    # As many rotations at random leave gaps twice as wide as this bound.
    least = next(a for a in np.linspace(0.01, math.pi, 2000) if (a - math.sin(a)) / math.pi * count >= 1)
    assert least < worst(quaternions) < 1.7 * least


def test_spread_in_space_is_the_spiral_of_the_paper() -> None:
    """Alexa 2022, algorithm 1: phi = sqrt(2), psi the positive root of psi^4 = psi + 4."""
    psi = next(float(root.real) for root in np.roots([1, 0, 0, -1, -4]) if root.imag == 0 and root.real > 0)
    s, count = np.arange(50) + 0.5, 50
    near, far = np.sqrt(s / count), np.sqrt(1 - s / count)
    alpha, beta = 2 * np.pi * s / np.sqrt(2), 2 * np.pi * s / psi
    expected = [near * np.sin(alpha), near * np.cos(alpha), far * np.sin(beta), far * np.cos(beta)]
    found = Rotation().spread(Grid((4, 5, 6)), count)["rotation"]
    assert_close(found[1:], tensor(np.stack(expected, 1))[1:], atol=1e-12, rtol=0)


def test_spread_refuses_what_cannot_turn() -> None:
    grid = Grid((4, 5))
    for transform in (Translation(), Scaling(), Affine()):
        with pytest.raises(ValueError, match="has no rotation to spread: choose Rotation, Rigid or Similarity"):
            transform.spread(grid, 4)
    with pytest.raises(ValueError, match="count is 0: give at least one start"):
        Rigid().spread(grid, 0)


# -- derivatives ---------------------------------------------------------------------------------------------------


@every_family
def test_derivatives_by_the_parameters(transform: Linear, dimension: int) -> None:
    grid = Grid(
        (4, 3, 2)[:dimension],
        spacing=(1.0, 2.0, 0.5)[:dimension],
        center=(2.0, -1.0, 0.5)[:dimension],
        direction=orientation(dimension, tensor([0.4, -0.3, 0.8]), mirror=True),
    )
    params, points = random_params(transform, grid, 1), grid.points()
    for function in (
        lambda p: transform.points(p, grid, points),
        lambda p: transform.matrix(p, grid),
        lambda p: transform.displacement(p, grid),
    ):
        on_leaves, leaves = flat_function(function, params)
        assert gradcheck(on_leaves, leaves, check_forward_ad=True, check_batched_grad=True)
    on_leaves, leaves = flat_function(lambda p: transform.inverse(p, grid).map_points(points), params)
    assert gradcheck(on_leaves, leaves)


@every_family
def test_derivatives_by_the_step_at_zero(transform: Linear, dimension: int) -> None:
    """What registration differentiates."""
    grid = Grid((4, 3, 2)[:dimension], spacing=(1.0, 2.0, 0.5)[:dimension])
    params, points = random_params(transform, grid, 1), grid.points()

    def moved(step: Any) -> Tensor:
        return transform.points(transform.perturb(params, step, grid), grid, points)

    on_leaves, leaves = flat_function(moved, transform.zero_step(grid))
    assert gradcheck(on_leaves, leaves, check_forward_ad=True, check_batched_grad=True)


@every_family
def test_derivatives_under_vmap_equal_the_loop(transform: Linear, dimension: int) -> None:
    domains = [Grid((4, 3, 2)[:dimension], spacing=0.5 + n) for n in range(3)]
    params = [random_params(transform, grid, n) for n, grid in enumerate(domains)]

    def slope(values: Any, grid: Grid) -> Any:
        return jacrev(lambda step: transform.points(transform.perturb(values, step, grid), grid, grid.points()))(
            transform.zero_step(grid)
        )

    loop = stack([slope(p, g) for p, g in zip(params, domains, strict=True)])
    close(tree_vmap(slope, [None, None], stack(params), stack(domains)), loop, atol=1e-13)


def test_fit_and_decompose_are_differentiable() -> None:
    grid = Grid((4, 3, 2))
    matrix = random_mapping(Affine(), grid, 1).matrix()

    def parts(linear: Tensor) -> tuple[Tensor, ...]:
        return tuple(decompose(homogeneous(linear, tensor([1.0, 2.0, 3.0])))[1])

    assert gradcheck(parts, matrix[:-1, :-1].clone().requires_grad_())
    fitted = lambda linear: tuple(Rigid().fit(homogeneous(linear, matrix[:-1, -1]), grid).values())  # noqa: E731
    assert gradcheck(fitted, matrix[:-1, :-1].clone().requires_grad_())


@every_family
def test_all_stays_on_the_device_of_the_domain(transform: Linear, dimension: int) -> None:
    """And in float64; the meta device stands in for any but the CPU, and refuses what mixes the two."""
    grid = Grid((4, 3, 2)[:dimension]).to("meta")
    params = transform.init(grid)
    matrix = transform.matrix(params, grid)
    made = [
        params,
        matrix,
        transform.zero_step(grid),
        transform.displacement(params, grid),
        transform.fit(matrix, grid),
    ]
    made += [transform.retract(params, transform.zero_step(grid), grid), transform.inverse(params, grid).matrix()]
    made += [transform.spread(grid, 3)] if "rotation" in transform.parts else []
    made += [linear_mapping(torch.eye(dimension + 1), grid).matrix(), *decompose(matrix)[1]]
    for leaf in tree_flatten(made)[0]:
        assert leaf.is_meta and leaf.dtype == torch.float64
    for leaf in tree_flatten([transform.init(Grid(grid.size)), transform.zero_step(Grid(grid.size))])[0]:
        assert leaf.device.type == "cpu" and leaf.dtype == torch.float64


# -- SimpleITK as oracle -------------------------------------------------------------------------------------------


def to_itk_image(image: Any) -> Any:
    import SimpleITK as sitk

    made = sitk.GetImageFromArray(image.data[0].numpy())
    made.SetSpacing(image.grid.spacing.tolist())
    made.SetOrigin(image.grid.origin.tolist())
    made.SetDirection(image.grid.direction.flatten().tolist())
    return made


def itk_cases() -> list[Any]:
    """(transform of ITK, mapping) about a centre that is not the origin."""
    sitk = pytest.importorskip("SimpleITK")
    plane = Grid((14, 12), spacing=(1.0, 1.5), center=(20.0, -30.0), direction=orientation(2, tensor([0.5])))
    turn = tensor([0.2, -0.3, 0.25])
    space = Grid((12, 10, 8), spacing=(1.0, 1.5, 2.0), center=(20.0, -30.0, 5.0), direction=orientation(3, turn, True))
    cases: list[Any] = []

    def add(itk: Any, grid: Grid, transform: Transform, params: dict[str, Any]) -> None:
        values = {name: tensor(value) for name, value in params.items()}
        cases.append(pytest.param(itk, Mapping(values, grid, transform), id=f"{grid.ndim}-{transform}"))

    def centred(itk: Any, grid: Grid, **settings: Any) -> Any:
        itk.SetCenter(grid.center.tolist())
        for name, value in settings.items():
            getattr(itk, f"Set{name}")(value)
        return itk

    shift2, shift3 = [1.2, -0.7], [1.2, -0.7, 0.4]
    quaternion = rotation_vector_to_quaternion(tensor([0.1, 0.2, -0.3]))
    versor = [*quaternion[1:].tolist(), float(quaternion[0])]
    itk = centred(sitk.Euler2DTransform(), plane, Angle=0.3, Translation=shift2)
    add(itk, plane, Rigid(), {"rotation": [0.3], "translation": shift2})
    itk = centred(sitk.Similarity2DTransform(), plane, Angle=-0.2, Scale=1.1, Translation=shift2)
    add(itk, plane, Similarity(), {"rotation": [-0.2], "log_size": [math.log(1.1)], "translation": shift2})
    itk = centred(sitk.AffineTransform(2), plane, Matrix=[1.1, 0.2, -0.1, 0.9], Translation=shift2)
    add(itk, plane, Affine(), {"matrix": [[1.1, 0.2], [-0.1, 0.9]], "translation": shift2})
    itk = centred(sitk.VersorRigid3DTransform(), space, Rotation=versor, Translation=shift3)
    add(itk, space, Rigid(), {"rotation": quaternion.tolist(), "translation": shift3})
    itk = centred(sitk.Similarity3DTransform(), space, Rotation=versor, Scale=0.95, Translation=shift3)
    add(
        itk, space, Similarity(), {"rotation": quaternion.tolist(), "log_size": [math.log(0.95)], "translation": shift3}
    )
    matrix = [[1.1, 0.1, 0.0], [-0.1, 0.9, 0.05], [0.02, -0.1, 1.05]]
    itk = centred(sitk.AffineTransform(3), space, Matrix=[entry for row in matrix for entry in row], Translation=shift3)
    add(itk, space, Affine(), {"matrix": matrix, "translation": shift3})
    return cases


@pytest.mark.parametrize(("itk", "mapping"), itk_cases())
def test_points_and_images_are_those_of_itk(itk: Any, mapping: Mapping) -> None:
    import SimpleITK as sitk

    grid = mapping.domain
    points = grid.center + 10 * uniform(20, grid.ndim)
    theirs = tensor([itk.TransformPoint(p) for p in points.tolist()])
    assert_close(mapping.map_points(points), theirs, atol=1e-10, rtol=0)
    inverse = tensor([itk.GetInverse().TransformPoint(p) for p in points.tolist()])
    assert_close(mapping.inverse().map_points(points), inverse, atol=1e-9, rtol=0)

    turn = tensor([-0.4, 0.5, 0.1])
    moving = picture(
        Grid(
            (13, 15, 11)[: grid.ndim],
            spacing=(1.1, 0.9, 1.6)[: grid.ndim],
            center=grid.center + 0.7,
            direction=orientation(grid.ndim, turn),
        ),
        mapping=Mapping({"translation": -grid.center}, grid, Translation()),
        extent=16.0,
    )
    for name, mode in (("linear", sitk.sitkLinear), ("nearest", sitk.sitkNearestNeighbor)):
        reference = to_itk_image(picture(grid, extent=1.0))
        theirs = sitk.GetArrayFromImage(sitk.Resample(to_itk_image(moving), reference, itk, mode, -9.0))
        ours = warp(moving, mapping, interpolation=name).data[0]  # type: ignore[arg-type]
        coords = moving.grid.world_to_index(mapping.map_points(grid.points()))
        size = tensor(moving.grid.size)
        inner = ((coords > 0.01) & (coords < size - 1.01)).all(1).reshape(grid.shape)
        if name == "nearest":  # ties may fall either way
            inner = inner & ((coords - coords.floor() - 0.5).abs() > 1e-6).all(1).reshape(grid.shape)
        assert int(inner.sum()) > 0.3 * grid.numel
        assert_close(ours[inner], tensor(theirs)[inner], atol=1e-6, rtol=0)


def test_a_matrix_under_vmap_over_parameters_only() -> None:
    grid = Grid((4, 3, 2))
    several = [random_params(Similarity(), grid, n) for n in range(4)]
    leaves, spec = tree_flatten(stack(several))

    def matrix(*values: Tensor) -> Tensor:
        return Similarity().matrix(tree_unflatten(list(values), spec), grid)

    loop = torch.stack([Similarity().matrix(p, grid) for p in several])
    assert_close(vmap(matrix)(*leaves), loop, atol=1e-14, rtol=0)


def test_a_singular_map_has_no_inverse() -> None:
    flat = linear_mapping(tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 1.0]]), Grid((4, 3)))
    with pytest.raises(ValueError, match=r"the map of Homogeneous\(\) is singular, so it has no inverse"):
        flat.inverse()
    with pytest.raises(ValueError, match="is singular"):
        Mapping(
            {"matrix": torch.zeros(2, 2).double(), "translation": tensor([1.0, 2.0])}, Grid((4, 3)), Affine()
        ).inverse()
    good = linear_mapping(tensor([[1.0, 2.0, 3.0], [0.0, 4.0, 1.0]]), Grid((4, 3)))
    both = Mapping(stack([flat.params, good.params]), flat.domain, flat.transform).inverse()
    assert bool(both.params["matrix"][0].isnan().all())
    assert_close(both.params["matrix"][1], good.inverse().params["matrix"], atol=0, rtol=0)
    one = Mapping(stack([flat.params]), flat.domain, flat.transform).inverse()  # a batch of one is a batch
    assert one.params["matrix"].shape == (1, 3, 3) and bool(one.params["matrix"].isnan().all())
