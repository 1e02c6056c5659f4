"""deepali beside fnreg: equal where both mean the same, and where deepali is wrong, fnreg against the truth.

The Python blocks of docs/from-deepali.md run here, those that need deepali too; its functions convert in these tests.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scenes import orientation, tensor, uniform
from torch import Tensor
from torch.testing import assert_close

import fnreg
from fnreg import Grid, Image, Mapping, bspline, fields, functional
from fnreg.losses import penalties
from fnreg.losses.penalties import DenseField, SplineField
from fnreg.transforms.rotation import (
    EULER_ORDERS,
    angle_to_matrix,
    euler_to_matrix,
    matrix_to_angle,
    matrix_to_euler,
    quaternion_to_matrix,
)

core = pytest.importorskip("deepali.core", reason="needs hf-deepali, of the extra `bench`")
U = pytest.importorskip("deepali.core.functional")
L = pytest.importorskip("deepali.losses.functional")
data = pytest.importorskip("deepali.data")
spatial = pytest.importorskip("deepali.spatial")

# deepali's subdivision of splines indexes with lists.
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "from-deepali.md"
AXES = {name: core.Axes(value) for name, value in (("corners", "cube_corners"), ("cube", "cube"), ("world", "world"))}
SINGLE = 2e-5  # deepali keeps grids in float32
two_and_three = pytest.mark.parametrize("dimension", [2, 3])
SIZES = {2: (17, 13), 3: (11, 9, 13)}


def run_page() -> Any:
    """What the blocks of the page define, in one namespace: they go on where the last one ended."""
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```(?:python|\{code-cell\} ipython3)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) > 8, f"{PAGE.name} has only {len(blocks)} blocks of Python"
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), namespace)
    return SimpleNamespace(**namespace)


@pytest.fixture(scope="module")
def page() -> Any:
    torch.manual_seed(0)
    return run_page()


def oblique(dimension: int, size: tuple[int, ...] | None = None, turn: float = 0.4) -> Grid:
    """An anisotropic grid, turned and mirrored, off the origin."""
    return Grid(
        SIZES[dimension] if size is None else size,
        spacing=tensor([1.0, 1.4, 0.7])[:dimension],
        center=tensor([3.0, -2.0, 5.0])[:dimension],
        direction=orientation(dimension, tensor([turn, -0.3, 0.6]), mirror=True),
    )


def cubic(dimension: int) -> Grid:
    """Sides of one length, and no two spacings alike: the cube is a cube in the world too."""
    return Grid((9, 17, 5)[:dimension], spacing=tensor([2.0, 1.0, 4.0])[:dimension], center=1.0)


def smooth(grid: Grid, amplitude: float, seed: int = 0) -> Tensor:
    """A smooth field of world vectors, (D, *shape) float64."""
    some = torch.Generator().manual_seed(seed)
    return fields.random_field(grid, amplitude=amplitude, smoothness=3.0, generator=some, dtype=torch.float64)


def polynomial(grid: Grid, order: int, seed: int = 0) -> Tensor:
    """A field u of this order along the axes of an upright grid, (D, *shape) float64."""
    dimension, points = grid.ndim, (grid.points() - grid.center) / 4
    monomials = [
        points[:, i] ** a * points[:, j] ** (order - a) for i in range(dimension) for j in range(i) for a in (0, 1, 2)
    ]
    weights = uniform(dimension, len(monomials), seed=seed)
    return (weights @ torch.stack(monomials)).reshape(dimension, *grid.shape)


def inner(grid: Grid, margin: int) -> tuple[Any, ...]:
    return (..., *(slice(margin, -margin),) * grid.ndim)


# -- the page ------------------------------------------------------------------------------------------------------


def test_both_loops_of_the_page_find_the_same(page: Any) -> None:
    warped = page.warp(page.source)
    theirs = float(L.mse_loss(warped, page.target).detach())
    ours = float(page.result.terms["mse"])
    start = float(functional.mse(page.moving.data, page.fixed.data))
    assert max(theirs, ours) < start / 10, (start, theirs, ours)
    assert page.result.ok
    assert float(page.result.jacobian().data.min()) > 0


def test_transforms_of_the_page_are_those_of_deepali(page: Any) -> None:
    domain, points = page.domain, page.domain.points()
    world = AXES["world"]

    def theirs(transform: Any) -> Tensor:
        with torch.no_grad():
            return transform.points(points.float()[None], axes=world, to_axes=world)[0].double()

    assert float(page.mapping.displacement().abs().max()) > 0.2
    assert_close(page.mapping.map_points(points), theirs(page.ffd), atol=1e-4, rtol=0)
    turned = fnreg.Mapping(page.rigid_params, domain, fnreg.Rigid()).map_points(points)
    assert_close(turned, theirs(page.rigid), atol=1e-4, rtol=0)
    assert float((turned - points).norm(dim=1).max()) > 1
    assert_close(page.again.u, page.ffd.update().u.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("dimension", [2, 3])
def test_weight_of_bending_is_that_of_the_page(page: Any, dimension: int, scale: float) -> None:
    grid = Grid((9, 17, 5)[:dimension], spacing=tensor([2.0, 1.0, 4.0])[:dimension] * scale)
    u = polynomial(grid, 2)
    theirs = L.bending_loss(page.to_cube(u, grid)[None], mode="forward_central_backward", reduction="none")[0]
    theirs = theirs[inner(grid, 2)].mean()
    ours = penalties.bending(DenseField(u, grid.spacing))
    assert_close(page.bending_weight(0.3, grid) * ours, 0.3 * theirs, atol=0, rtol=1e-8)


# -- converters ----------------------------------------------------------------------------------------------------


@two_and_three
def test_grids_go_there_and_back(page: Any, dimension: int) -> None:
    grid = oblique(dimension)
    assert page.from_grid(page.to_grid(grid, core.Grid)).same_as(grid, 1e-5)


def their_spline(size: tuple[int, ...], stride: Any, seed: int = 0) -> Any:
    """deepali's FFD with coefficients that are noise, over a grid that is anything but a cube."""
    dimension = len(size)
    spacing, direction = (1.0, 1.25, 0.7)[:dimension], orientation(dimension, tensor([0.3, 0.2, -0.1]), True)
    transform = spatial.FreeFormDeformation(core.Grid(size=size, spacing=spacing, direction=direction), stride=stride)
    transform.data_(0.03 * uniform(*transform.params.shape, seed=seed).float())
    return transform.update()


