"""Lattices: what is added to an image has no influence, and results belong to the images as they are."""

from __future__ import annotations

import dataclasses
import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import (
    EXTENT,
    inner_mask,
    picture,
    random_mapping,
    random_params,
    scene,
    tensor,
    voxels_apart,
    without_kernels,
)
from torch.testing import assert_close

import fnreg
from fnreg import Affine, Grid, Image, Mapping, Rigid, Rotation, Scaling, Subject, Translation, evaluate, register
from fnreg.gather import Padding
from fnreg.inputs import prepare
from fnreg.lattice import Lattice, own, own_mapping, padded, statistics
from fnreg.losses.objective import objective as as_objective
from fnreg.sampling import interpolate
from fnreg.settings import Settings
from fnreg.specs import SettingsError
from fnreg.transforms.base import Transform

PADDINGS: tuple[Padding | None, ...] = (None, "zeros", "border", "reflection", 0.7)
sizes = st.integers(1, 300)


def ragged(dimension: int, *, turned: bool = True, fine: bool = False) -> tuple[Subject, Subject]:
    """Images of other shapes and places, of which each sees something that the other does not; the grids of both are
    parts of one, or, turned, lie to each other as it happens."""
    whole = scene(dimension, grow=8, spacing=0.6) if fine else scene(dimension, grow=3)
    here = whole.grid.crop([2, 1, 3][:dimension], [1, 2, 0][:dimension])
    there = whole.grid.crop(0, [4, 0, 2][:dimension])
    if turned:
        there = Grid(there.size, spacing=1.07 * there.spacing, center=there.center + 0.3)
    move = Mapping({"translation": tensor([0.4] * dimension)}, there, Translation())
    return Subject(picture(here, extent=EXTENT)), Subject(picture(there, move, extent=EXTENT))


# -- sizes ---------------------------------------------------------------------------------------------------------


@given(st.tuples(sizes, sizes, sizes), st.tuples(sizes, sizes, sizes), st.booleans())
def test_chosen_sizes_are_few_and_waste_little(fixed: Any, moving: Any, even: bool) -> None:
    found = Lattice(even=even).sizes(fixed, moving)
    assert Lattice(even=even).sizes(moving, fixed) == found[::-1]
    for size, theirs, other in zip(found, (fixed, moving), (moving, fixed), strict=True):
        for made, n, m in zip(size, theirs, other, strict=True):
            longest = m if n < m < 1.5 * n else n
            assert longest <= made <= longest * 9 / 8 + even and (not even or (made - n) % 2 == 0)
            assert even or Lattice().sizes((made,), (made,)) == ((made,), (made,))


