"""Penalties against closed forms, quadrature and each other; what must not change them; derivatives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import tensor, uniform
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import grad, vmap
from torch.testing import assert_close

import fnreg
from fnreg import bspline
from fnreg.derivatives import determinant_of
from fnreg.grid import index_points
from fnreg.losses import penalties
from fnreg.losses.penalties import DenseField, Field, SplineField
from fnreg.losses.terms import PENALTIES

SIZES = {1: (13,), 2: (9, 6), 3: (6, 5, 7)}
SPACING = (0.7, 1.5, 1.1)
EQUATIONS: dict[str, Callable[..., Tensor]] = {
    name: getattr(penalties, name) for name in PENALTIES if hasattr(penalties, name)
}
SQUARES = ("bending", "diffusion", "curvature", "elasticity", "divergence")
dimensions = pytest.mark.parametrize("dimension", [1, 2, 3])
every_penalty = pytest.mark.parametrize("name", EQUATIONS)
every_kind = pytest.mark.parametrize("kind", ["dense", "spline"])
both_ways = pytest.mark.parametrize("whole", [0, 10**6], ids=["axis by axis", "in one matrix"])


def spacings(dimension: int) -> Tensor:
    return tensor(SPACING[:dimension])


def positions(size: tuple[int, ...], spacing: Tensor) -> Tensor:
    """Of the voxels along the grid's axes, from its centre, (D, N)."""
    index = index_points(size, torch.float64, torch.device("cpu"))[:-1]
    return (index - (tensor(size)[:, None] - 1) / 2) * spacing[:, None]


def sampled(function: Callable[[Tensor], Tensor], size: tuple[int, ...], spacing: Tensor) -> Tensor:
    """A field of positions (D, N) at the voxels."""
    return function(positions(size, spacing)).reshape(len(size), *size[::-1])


def made(
    kind: str, vectors: Tensor, spacing: Tensor, stride: int = 2, dtype: torch.dtype = torch.float64, fine: bool = True
) -> Field:
    """A field through the vectors at the voxels; exactly so for a spline where they are cubic polynomials."""
    if kind == "dense":
        return DenseField(vectors.to(dtype), spacing)
    net = bspline.lattice(vectors.shape[:0:-1], [min(stride, n) for n in vectors.shape[:0:-1]])
    return SplineField(bspline.fit(vectors, net).to(dtype), spacing, net)


def rough(kind: str, dimension: int, seed: int = 0, scale: float = 0.2) -> Field:
    """Random numbers as values or as coefficients."""
    size = SIZES[dimension]
    if kind == "dense":
        return DenseField(scale * uniform(dimension, *size[::-1], seed=seed), spacings(dimension))
    net = bspline.lattice(size, 2)
    return SplineField(3 * scale * uniform(dimension, *net.shape, seed=seed), spacings(dimension), net)


def values(field: Field) -> Tensor:
    return field.vectors if isinstance(field, DenseField) else field.coefficients


def changed(field: Field, values: Tensor, spacing: Tensor | None = None) -> Field:
    """The same kind of field with other values and spacing."""
    spacing = field.spacing if spacing is None else spacing
    if isinstance(field, DenseField):
        return DenseField(values, spacing)
    return SplineField(values, spacing, field.lattice, field.size)


# -- closed forms --------------------------------------------------------------------------------------------------