EXACT = [  # size, stride there, stride here
    ((25, 17), 2, 2),
    ((25, 17), 4, 4),
    ((33, 17), (8, 4), (8, 4)),
    ((27, 31), 2, 1),
    ((28, 29), 3, 1),
    ((23, 35), (4, 6), (1, 1)),
    ((9, 17, 11), (4, 2, 5), (4, 2, 5)),
    ((8, 9, 7), 2, 1),
]


@pytest.mark.parametrize(("size", "stride", "ours"), EXACT)
def test_splines_of_deepali_come_over_and_go_back(page: Any, size: Any, stride: Any, ours: Any) -> None:
    theirs = their_spline(size, stride)
    grid, transform = page.from_grid(theirs.grid()), fnreg.FFD(stride=ours)
    coefficients = theirs.data()[0].detach()
    params, apart = page.from_spline(coefficients.double(), grid, theirs.stride, transform)
    assert float(apart) < 1e-12
    field = page.to_world(theirs.u[0].detach().double(), grid)
    assert float(field.norm(dim=0).max()) > 0.05
    assert_close(transform.displacement(params, grid), field, atol=1e-6, rtol=0)
    back, apart = page.to_spline(params, grid, transform, theirs.stride)
    assert float(apart) < 1e-12
    assert back.shape == coefficients.shape
    theirs.data_(back[None].float())
    assert_close(page.to_world(theirs.update().u[0].detach().double(), grid), field, atol=1e-6, rtol=0)


def test_splines_are_exact_between_voxels_where_the_strides_divide(page: Any) -> None:
    """14 and 10 voxels from centre to border are multiples of 2, not of 4: deepali's spline by its own formula."""
    theirs, stride = their_spline((29, 21), 4), 4
    grid, transform = page.from_grid(theirs.grid()), fnreg.FFD(stride=2)
    coefficients = theirs.data()[0].detach().double()
    params, _ = page.from_spline(coefficients, grid, theirs.stride, transform)
    index = tensor([14, 10])[:, None] * (1 + uniform(2, 40))  # (2, N) within the grid
    shares = [bspline.weights(x / stride - (x / stride).floor()) for x in index]
    value = torch.zeros(2, 40, dtype=torch.float64)
    for a in range(4):
        for b in range(4):
            x, y = ((index[k] / stride).floor().long() + n for k, n in ((0, a), (1, b)))
            value = value + shares[0][a] * shares[1][b] * coefficients[:, y, x]
    points = grid.index_to_world(index.mT)
    moved = transform.points(params, grid, points) - points
    truth = page.to_world(value, grid).mT
    assert_close(moved, truth, atol=1e-12, rtol=0)
    world = AXES["world"]
    between = theirs.points(points.float()[None], axes=world, to_axes=world)[0].detach().double() - points
    assert 1e-3 < float((between - truth).abs().max()) < 0.05  # deepali is linear between voxels


@pytest.mark.parametrize("stride", [2, 4])
def test_smooth_splines_come_over_with_an_error_that_falls_with_the_stride(page: Any, stride: int) -> None:
    """An even size: deepali's lattice begins at a voxel, that of fnreg is symmetric about the middle."""
    errors = []
    for size in (32, 64):
        grid = Grid((size, size), spacing=32 / size, center=0.0)
        x, y = (grid.points() / 8).unbind(1)
        field = torch.stack([torch.sin(x + y / 2), torch.cos(y - x / 3)]).reshape(2, size, size)
        bases = [page.deepali_basis(size, stride)] * 2
        coefficients = page.along(page.to_cube(field, grid), [torch.linalg.pinv(basis) for basis in bases])
        _, apart = page.from_spline(coefficients, grid, (stride, stride), fnreg.FFD(stride=stride))
        errors.append(float(apart))
    assert 0 < errors[0] < 2e-3 * stride
    assert errors[1] < errors[0] / 8