def test_there_are_eight_sizes_per_doubling() -> None:
    for n in (16, 32, 64, 128):
        assert len({Lattice().sizes((k,), (k,))[0] for k in range(n + 1, 2 * n + 1)}) == 8


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(st.integers(0, 20), st.integers(0, 20)))
def test_what_is_added_is_what_interpolation_sees_there(size: Any, more: Any) -> None:
    data = torch.rand(2, *size[::-1])
    target = tuple(n + k for n, k in zip(size, more, strict=True))
    axes = [torch.arange(m) - (m - n) // 2 for n, m in zip(size, target, strict=True)]
    where = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    for beyond in PADDINGS[1:]:
        assert beyond is not None
        seen = interpolate(data, where.to(data.dtype), padding=beyond).mT
        assert_close(padded(data, target, beyond), seen, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("padding", PADDINGS, ids=str)
def test_an_image_stays_where_it_is(dimension: int, padding: Padding | None) -> None:
    fixed, moving = ragged(dimension)
    fixed = dataclasses.replace(fixed, labels=torch.ones_like(fixed.image.data, dtype=torch.int64))
    for known, placed in zip((fixed, moving), Lattice(padding=padding).place(fixed, moving), strict=True):
        points = known.image.grid.points()
        assert placed.image.grid.size != known.image.grid.size
        assert_close(placed.image.sample(points), known.image.sample(points), atol=1e-12, rtol=0)
        for leaf in (placed.mask, placed.labels):
            if leaf is not None:
                assert int(leaf.sum()) == known.image.grid.numel
                inside = Image(leaf, placed.image.grid).sample(points)
                assert_close(inside, torch.ones_like(inside), atol=1e-9, rtol=0)
    assert (placed.mask is None) == (padding is not None)  # of the moving image


# -- values --------------------------------------------------------------------------------------------------------

OBJECTIVES = (fnreg.mse, fnreg.ncc, fnreg.mi, fnreg.lncc(radius=2))


def shifted(grid: Grid, axis: int, voxels: float) -> Mapping:
    """A shift along an axis of a grid."""
    step = torch.zeros(grid.ndim, dtype=torch.float64)
    step[axis] = voxels
    return Mapping({"translation": grid.vectors_to_world @ step}, grid, Translation())


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("padding", PADDINGS, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_values_are_those_of_the_images_as_they_are(dimension: int, padding: Padding | None, objective: Any) -> None:
    """Shifts along an axis, so far that the images leave each other: what counts is the same to rounding."""
    fixed, moving = ragged(dimension, turned=False)
    # Beyond the lattice its border is mirrored, not that of the image.
    lattice = Lattice((40,) * dimension if padding == "reflection" else None, padding)
    places = lattice.place(fixed, moving)
    for axis, shift in ((0, 0.0), (0, 4.3), (1, -3.6), (1, 2.5)):
        mapping = shifted(fixed.image.grid, axis, shift)
        value, _ = evaluate(fixed, moving, mapping, objective=objective, padding=padding)
        placed, _ = evaluate(*places, mapping, objective=objective, padding=padding)
        assert_close(placed, value, atol=1e-9, rtol=1e-9)
    unweighted = (Subject(known.image) for known in places)  # the law is none of all images
    assert abs(float(evaluate(*unweighted, mapping, objective=objective)[0] - value)) > 1e-6


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "compositions"])
@pytest.mark.parametrize("padding", [None, "zeros"], ids=str)
@pytest.mark.parametrize("objective", [fnreg.mse, fnreg.ncc, fnreg.lncc(radius=2)], ids=str)
def test_steps_are_those_of_the_images_as_they_are(objective: Any, padding: Padding | None, kernels: bool) -> None:
    """On one level, where the borders that the images cross lie along an axis; the gradient knows of no weight."""
    fixed, moving = ragged(2, turned=False)
    options: Any = {"objective": objective, "padding": padding, "levels": 1, "steps": 4, "stop": None}
    options["initial"] = shifted(fixed.image.grid, 0, 3.3).params
    with nullcontext() if kernels else without_kernels():
        plain = register(fixed, moving, Translation(), **options)
        placed = register(*Lattice(padding=padding).place(fixed, moving), Translation(), **options)
    assert voxels_apart(placed.mapping, plain.mapping, fixed.image.grid) < 1e-9
    assert_close(placed.value, plain.value, atol=1e-11, rtol=0)
    assert_close(placed.history[0].value, plain.history[0].value, atol=1e-11, rtol=0)
    assert float((plain.mapping.params["translation"] - options["initial"]["translation"]).norm()) > 0.1


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("padding", [None, "zeros", "border"], ids=str)
def test_pyramids_do_not_let_in_what_was_added(dimension: int, padding: Padding | None) -> None:
    """Far from all intensities: a coarse level would show it, but for zeros, which the user says are there."""
    fixed, moving = (Subject(Image(50 + known.image.data, known.image.grid)) for known in ragged(dimension))
    places = Lattice((24,) * dimension, padding).place(fixed, moving)
    made = prepare(*places, None, levels=2, min_size=4, objectives=(as_objective(fnreg.mse),))
    sides = (fixed, made.fixed[1], made.fixed_masks[1]), (moving, made.moving[1], made.moving_masks[1])
    for known, image, mask in sides:
        if mask is not None:
            seen = image.data[mask > 0.5]
            assert float(seen.min()) > float(known.image.data.min()) - 1e-6
            assert float(seen.max()) < float(known.image.data.max()) + 1e-6
    if padding == "border":
        assert float(made.moving[1].data.min()) >= float(moving.image.data.min()) - 1e-6


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("start", ["header", "center", "moments"])
def test_a_registration_ends_where_that_of_the_images_does(dimension: int, start: Any) -> None:
    """On two levels, whose voxels are others on the lattice; what a start makes of the end is of this size as well."""
    fixed, moving = ragged(dimension, fine=True)
    plain = register(fixed, moving, Affine(), start=start, levels=2, steps=80)
    lattice = Lattice()
    initial = lattice.begin(start, Affine(), fixed, moving)
    assert (initial is None) == (start == "header")
    found = register(*lattice.place(fixed, moving), Affine(), initial=initial, levels=2, steps=80)
    placed = own(found, fixed.image.grid, moving.image.grid)
    assert voxels_apart(placed.mapping, plain.mapping, fixed.image.grid) < {2: 0.03, 3: 0.3}[dimension]
    begun = register(fixed, moving, Affine(), start=start, levels=1, steps=0)
    assert initial is None or voxels_apart(initial, begun.mapping, fixed.image.grid) < 1e-12


@pytest.mark.parametrize("transform", [Rotation(), Scaling()], ids=str)
@pytest.mark.parametrize("size", [None, (25, 26)], ids=str)
def test_the_middle_stays_where_maps_depend_on_it(transform: Transform, size: Any) -> None:
    fixed, moving = ragged(2)
    lattice = dataclasses.replace(_lattice("auto", transform), size=size)
    assert lattice.even
    places = lattice.place(fixed, moving)
    for known, placed in zip((fixed, moving), places, strict=True):
        assert_close(placed.image.grid.center, known.image.grid.center, atol=1e-12, rtol=0)
        assert all(n <= m for n, m in zip(known.image.grid.size, placed.image.grid.size, strict=True))
    assert not _lattice("auto", Rigid()).even
    grid, there = fixed.image.grid, places[0].image.grid
    params = random_params(transform, grid, 3)
    assert voxels_apart(Mapping(params, there, transform), Mapping(params, grid, transform), grid) < 1e-12


def _lattice(text: str, transform: Transform) -> Lattice:
    found = Lattice.of(Settings(lattice=text), [transform], None)
    assert found is not None
    return found


def test_masks_of_the_user_multiply_in() -> None:
    fixed, moving = ragged(2)
    masks = [inner_mask(known.image) for known in (fixed, moving)]
    given = Subject(fixed.image, masks[0]), Subject(moving.image, masks[1])
    placed = Lattice().place(*given)
    for known, mask in zip(placed, masks, strict=True):
        assert known.mask is not None and float(known.mask.sum()) == float(mask.sum()) and not known.sharp
    mapping = random_mapping(Rigid(), fixed.image.grid, 2)
    for objective in OBJECTIVES:
        expected, _ = evaluate(*given, mapping, objective=objective)
        assert_close(evaluate(*placed, mapping, objective=objective)[0], expected, atol=1e-9, rtol=1e-9)
        assert abs(float(evaluate(fixed, moving, mapping, objective=objective)[0] - expected)) > 1e-6


def test_a_sharp_mask_ends_as_an_image_does() -> None:
    """Weights are 0 or 1, and are where the image is but for a rounded corner; no derivative goes through them."""
    _, moving = ragged(2)
    fixed = Subject(Image(moving.image.data.flip(1), moving.image.grid))
    placed = Lattice().place(fixed, moving)[1]
    assert placed.sharp and not Subject(placed.image, placed.mask).sharp

    def ones(weights: Any) -> Any:
        return weights.sum()

    counts = [
        float(evaluate(fixed, known, shifted(fixed.image.grid, 0, 2.25), objective=ones)[0])
        for known in (placed, moving, dataclasses.replace(placed, sharp=False))
    ]
    assert counts[0] == counts[1] == round(counts[0]) and counts[2] != round(counts[2])


# -- back ----------------------------------------------------------------------------------------------------------

MAPS: tuple[Transform, ...] = (
    Rigid(),
    Affine(),
    Rotation(),
    fnreg.FFD(stride=4),
    fnreg.SVFFD(stride=4),
    fnreg.Displacement(),
    fnreg.Sequential((fnreg.FFD(stride=4), Affine())),
)


@pytest.mark.parametrize("transform", MAPS, ids=str)
def test_the_map_is_the_same_on_the_own_grid(transform: Transform) -> None:
    fixed, moving = ragged(2)
    places = _lattice("auto", transform).place(fixed, moving)
    there, grid = places[0].image.grid, fixed.image.grid
    mapping = random_mapping(transform, there, 1)
    found = own_mapping(mapping, grid)
    assert voxels_apart(found, mapping, there) < 1e-12
    assert found.transform == transform
    if transform.linear:
        assert found.domain is grid
        return
    field = mapping.displacement(there)
    told = statistics(torch.stack([field, 0 * field]), [grid, grid])
    expected = fnreg.fields.statistics(mapping.displacement(grid), grid)
    for name, value in expected._asdict().items():
        assert_close(getattr(told, name)[0], value, atol=1e-9, rtol=1e-9)
        assert float(getattr(told, name)[1]) == (1.0 if name.endswith("_determinant") and "log" not in name else 0.0)


# -- bad values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("atuo", "unknown lattice 'atuo': did you mean auto"),
        ("", "unknown lattice ''"),
        ("8x", "unknown lattice '8x'"),
        ("8x8.5", "unknown lattice"),
        ("8,8", "unknown lattice"),
        ("0x8", "'0x8': expected auto, or a size of at least 1"),
        ("-8x8", "'-8x8': expected auto, or a size of at least 1"),
        ("8x8x8x8", "two or three axes"),
        ("8", "two or three axes"),
    ],
)
def test_what_is_no_lattice(text: str, told: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(told)):
        Settings(lattice=text).check()


def test_lattices_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="64x64 has 2 axes but the fixed image has 3: give a size for each"):
        Lattice((64, 64)).sizes((8, 8, 8), (8, 8, 8))
    with pytest.raises(ValueError, match="10x9 is smaller than the moving image, 8x12: give 10x12 at least, or auto"):
        Lattice((10, 9)).sizes((8, 8), (8, 12))
    assert Lattice.of(Settings(), [Rigid()], None) is None
    assert _lattice("12X10", Rigid()).size == (12, 10)