@every_kind
@dimensions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=st.integers(0, 999), data=st.data())
def test_affine_fields(kind: str, dimension: int, dtype: torch.dtype, seed: int, data: st.DataObject) -> None:
    """At any resolution and spacing, what the matrix of u(x) = A x + b says."""
    a = 0.4 * uniform(dimension, dimension, seed=seed)
    b = 10 * uniform(dimension, 1, seed=seed + 1)
    size = tuple(data.draw(st.integers(3, 9)) for _ in range(dimension))
    spacing = 2 ** uniform(dimension, seed=seed + 2)
    field = made(kind, sampled(lambda x: a @ x + b, size, spacing), spacing, dtype=dtype)
    strain, trace = (a + a.mT) / 2, torch.trace(a)
    determinant = torch.linalg.det(torch.eye(dimension) + a)
    log = torch.log(determinant.clamp(min=0.05)) + (determinant - 0.05).clamp(max=0) / 0.05
    expected = {
        "bending": tensor(0.0),
        "curvature": tensor(0.0),
        "diffusion": a.square().sum(),
        "divergence": trace**2,
        "elasticity": strain.square().sum() + trace**2 / 2,
        "total_variation": (a.square().sum() + 1e-6).sqrt(),
        "folding": (0.1 - determinant).clamp(min=0) ** 2,
        "log_jacobian": log**2,
    }
    assert set(expected) == set(EQUATIONS)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    for name, equation in EQUATIONS.items():
        found = equation(field)
        assert found.dtype == dtype and found.shape == ()
        slack = tolerance * max(1.0, float(expected[name]))
        assert abs(float(found) - float(expected[name])) < slack, (name, found, expected[name])
    assert abs(float(penalties.elasticity(field, mu=0.3, lam=0.0)) - 0.3 * float(strain.square().sum())) < tolerance
    assert abs(float(penalties.elasticity(field, mu=0.0, lam=3.0)) - 1.5 * float(trace**2)) < 4 * tolerance


@every_kind
@dimensions
@given(seed=st.integers(0, 999), data=st.data())
def test_quadratic_fields(kind: str, dimension: int, seed: int, data: st.DataObject) -> None:
    """u_i(x) = x^T Q_i x / 2: its second derivatives are Q_i everywhere, at the borders too; splines know the first."""
    q = uniform(dimension, dimension, dimension, seed=seed)
    q = (q + q.mT) / 2
    size = tuple(data.draw(st.integers(4, 9)) for _ in range(dimension))
    spacing = 2 ** uniform(dimension, seed=seed + 2)
    field = made(kind, sampled(lambda x: torch.einsum("ijk,jn,kn->in", q, x, x) / 2, size, spacing), spacing)
    assert_close(penalties.bending(field), q.square().sum())
    assert_close(penalties.curvature(field), q.diagonal(dim1=1, dim2=2).sum(1).square().sum())
    if kind == "spline":
        half = spacing * (tensor(size) - 1) / 2  # the mean of x_k^2 over [-h, h] is h^2 / 3
        assert_close(penalties.diffusion(field), (q.square() * (half**2 / 3)).sum())
        assert_close(penalties.divergence(field), (torch.einsum("iik->k", q).square() * (half**2 / 3)).sum())


def test_one_dimension_by_hand() -> None:
    """u = 0, 1, 0, 2 two apart: steps 1, -1, 2 over 2, bends -2, 3 over 4."""
    field = DenseField(tensor([[0, 1, 0, 2]]), tensor([2.0]))
    assert_close(penalties.diffusion(field), tensor((1 + 1 + 4) / 4 / 3))
    assert_close(penalties.bending(field), tensor((4 + 9) / 16 / 2))
    assert_close(penalties.curvature(field), penalties.bending(field))
    assert_close(penalties.divergence(field), penalties.diffusion(field))