def test_a_velocity_comes_over_with_its_exponential_and_its_inverse(page: Any) -> None:
    grid = core.Grid(size=(25, 17), spacing=(1.0, 1.25), center=(4.0, -1.0))
    theirs = spatial.StationaryVelocityFreeFormDeformation(grid, stride=2, steps=5)
    theirs.data_(0.2 * uniform(*theirs.params.shape).float()).update()
    domain, transform = page.from_grid(grid), fnreg.SVFFD(stride=2, squarings=5)
    params, apart = page.from_spline(theirs.data()[0].detach().double(), domain, theirs.stride, transform)
    assert float(apart) < 1e-12
    found = Mapping(params, domain, transform)
    field = page.to_world(theirs.u[0].detach().double(), domain)
    assert float(field.abs().max()) > 0.5
    close = 0.02 * float(field.abs().max())  # fnreg's first step goes through its midpoint, deepali's does not
    assert_close(found.displacement(), field, atol=close, rtol=0)
    inverse = page.to_world(theirs.inverse(update_buffers=True).u[0].detach().double(), domain)
    assert_close(found.inverse().displacement(), inverse, atol=close, rtol=0)


# -- grids and images ----------------------------------------------------------------------------------------------


@two_and_three
@pytest.mark.parametrize("vectors", [False, True])
def test_coordinates(page: Any, dimension: int, vectors: bool) -> None:
    grid, other = oblique(dimension), oblique(dimension, SIZES[dimension][::-1], turn=-0.7)
    theirs, their_other = (page.to_grid(g, core.Grid) for g in (grid, other))
    axes = AXES | {"index": core.Axes.GRID}
    for a in axes:
        points = grid.convert(grid.points(), "world", a)[::7]
        for b in axes:
            for to, to_theirs in ((None, None), (other, their_other)):
                if vectors:
                    expected = theirs.transform_vectors(points.float(), axes[a], axes[b], to_grid=to_theirs)
                else:
                    expected = theirs.transform_points(points.float(), axes[a], axes[b], to_theirs, decimals=None)
                found = grid.convert(points, a, b, to, vectors=vectors)
                assert_close(found, expected.double(), atol=5 * SINGLE, rtol=SINGLE)


@two_and_three
def test_grids_over_the_same_place(page: Any, dimension: int) -> None:
    grid = oblique(dimension, (12, 8, 10)[:dimension])
    theirs = page.to_grid(grid, core.Grid)
    free = theirs.align_corners(False)  # then deepali, too, keeps the extent of the voxels
    sizes = (7, 9, 5)[:dimension]
    for found, expected in (
        (grid.resize(sizes), free.resize(sizes)),
        (grid.downsample(), free.downsample()),
        (grid.upsample(), free.upsample()),
        (grid.crop(2), theirs.crop(margin=2)),
        (grid.pad(1), theirs.pad(margin=1)),
        (grid.center_crop(5), theirs.center_crop(5)),
        (grid.center_pad(15), theirs.center_pad(15)),
    ):
        assert found.same_as(page.from_grid(expected), 1e-4), (found, expected)
    corners = page.from_grid(theirs.resize(sizes))  # with corners it keeps the centres of the outer voxels
    assert_close(corners.origin, grid.origin, atol=1e-4, rtol=0)
    assert not grid.resize(sizes).same_as(corners, 0.1)


@two_and_three
@pytest.mark.parametrize("padding", ["border", "zeros", 0.5])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_sampling(dimension: int, padding: Any, mode: Any) -> None:
    grid = Grid(SIZES[dimension])
    image = uniform(2, *grid.shape)
    cube = 1.2 * uniform(50, dimension, seed=1)
    expected = U.sample_image(image[None], cube[None], mode=mode, padding=padding)[0]
    index = grid.convert(cube, "corners", "index").mT
    assert_close(
        fnreg.sampling.interpolate(image, index, interpolation=mode, padding=padding), expected, atol=1e-12, rtol=0
    )


@two_and_three
@pytest.mark.parametrize("axes", ["corners", "cube"])
def test_an_image_is_warped_by_a_displacement(page: Any, dimension: int, axes: str) -> None:
    """Between two grids that have nothing in common; deepali's points outside repeat the border."""
    fixed, moving = oblique(dimension), oblique(dimension, SIZES[dimension][::-1], turn=0.5)
    u, values = smooth(fixed, 1.5), uniform(2, *moving.shape)
    target, source = (page.to_grid(grid, core.Grid).align_corners(axes == "corners") for grid in (fixed, moving))
    transform = spatial.DisplacementFieldTransform(target)
    transform.data_(page.to_cube(u, fixed, axes)[None].float())
    expected = spatial.ImageTransformer(transform, source=source)(values[None].float())[0].detach()
    mapping = Mapping({"displacement": u}, fixed, fnreg.Displacement())
    found = fnreg.warp(Image(values, moving), mapping, padding="border").data
    assert_close(found, expected.double(), atol=1e-4, rtol=0)
    batch = fnreg.warp(fnreg.stack([Image(values, moving)] * 2), mapping, padding="border").data
    assert_close(batch, torch.stack([found] * 2), atol=1e-12, rtol=0)


@two_and_three
def test_gaussian_smoothing_inside(dimension: int) -> None:
    image = uniform(1, *(24, 22, 21)[:dimension])
    kernel = core.kernels.gaussian1d(1.3, radius=9, dtype=torch.float64)
    expected = image[None]
    for axis in range(dimension):
        expected = U.conv1d(expected, kernel, dim=2 + axis, padding=9)
    found = fnreg.filters.gaussian(image, 1.3)
    keep = (..., *(slice(9, -9),) * dimension)
    assert found[keep].numel() > 0
    assert_close(found[keep], expected[0][keep], atol=1e-7, rtol=0)


# -- splines and fields --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(("size", "stride"), [((25, 17), (2, 4)), ((9, 17, 11), (4, 2, 5))])
def test_splines_where_lattices_coincide(size: Any, stride: Any, order: int) -> None:
    """deepali's coefficients as they are, without the last, which nothing depends on."""
    net = bspline.lattice(size, stride)
    coefficients = uniform(2, *(n + 1 for n in net.shape))
    ours = coefficients[(..., *(slice(n) for n in net.shape))]
    kernel = [
        core.bspline.cubic_bspline_interpolation_weights(s, derivative=order * (k == 0)) for k, s in enumerate(stride)
    ]
    kernel = [weights.double() for weights in kernel]
    expected = core.bspline.evaluate_cubic_bspline(coefficients[None], stride, size=size, kernel=kernel)[0]
    derivative = (order, *(0 for _ in size[1:]))
    found = bspline.evaluate(ours.contiguous(), net, derivative=derivative) * stride[0] ** order
    assert_close(found, expected, atol=1e-5, rtol=0)


@two_and_three
@pytest.mark.parametrize("steps", [0, 3, 6])
def test_exponentials_with_the_same_squarings(page: Any, dimension: int, steps: int) -> None:
    grid = oblique(dimension)
    v = smooth(grid, 2.0)
    expected = page.to_world(U.expv(page.to_cube(v, grid)[None], steps=steps)[0], grid)
    found = fields.from_shift(fields.exp_shift(fields.to_shift(v, grid), steps), grid)
    assert_close(found, expected, atol=1e-6, rtol=0)
    # The transforms begin with a step through its midpoint, which is nearer to the flow with as many squarings.
    flow = fields.from_shift(fields.exp_shift(fields.to_shift(v, grid), 12), grid)
    ours = (fnreg.SVF(squarings=steps).displacement({"velocity": v}, grid) - flow).square().mean()
    assert float(ours) < float((expected - flow).square().mean())


@two_and_three
def test_composition_brackets_and_their_series(page: Any, dimension: int) -> None:
    grid = oblique(dimension)
    v, w = smooth(grid, 0.8), smooth(grid, 0.8, seed=1)
    a, b = (page.to_cube(x, grid)[None] for x in (v, w))

    def same(found: Tensor, expected: Tensor, margin: int) -> None:
        keep = inner(grid, margin)
        assert_close(found[keep], page.to_world(expected[0], grid)[keep], atol=1e-6, rtol=0)

    assert_close(fields.compose(v, w, grid), page.to_world(U.compose_flows(a, b)[0], grid), atol=1e-6, rtol=0)
    same(fields.lie_bracket(v, w, grid), U.lie_bracket(a, b), 1)
    for terms, theirs in ((1, 0), (2, 1), (3, 3), (4, 5)):
        same(fields.bch(v, w, grid, terms=terms), U.compose_svfs(b, a, bch_terms=theirs), terms - 1 or 1)


@two_and_three
def test_derivatives_of_fields_inside(page: Any, dimension: int) -> None:
    grid = Grid(SIZES[dimension], spacing=tensor([1.0, 1.4, 0.7])[:dimension])
    u = smooth(grid, 1.0)
    cube, keep = page.to_cube(u, grid)[None], inner(grid, 1)
    assert_close(fields.determinant(u, grid)[keep], U.jacobian_det(cube)[0, 0][keep], atol=1e-6, rtol=0)
    assert_close(fields.divergence(u, grid)[keep], U.divergence(cube)[0, 0][keep], atol=1e-6, rtol=0)
    world = u[None]
    expected = U.curl(world, spacing=grid.spacing.float())[0]
    found = fields.curl(u, grid)
    assert_close(found[keep], (expected[0] if dimension == 2 else expected)[keep], atol=1e-6, rtol=0)


# -- linear maps ---------------------------------------------------------------------------------------------------


@two_and_three
def test_matrices_of_cubes(page: Any, dimension: int) -> None:
    """Any linear map between deepali's cubes is one of the world, on any grid."""
    grid = oblique(dimension)
    theirs = spatial.FullAffineTransform(page.to_grid(grid, core.Grid))
    for number, param in enumerate(theirs.parameters()):
        torch.nn.init.constant_(param, 0.1 + 0.07 * number)
    matrix = theirs.tensor()[0].detach()
    mapping = page.from_matrix(matrix, grid)
    points, world = grid.points()[::5], AXES["world"]
    expected = theirs.points(points.float()[None], axes=world, to_axes=world)[0].detach().double()
    assert_close(mapping.map_points(points), expected, atol=1e-4, rtol=0)
    assert_close(page.to_matrix(mapping, grid), matrix.double(), atol=1e-6, rtol=0)
    affine = fnreg.Affine().fit(mapping.matrix(), grid)
    assert_close(Mapping(affine, grid, fnreg.Affine()).matrix(), mapping.matrix(), atol=1e-12, rtol=0)