@both_ways
@dimensions
def test_means_of_splines_are_integrals(dimension: int, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gauss-Legendre on each half of each voxel, between which lie all knots."""
    monkeypatch.setattr(penalties, "WHOLE", whole)
    size, stride = {1: ((13,), 3), 2: ((8, 5), 2), 3: ((5, 4, 3), 2)}[dimension]
    net = bspline.lattice(size, stride)
    spacing = spacings(dimension)
    field = SplineField(uniform(dimension, *net.shape), spacing, net)
    nodes, shares = np.polynomial.legendre.leggauss(4)
    axes = [(np.arange(2 * (n - 1))[:, None] / 2 + (nodes + 1) / 4).reshape(-1) for n in size]
    parts = [np.tile(shares / 4, 2 * (n - 1)) / (n - 1) for n in size]
    points = torch.as_tensor(np.stack([x.reshape(-1) for x in np.meshgrid(*axes, indexing="ij")]))
    share = torch.as_tensor(np.prod([x.reshape(-1) for x in np.meshgrid(*parts, indexing="ij")], axis=0))
    assert_close(share.sum(), tensor(1.0))

    def derivative(*ks: int) -> Tensor:
        orders = tuple(ks.count(k) for k in range(dimension))
        scale = math.prod(float(spacing[k]) for k in ks)
        return bspline.evaluate_at(field.coefficients, net, points, derivative=orders) / scale

    slope = torch.stack([derivative(k) for k in range(dimension)])  # (k, i, N)
    bend = torch.stack([torch.stack([derivative(j, k) for k in range(dimension)]) for j in range(dimension)])
    trace = slope.diagonal().sum(-1)
    strain = (slope + slope.transpose(0, 1)) / 2
    expected = {
        "diffusion": (slope.square().sum((0, 1)) * share).sum(),
        "bending": (bend.square().sum((0, 1, 2)) * share).sum(),
        "curvature": (bend.diagonal().sum(-1).square().sum(0) * share).sum(),
        "divergence": (trace.square() * share).sum(),
        "elasticity": ((0.7 * strain.square().sum((0, 1)) + 0.9 / 2 * trace.square()) * share).sum(),
    }
    for name, value in expected.items():
        options = {"mu": 0.7, "lam": 0.9} if name == "elasticity" else {}
        assert_close(EQUATIONS[name](field, **options), value, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["total_variation", "folding", "log_jacobian"])
@every_kind
@dimensions
def test_means_over_voxels(name: str, kind: str, dimension: int) -> None:
    """Of the derivative that autograd takes of the spline, and of NumPy's for voxels."""
    field = rough(kind, dimension, scale=1.5)
    size, spacing = SIZES[dimension], spacings(dimension)
    if isinstance(field, SplineField):
        index = index_points(size, torch.float64, torch.device("cpu"))[:-1]
        each = [
            grad(lambda x, i=i: bspline.evaluate_at(field.coefficients, field.lattice, x)[i].sum())(index)
            for i in range(dimension)
        ]
        slope = torch.stack(each) / spacing[:, None]  # (i, k, N)
    else:
        numpy = [
            np.stack([np.gradient(u, float(s), axis=-1 - k, edge_order=2) for k, s in enumerate(spacing)])
            for u in field.vectors.numpy()
        ]
        slope = torch.as_tensor(np.stack(numpy)).flatten(2)
    determinant = torch.linalg.det((slope + torch.eye(dimension)[..., None]).permute(2, 0, 1))
    assert (determinant < 0.05).any() and (determinant > 0.3).any()
    expected = {
        "total_variation": (slope.square().sum((0, 1)) + 0.2**2).sqrt(),
        "folding": (0.3 - determinant).clamp(min=0) ** 2,
        "log_jacobian": torch.where(
            determinant > 0.2, determinant.clamp(min=0.2).log(), math.log(0.2) + determinant / 0.2 - 1
        ).square(),
    }
    option = {"total_variation": {"eps": 0.2}, "folding": {"margin": 0.3}, "log_jacobian": {"floor": 0.2}}[name]
    assert_close(EQUATIONS[name](field, **option), expected[name].mean())


# -- what must not change them -------------------------------------------------------------------------------------


def waves(x: Tensor) -> Tensor:
    """A smooth field without symmetry, its lengths of the order of a tenth."""
    phases = torch.arange(1.0, 1 + len(x), dtype=x.dtype)
    return torch.stack(
        [-0.1 * torch.sin((phases * (1 + 0.2 * i) + 0.3).unsqueeze(0) @ x + i)[0] for i in range(len(x))]
    )


@every_penalty
@pytest.mark.parametrize("dimension", [1, 2])
def test_voxels_and_splines_converge_to_one_value(name: str, dimension: int) -> None:
    """On one extent; to first order where the voxels with second derivatives reach less far, else to second order."""
    option = {"margin": 0.99} if name == "folding" else {}
    apart, splines = [], []
    for n in (16, 32, 64):
        size = (n, n + 8)[:dimension]
        spacing = 2.0 / tensor(size)
        vectors = sampled(waves, size, spacing)
        dense = EQUATIONS[name](made("dense", vectors, spacing), **option)
        spline = EQUATIONS[name](made("spline", vectors, spacing, stride=1), **option)
        apart.append(abs(float(dense - spline)) / float(spline))
        splines.append(float(spline))
    order = 1.8 if name in ("bending", "curvature") else 2.5 if name != "folding" else 1.5
    assert apart[2] < 0.03
    assert apart[0] / apart[1] > order and apart[1] / apart[2] > order
    assert abs(splines[2] - splines[1]) < 0.05 * splines[2]


@every_penalty
@every_kind
@pytest.mark.parametrize("dimension", [2, 3])
@given(data=st.data())
def test_storage_does_not_matter(name: str, kind: str, dimension: int, data: st.DataObject) -> None:
    """Flips and another order of the axes; a turn of the grid is no part of a field at all."""
    flips = [k for k in range(dimension) if data.draw(st.booleans())]
    order = data.draw(st.permutations(range(dimension)))
    size, stride = SIZES[dimension], (2, 3, 4)[:dimension]
    spacing = spacings(dimension)
    net = bspline.lattice(size, stride)
    shape = net.shape if kind == "spline" else size[::-1]
    before = 2 * uniform(dimension, *shape, seed=data.draw(st.integers(0, 99)))
    signs = tensor([-1.0 if k in flips else 1.0 for k in range(dimension)])
    after = (before * signs.reshape(-1, *(1,) * dimension)).flip([dimension - k for k in flips])
    after = after[order].permute(0, *(dimension - k for k in reversed(order)))
    moved = spacing[order]
    if kind == "dense":
        fields: list[Field] = [DenseField(before, spacing), DenseField(after, moved)]
    else:
        other = bspline.lattice([size[k] for k in order], [stride[k] for k in order])
        fields = [SplineField(before, spacing, net), SplineField(after, moved, other)]
    option = {"margin": 0.9} if name == "folding" else {}
    found = [EQUATIONS[name](field, **option) for field in fields]
    assert float(found[0]) > 0
    assert_close(found[1], found[0], rtol=1e-11, atol=0)


@every_penalty
@dimensions
def test_refined_lattices_have_the_same_value(name: str, dimension: int) -> None:
    net = bspline.lattice({1: (17,), 2: (14, 9), 3: (9, 8, 10)}[dimension], 4)
    field = SplineField(uniform(dimension, *net.shape), spacings(dimension), net)
    half = tuple(k != 1 for k in range(dimension))
    for axes in (half, (True,) * dimension):
        finer = SplineField(
            bspline.subdivide(field.coefficients, net, axes=axes), field.spacing, net.halved(axes), size=field.size
        )
        assert_close(EQUATIONS[name](finer), EQUATIONS[name](field), rtol=1e-11, atol=0)


@every_kind
@dimensions
@given(factor=st.floats(0.1, 10))
def test_units(kind: str, dimension: int, factor: float) -> None:
    """Lengths in another unit: strains have none, second derivatives one over length."""
    field = rough(kind, dimension)
    other = changed(field, factor * values(field), factor * field.spacing)
    for name, equation in EQUATIONS.items():
        power = -2 if name in ("bending", "curvature") else 0
        assert_close(equation(other), equation(field) * factor**power, rtol=1e-9, atol=1e-12)


@every_kind
@dimensions
@given(seed=st.integers(0, 999))
def test_squares_are_not_negative_and_grow_with_the_square(kind: str, dimension: int, seed: int) -> None:
    field = rough(kind, dimension, seed)
    for name in SQUARES:
        value = EQUATIONS[name](field)
        assert float(value) >= 0
        assert_close(EQUATIONS[name](changed(field, -3 * values(field))), 9 * value)


@pytest.mark.parametrize("dimension", [2, 3])
def test_a_checkerboard_is_not_smooth(dimension: int) -> None:
    """Means of differences over whole cells would not see it."""
    board = (-1) ** index_points(SIZES[dimension], torch.float64, torch.device("cpu"))[:-1].sum(0)
    field = DenseField(
        board.reshape(1, *SIZES[dimension][::-1]).repeat(dimension, *(1,) * dimension), spacings(dimension)
    )
    for name in SQUARES:
        assert float(EQUATIONS[name](field)) > 1, name


@every_kind
def test_an_axis_of_one_voxel_has_no_derivative(kind: str) -> None:
    """Of a slice the means are those of two axes."""
    spacing = tensor([0.7, 1.5, 1.1])
    vectors = uniform(3, 1, 6, 9)
    flat = made(kind, vectors, spacing, stride=2)
    stride = 2
    if kind == "spline":
        net = bspline.lattice((9, 6, 1), (stride, stride, 1))
        flat = SplineField(bspline.fit(vectors, net), spacing, net)
    plane = made(kind, vectors[:2, 0], spacing[:2])
    third = made(kind, torch.stack([vectors[2, 0], torch.zeros(6, 9)]), spacing[:2])
    for name in ("diffusion", "bending", "curvature"):
        assert_close(EQUATIONS[name](flat), EQUATIONS[name](plane) + EQUATIONS[name](third))
    assert_close(penalties.divergence(flat), penalties.divergence(plane))
    assert_close(penalties.folding(flat), penalties.folding(plane))
    point = made(kind, vectors[:2, :, :1, :1][:, 0], spacing[:2], stride=1)
    for name in SQUARES:
        assert float(EQUATIONS[name](point)) == 0


@both_ways
def test_a_translation_costs_nothing_in_single_precision(whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalties, "WHOLE", whole)
    net = bspline.lattice((40, 30), 4)
    field = SplineField(torch.full((2, *net.shape), 100.0), spacings(2), net)
    for name in SQUARES:
        assert abs(float(EQUATIONS[name](field))) < 1e-9, name


# -- batches and derivatives ---------------------------------------------------------------------------------------


@every_penalty
@every_kind
@dimensions
def test_a_batch_is_its_fields(name: str, kind: str, dimension: int) -> None:
    """With a spacing for each, their gradients too."""
    field = rough(kind, dimension)
    several = torch.stack([values(rough(kind, dimension, seed)) for seed in range(3)])
    spacing = torch.stack([field.spacing * (1 + 0.2 * b) for b in range(3)])

    def value(v: Tensor, s: Tensor) -> Tensor:
        return EQUATIONS[name](changed(field, v, s))

    pairs = list(zip(several, spacing, strict=True))
    assert_close(vmap(value)(several, spacing), torch.stack([value(*pair) for pair in pairs]))
    by_values = vmap(grad(value))(several, spacing)
    assert_close(by_values, torch.stack([grad(value)(*pair) for pair in pairs]))
    assert_close(
        vmap(value, in_dims=(0, None))(several, spacing[1]), torch.stack([value(v, spacing[1]) for v in several])
    )


@every_penalty
@every_kind
@dimensions
def test_gradients(name: str, kind: str, dimension: int) -> None:
    size = {1: (6,), 2: (4, 3), 3: (3, 2, 3)}[dimension]
    net = bspline.lattice(size, 2)
    shape = net.shape if kind == "spline" else size[::-1]
    start = (0.5 * uniform(dimension, *shape, seed=4)).requires_grad_()
    field = DenseField(start, spacings(dimension)) if kind == "dense" else SplineField(start, spacings(dimension), net)
    option = {"folding": {"margin": 0.7}, "total_variation": {"eps": 0.1}}.get(name, {})

    def value(v: Tensor, s: Tensor) -> Tensor:
        return EQUATIONS[name](changed(field, v, s), **option)

    gradcheck(value, (start, spacings(dimension).requires_grad_()), check_batched_grad=True)


@pytest.mark.parametrize("name", ["folding", "log_jacobian"])
@every_kind
@pytest.mark.parametrize("dimension", [1, 2])
def test_a_fold_is_pushed_out(name: str, kind: str, dimension: int) -> None:
    """Down the gradient the smallest determinant grows from below zero to above it."""
    size, spacing = SIZES[dimension], spacings(dimension)
    field = made(kind, sampled(lambda x: -2 * x * torch.exp(-x.square().sum(0) / 8), size, spacing), spacing, stride=1)

    def least(field: Field) -> float:
        return float(determinant_of(field.jacobian()).min())

    assert least(field) < 0
    for _ in range(200):
        slope = grad(lambda v, field=field: EQUATIONS[name](changed(field, v)))(values(field))
        assert slope.isfinite().all()
        field = changed(field, values(field) - 0.05 * slope / slope.norm().clamp(min=1e-2))
    assert least(field) > 0


def test_the_identity_costs_nothing() -> None:
    for kind, dimension in itertools.product(("dense", "spline"), (1, 2, 3)):
        field = rough(kind, dimension)
        still = changed(field, torch.zeros_like(values(field)))
        for name, equation in EQUATIONS.items():
            assert float(equation(still)) == pytest.approx(1e-3 if name == "total_variation" else 0, abs=1e-15)
            slope = grad(lambda v, equation=equation, still=still: equation(changed(still, v)))(values(still))
            assert float(slope.abs().max()) < 1e-14


# -- bad input, terms ----------------------------------------------------------------------------------------------


@every_penalty
@every_kind
def test_what_is_not_a_number_stays_so(name: str, kind: str) -> None:
    field = rough(kind, 2)
    broken = values(field).clone()
    broken[0, 2, 2] = math.nan
    assert EQUATIONS[name](changed(field, broken)).isnan()


def test_what_penalties_refuse() -> None:
    dense, spline = rough("dense", 2), rough("spline", 2)
    for message, call in {
        "eps is 0": lambda: penalties.total_variation(dense, eps=0.0),
        "eps is -1": lambda: penalties.total_variation(dense, eps=-1.0),
        "eps is nan": lambda: penalties.total_variation(dense, eps=math.nan),
        "margin is -0.1": lambda: penalties.folding(dense, margin=-0.1),
        "margin is 1": lambda: penalties.folding(dense, margin=1.0),
        "floor is 0": lambda: penalties.log_jacobian(dense, floor=0.0),
        "mu is -1": lambda: penalties.elasticity(dense, mu=-1.0),
        "and lam -2": lambda: penalties.elasticity(dense, lam=-2.0),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    for name in EQUATIONS:
        with pytest.raises(ValueError, match="vectors have shape"):
            EQUATIONS[name](DenseField(dense.vectors[:1], dense.spacing))
        with pytest.raises(ValueError, match="spacing"):
            EQUATIONS[name](DenseField(dense.vectors, dense.spacing[:1]))
        with pytest.raises(ValueError, match="coefficients have shape"):
            EQUATIONS[name](changed(spline, spline.coefficients[:, 1:]))
    with pytest.raises(ValueError, match="larger than the grid"):
        bspline.lattice((8, 8), 9)


def test_terms() -> None:
    assert {name: term.name for name, term in PENALTIES.items()} == {name: name for name in PENALTIES}
    assert set(PENALTIES) - set(EQUATIONS) == {"inverse_consistency"}  # of the map, not of a field
    field = rough("dense", 2)
    for name in EQUATIONS:
        term = PENALTIES[name]
        assert term is getattr(fnreg, name) and term.needs == ("field",)
        assert torch.equal(term.value({"field": field}), EQUATIONS[name](field))
    made = 0.1 * fnreg.bending + fnreg.elasticity(mu=2.0)
    total, parts = made.value({"field": field})
    assert_close(total, 0.1 * parts["bending"] + parts["elasticity"])
    assert_close(parts["elasticity"], penalties.elasticity(field, mu=2.0))
    assert repr(made) == "0.1 * bending + elasticity(mu=2.0)"