@two_and_three
def test_a_rigid_map_of_a_cube_is_rigid(page: Any, dimension: int) -> None:
    grid = cubic(dimension)
    theirs = spatial.RigidTransform(page.to_grid(grid, core.Grid))
    angles = uniform(1, 1 if dimension == 2 else 3)
    theirs.rotation.angles_(angles.float())
    theirs.translation.data_(torch.full((1, dimension), 0.1))
    mapping = page.from_matrix(theirs.tensor()[0].detach(), grid)
    turn = angle_to_matrix(angles[0]) if dimension == 2 else euler_to_matrix(angles[0], "ZXZ")
    assert_close(mapping.matrix()[:-1, :-1], turn, atol=1e-6, rtol=0)
    params = fnreg.Rigid().fit(mapping.matrix(), grid)
    assert_close(params["translation"], 0.1 * page.half_extent(grid), atol=1e-6, rtol=0)


@pytest.mark.parametrize("model", ["sequence", "Affine o SVF"])
def test_sequences_act_in_the_same_order(page: Any, model: str) -> None:
    grid = Grid((17, 17), center=0.0)
    v, shift = smooth(grid, 0.5), tensor([1.5, -2.0])
    domain = page.to_grid(grid, core.Grid)
    if model == "sequence":
        first = spatial.StationaryVelocityFieldTransform(domain, steps=6)
        second = spatial.Translation(domain)
        theirs = spatial.SequentialTransform(first, second)
    else:
        config = spatial.TransformConfig(transform=model, affine_model="T", scaling_and_squaring_steps=6)
        theirs = spatial.GenericSpatialTransform(domain, config=config)
        first, second = theirs["nonrigid"], theirs["translation"]
    first.data_(page.to_cube(v, grid)[None].float())
    second.data_((shift / page.half_extent(grid))[None].float())
    world, points = AXES["world"], grid.points()
    theirs.update()
    expected = theirs.points(points.float()[None], axes=world, to_axes=world)[0].detach().double()
    ours = Mapping(
        ({"velocity": v}, {"translation": shift}), grid, fnreg.Sequential((fnreg.SVF(), fnreg.Translation()))
    )
    close = 5e-3  # the first step of the flow: through its midpoint here, not there
    assert_close(ours.map_points(points), expected, atol=close, rtol=0)
    swapped = Mapping(ours.params[::-1], grid, fnreg.Sequential(ours.transform.transforms[::-1]))
    assert float((swapped.map_points(points) - expected).abs().max()) > 0.01


def test_parameters_of_linear_transforms_in_the_cube() -> None:
    """The formulas that the page gives for them."""
    grid, p = core.Grid(size=(9, 9)), torch.tensor([[0.3]])
    made = [kind(grid) for kind in (spatial.EulerRotation, spatial.AnisotropicScaling, spatial.Shearing)]
    for transform in made:
        torch.nn.init.constant_(transform.params, 0.3)
    turn, scale, shear = (transform.tensor()[0].detach() for transform in made)
    assert_close(turn, angle_to_matrix(math.pi * torch.tanh(p[0])))
    assert_close(scale, torch.eye(2) * torch.exp(torch.tanh(p - 1)))
    assert_close(shear[0, 1], torch.tan(math.pi / 4 * torch.tanh(p[0, 0])))


def test_rotations() -> None:
    angles = uniform(4, 3)
    for order in (order for order in EULER_ORDERS if order.isupper()):
        try:
            expected = U.euler_rotation_matrix(angles, order=order)
        except (NotImplementedError, ValueError):
            continue
        assert_close(euler_to_matrix(angles, order), expected, atol=1e-6, rtol=0, msg=order)
    quaternion = torch.nn.functional.normalize(uniform(4, 4, seed=1), dim=1)
    expected = U.quaternion_to_rotation_matrix(quaternion)
    assert_close(quaternion_to_matrix(quaternion), expected, atol=1e-6, rtol=0)


# -- losses and their weights --------------------------------------------------------------------------------------


@two_and_three
def test_similarities(dimension: int) -> None:
    a, b = (uniform(2, *SIZES[dimension], seed=seed) for seed in (0, 1))
    b = 0.6 * a + b
    mask = (uniform(1, *SIZES[dimension], seed=2) > 0).double()
    x, y = a[None], b[None]
    assert_close(functional.mse(a, b), L.mse_loss(x, y))
    assert_close(functional.mse(a, b, mask), L.mse_loss(x, y, mask=mask[None].expand_as(x)))
    assert_close(functional.mse(a, b) * a.numel(), L.ssd_loss(x, y))
    assert_close(functional.mae(a, b), L.mae_loss(x, y))
    assert_close(functional.huber(a, b, delta=0.3), L.huber_loss(x, y, delta=0.3))
    correlation = 1 - functional.ncc(a[:1], b[:1])  # with more channels deepali takes one mean over all of them
    assert_close(1 - correlation**2, L.ncc_loss(x[:, :1], y[:, :1]).double(), atol=1e-5, rtol=0)


def test_the_loss_of_a_batch_is_the_mean_of_what_each_pair_has() -> None:
    fixed, moving = ([Image(uniform(1, 9, 8, seed=seed + n)) for n in range(3)] for seed in (0, 5))
    identity = fnreg.linear_mapping(torch.eye(3), fixed[0].grid)
    values, _ = fnreg.evaluate(fnreg.stack(fixed), fnreg.stack(moving), identity)
    assert values.shape == (3,)
    x, y = (torch.stack([image.data for image in images]) for images in (moving, fixed))
    assert_close(values.mean(), L.mse_loss(x, y))


@two_and_three
def test_the_loss_class_divides_by_the_largest_difference(dimension: int) -> None:
    a, b = (uniform(1, 1, *SIZES[dimension], seed=seed) for seed in (0, 1))
    module = pytest.importorskip("deepali.losses").MSE(a, b)
    largest = torch.maximum((a.max() - b.min()).abs(), (b.max() - a.min()).abs())
    assert_close(module(a, b), functional.mse(a[0], b[0]) / largest**2)


@two_and_three
@pytest.mark.parametrize("name", ["diffusion", "divergence", "elasticity"])
def test_first_order_penalties_of_linear_fields(page: Any, dimension: int, name: str) -> None:
    grid = cubic(dimension)
    slope = uniform(dimension, dimension)
    u = ((grid.points() - grid.center) @ slope.mT).mT.reshape(dimension, *grid.shape)
    cube, field = page.to_cube(u, grid)[None], DenseField(u, grid.spacing)
    if name == "elasticity":
        expected = L.elasticity_loss(cube, first_parameter=0.7, second_parameter=0.4)
        found = penalties.elasticity(field, lam=0.7, mu=0.4)
    else:
        expected = getattr(L, f"{name}_loss")(cube)
        found = getattr(penalties, name)(field) / 2
    assert_close(found, expected, atol=0, rtol=1e-6)
    truth = {
        "diffusion": slope.square().sum() / 2,
        "divergence": slope.trace() ** 2 / 2,
        "elasticity": 0.4 * ((slope + slope.mT) / 2).square().sum() + 0.35 * slope.trace() ** 2,
    }
    assert_close(found, truth[name], atol=0, rtol=1e-9)


def test_divergence_has_one_weight_on_every_grid(page: Any) -> None:
    grid = Grid((21, 9), spacing=(0.5, 3.0))
    u = ((grid.points() - grid.center) @ tensor([[0.3, -0.2], [0.5, 0.1]]).mT).mT.reshape(2, *grid.shape)
    expected = L.divergence_loss(page.to_cube(u, grid)[None])
    assert_close(penalties.divergence(DenseField(u, grid.spacing)) / 2, expected, atol=0, rtol=1e-6)


@two_and_three
@pytest.mark.parametrize("name", ["bending", "curvature"])
def test_second_order_penalties_of_parabolas_inside(page: Any, dimension: int, name: str) -> None:
    grid = Grid((17, 9, 17)[:dimension], spacing=tensor([1.0, 2.0, 1.0])[:dimension])
    u = polynomial(grid, 2)
    loss = getattr(L, f"{name}_loss")(page.to_cube(u, grid)[None], reduction="none")[0]
    expected = loss[inner(grid, 3)].mean()
    h = float(page.half_extent(grid)[0])
    found = getattr(penalties, name)(DenseField(u, grid.spacing))
    assert_close((0.5 if name == "curvature" else 1.0) * h**2 * found, expected, atol=0, rtol=1e-6)


def test_adams_rate_in_voxels_is_that_in_the_cube(page: Any) -> None:
    """The first step of Adam is the rate itself in every coefficient, there in the cube, here in voxels."""
    grid = Grid((65, 33), spacing=(0.5, 2.0))
    theirs = spatial.FreeFormDeformation(page.to_grid(grid, core.Grid), stride=4)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    (-theirs.params.sum()).backward()
    optimizer.step()
    moved = fields.to_shift(page.to_world(theirs.update().u[0].detach().double(), grid), grid)
    assert_close(moved, (0.01 * tensor([64, 32]) / 2).reshape(2, 1, 1).expand(moved.shape), atol=1e-5, rtol=0)
    transform = fnreg.FFD(stride=4)
    step = {"coefficients": torch.full_like(transform.init(grid)["coefficients"], 0.3)}
    params = transform.retract(transform.init(grid), step, grid)
    ours = fields.to_shift(transform.displacement(params, grid), grid)
    assert_close(ours, torch.full_like(ours, 0.3))


# -- where deepali is wrong ----------------------------------------------------------------------------------------


def test_rigid_is_rigid_on_any_grid(page: Any) -> None:
    grid = Grid((41, 21))
    theirs = spatial.EulerRotation(page.to_grid(grid, core.Grid))
    theirs.angles_(torch.tensor([[0.5]]))
    linear = page.from_matrix(theirs.matrix()[0].detach(), grid).matrix()[:2, :2]
    turn = {"rotation": tensor([0.5])}
    ours = fnreg.Rotation().matrix(turn, grid)[:2, :2]
    eye = torch.eye(2, dtype=torch.float64)
    assert_close(ours.mT @ ours, eye)
    assert float((linear.mT @ linear - eye).abs().max()) > 0.1


def test_transforms_start_at_the_identity(page: Any) -> None:
    grid = cubic(3)
    eye = torch.eye(3, 4)
    for theirs, ours in (
        (spatial.QuaternionRotation, fnreg.Rotation()),
        (spatial.HomogeneousTransform, fnreg.Homogeneous()),
    ):
        assert float((theirs(page.to_grid(grid, core.Grid)).matrix()[0].detach() - eye).abs().max()) >= 1
        assert_close(ours.matrix(ours.init(grid), grid)[:-1], eye.double())


def test_all_rotations_have_a_derivative_at_the_identity() -> None:
    grid = cubic(3)
    theirs = torch.func.jacrev(lambda a: U.euler_rotation_matrix(a[None])[0])(torch.zeros(3))
    assert int(torch.linalg.matrix_rank(theirs.reshape(9, 3))) == 2
    turn = fnreg.Rotation()

    def matrix(step: Tensor) -> Tensor:
        return turn.matrix(turn.retract(turn.init(grid), {"rotation": step}, grid), grid)

    ours = torch.func.jacrev(matrix)(torch.zeros(3, dtype=torch.float64))
    assert int(torch.linalg.matrix_rank(ours.reshape(16, 3))) == 3


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_bending_of_a_spline_does_not_depend_on_the_lattice(page: Any, stride: int) -> None:
    """u = x^2 / 8 along x: the second derivative is 1 / 4, the bending energy 1 / 16 on every lattice."""
    n = 17
    count = U.cubic_bspline_control_point_grid_size((n, n), stride)
    x = (torch.arange(count[0], dtype=torch.float64) - 1) * stride - (n - 1) / 2
    coefficients = torch.zeros(2, count[1], count[0], dtype=torch.float64)
    coefficients[0] = x**2 / 8  # the spline differs from it by a constant
    grid = Grid((n, n))
    h, truth = (n - 1) / 2, tensor(1 / 16)
    theirs = L.bspline_bending_loss(page.to_cube(coefficients, grid)[None]) / h**2
    ratio = stride * (count[0] - 1) / (n - 1)
    assert_close(theirs, truth * ratio**4, atol=0, rtol=1e-5)  # the factor b^4 of the page
    assert float(theirs) > 1.5 * float(truth)
    transform = fnreg.FFD(stride=stride)
    params, apart = page.from_spline(page.to_cube(coefficients, grid), grid, (stride, stride), transform)
    assert float(apart) < 1e-9
    ours = SplineField(params["coefficients"], grid.spacing, transform.lattice(grid))
    assert_close(penalties.bending(ours), truth, atol=0, rtol=1e-6)


def test_bending_of_an_affine_field_is_zero(page: Any) -> None:
    grid = Grid((13, 13))
    u = ((grid.points() - grid.center) @ tensor([[0.1, 0.2], [-0.3, 0.2]]).mT).mT.reshape(2, *grid.shape)
    assert float(L.bending_loss(page.to_cube(u, grid)[None])) > 1e-3
    assert_close(penalties.bending(DenseField(u, grid.spacing)), tensor(0.0), atol=1e-20, rtol=0)


def test_second_derivatives_of_a_parabola_at_the_border() -> None:
    x = torch.arange(9, dtype=torch.float64)
    theirs = U.spatial_derivatives((x**2).expand(1, 1, 9, 9), which="xx")["xx"][0, 0, 4]
    assert_close(theirs[2:-2], torch.full((5,), 2.0, dtype=torch.float64))
    assert_close(theirs[:2], tensor([1.0, 1.5]))
    u = torch.stack([(x**2).expand(9, 9), torch.zeros(9, 9, dtype=torch.float64)])
    assert_close(penalties.bending(DenseField(u, tensor([1.0, 1.0]))), tensor(4.0))


def test_a_pyramid_keeps_constants_and_begins_with_the_image() -> None:
    theirs = data.Image(torch.ones(1, 24, 24), core.Grid(size=(24, 24))).pyramid(4)
    assert theirs[0].shape[1:] == (17, 17)
    assert float(theirs[1].tensor().min()) < 0.65
    ours = Image(torch.ones(1, 24, 24)).pyramid(3)
    assert ours[0].grid.size == (24, 24)
    for image in ours:
        assert_close(image.data, torch.ones_like(image.data))


def test_resampling_to_a_spacing_keeps_the_world() -> None:
    """The image is its own x coordinate."""
    grid = Grid((21, 21), center=0.0)
    ramp = grid.points()[:, 0].reshape(1, 21, 21)
    theirs = data.Image(ramp.float(), core.Grid(size=(21, 21))).pyramid(1, spacing=1.5)[0]
    where = theirs.grid().points()[..., 0]
    assert float((theirs.tensor()[0] - where).abs()[1:-1, 1:-1].max()) > 0.2
    ours = Image(ramp, grid).resample(grid.resample(1.5))
    inside = (ours.grid.points().abs() <= 10).all(1)
    assert_close(ours.data.flatten()[inside], ours.grid.points()[inside, 0])


def test_a_map_on_a_part_of_its_domain_is_sampled_there(page: Any) -> None:
    """A displacement along x that is x / 4 about the left border, seen on the left half."""
    grid = Grid((21, 21), center=0.0)
    part = grid.roi((0, 0), (11, 21))
    ramp = grid.points()[:, 0].reshape(1, 21, 21)
    u = torch.stack([(ramp[0] + 10) / 8, torch.zeros(21, 21, dtype=torch.float64)])
    transform = spatial.DisplacementFieldTransform(page.to_grid(grid, core.Grid))
    transform.data_(page.to_cube(u, grid)[None].float())
    target, source = page.to_grid(part, core.Grid), page.to_grid(grid, core.Grid)
    theirs = spatial.ImageTransformer(transform, target=target, source=source)(ramp[None].float())[0].detach()
    x = part.points()[:, 0].reshape(1, 21, 11)
    truth = x + (x + 10) / 8
    assert float((theirs - truth).abs().max()) > 0.5
    mapping = Mapping({"displacement": u}, grid, fnreg.Displacement())
    assert_close(fnreg.warp(Image(ramp, grid), mapping, part).data, truth, atol=1e-9, rtol=0)


def test_an_inverse_is_one_at_once(page: Any) -> None:
    grid = Grid((17, 17))
    v = smooth(grid, 1.0)
    theirs = spatial.StationaryVelocityFieldTransform(page.to_grid(grid, core.Grid))
    theirs.data_(page.to_cube(v, grid)[None].float()).update()
    assert torch.equal(theirs.inverse().disp(), theirs.disp())  # the forward field
    mapping = Mapping({"velocity": v}, grid, fnreg.SVF())
    there = mapping.displacement()
    back = fields.compose(there, mapping.inverse().displacement(), grid)[inner(grid, 3)]
    assert float(back.norm(dim=0).max()) < 0.1 < float(there.norm(dim=0).max())


def test_parameters_are_seen_at_once(page: Any) -> None:
    grid = Grid((17, 17))
    theirs = spatial.FreeFormDeformation(page.to_grid(grid, core.Grid), stride=4).update()
    with torch.no_grad():
        theirs.params.fill_(0.3)
    assert float(theirs.disp().detach().abs().max()) == 0
    transform = fnreg.FFD(stride=4)
    params = {"coefficients": torch.full_like(transform.init(grid)["coefficients"], 0.3)}
    field = Mapping(params, grid, transform).displacement()
    assert_close(field, torch.full_like(field, 0.3))


def test_coordinates_have_derivatives() -> None:
    points = (0.5 * uniform(3, 2)).float().requires_grad_()
    theirs = core.Grid(size=(9, 9)).transform_points(points, core.Axes.WORLD, core.Axes.CUBE_CORNERS)
    assert not theirs.requires_grad or float(torch.autograd.grad(theirs.sum(), points)[0].abs().max()) == 0
    grid = Grid((9, 9), center=0.0)
    slope = torch.func.grad(lambda p: grid.convert(p, "world", "corners").sum())(points.detach().double())
    assert_close(slope, torch.full_like(slope, 1 / 4))


def test_fields_of_the_world_are_exponentiated_in_the_world(page: Any) -> None:
    grid = Grid((33, 33), spacing=0.5, center=0.0)
    v = smooth(grid, 1.0)
    flow = data.FlowField(v.float(), page.to_grid(grid, core.Grid), core.Axes.WORLD)
    theirs = flow.batch().exp(steps=6).axes(core.Axes.WORLD).tensor()[0].double()
    ours = fields.exp(v, grid, squarings=6)
    finer = fields.exp(v, grid, squarings=10)
    assert_close(ours, finer, atol=1e-2, rtol=0)
    assert float((theirs - finer).norm(dim=0).max()) > 0.1


def test_angles_of_a_rotation() -> None:
    angles = tensor([[0.3, 0.5, -0.8]])
    theirs = U.euler_rotation_angles(euler_to_matrix(angles, "ZXZ"), order="ZXZ")
    assert float((theirs - angles).abs().max()) > 0.1
    assert_close(matrix_to_euler(euler_to_matrix(angles, "ZXZ"), "ZXZ"), angles)
    turn = tensor([-0.4])
    assert float(U.euler_rotation_angles(angle_to_matrix(turn)[None]).flatten()[0]) > 0
    assert_close(matrix_to_angle(angle_to_matrix(turn)), turn)


def test_a_smooth_absolute_error_heeds_its_parameter() -> None:
    a, b = (uniform(1, 1, 8, 8, seed=seed) for seed in (0, 1))
    losses = pytest.importorskip("deepali.losses")
    theirs = [float(losses.SmoothL1ImageLoss(beta=beta)(a, b)) for beta in (0.1, 1.0)]
    assert theirs[0] == theirs[1]
    for delta in (0.1, 1.0):
        away = (a - b).abs()
        truth = torch.where(away <= delta, away**2 / 2, delta * (away - delta / 2)).mean()
        assert_close(functional.huber(a[0], b[0], delta=delta), truth)


def test_an_image_is_normalised_for_itself() -> None:
    batch = torch.stack([uniform(1, 8, 8), 10 * uniform(1, 8, 8, seed=1)])
    theirs = U.normalize_image(batch, mode="unit")
    assert float(theirs[0].max()) < 0.6
    ours = torch.func.vmap(lambda values: Image(values, Grid((8, 8))).normalize("range").data)(batch)
    assert_close(ours.amax((1, 2, 3)), torch.ones(2, dtype=torch.float64))
    assert_close(ours.amin((1, 2, 3)), torch.zeros(2, dtype=torch.float64))


def test_the_world_is_large() -> None:
    far = 1e8 + 1
    assert float(core.Grid(size=(3, 3), center=(far, 0.0)).center()[0]) == 1e8
    assert float(Grid((3, 3), center=(far, 0.0)).center[0]) == far


def test_an_axis_may_become_one_voxel() -> None:
    with pytest.raises(AssertionError):
        core.Grid(size=(8, 8)).resize((8, 1))
    thin = Grid((8, 8), center=0.0).resize((8, 1))
    assert_close(thin.extent, tensor([8.0, 8.0]))
    assert_close(thin.center, tensor([0.0, 0.0]))
