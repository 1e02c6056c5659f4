"""register by labels, by points, by similarities without contrast, by sums of them, and by one objective per level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import (
    DESCENT,
    NEWTON,
    few,
    few_steps,
    inner_mask,
    known_pair,
    moving_scene,
    orientation,
    random_mapping,
    random_params,
    scene,
    several_pairs,
    smooth_mapping,
    take,
    tensor,
    uniform,
    voxels_apart,
)
from torch import Tensor
from torch.func import grad, vmap
from torch.testing import assert_close

import fnreg
from fnreg import (
    FFD,
    SVF,
    SVFFD,
    TPS,
    Affine,
    Grid,
    Image,
    Mapping,
    RegistrationError,
    Rigid,
    Stage,
    Status,
    Subject,
    Translation,
    adam,
    evaluate,
    linear_mapping,
    register,
    stack,
)
from fnreg.filters import resize
from fnreg.inputs import prepare
from fnreg.losses import overlap, points
from fnreg.losses.objective import objective as as_objective
from fnreg.problem import Level
from fnreg.symmetric import BothWays

QUICK: dict[str, Any] = {"levels": 1, "steps": 2}


def classes(image: Image, shift: int = 0) -> Tensor:
    """What is bright is 3, what is dark is 7."""
    return 3 * (image.data[:1] > 0.25 + shift).long() + 7 * (image.data[:1] < -0.1).long()


def blank(image: Image) -> Image:
    return Image(torch.zeros_like(image.data), image.grid)


def annotated(fixed: Image, moving: Image, truth: Mapping, seed: int = 0) -> tuple[Subject, Subject]:
    """A pair with labels of the scene and points that correspond exactly."""
    where = fixed.grid.center + 0.3 * fixed.grid.extent.min() * uniform(9, fixed.grid.ndim, seed=seed)
    return (
        Subject(fixed, labels=classes(fixed), points=where),
        Subject(moving, labels=classes(moving), points=truth.map_points(where)),
    )


def pair_of(dimension: int = 2, transform: Any = None, size: float = 1.0) -> tuple[Subject, Subject, Mapping]:
    fixed, moving, truth = known_pair(transform or (Rigid() if dimension > 1 else Translation()), dimension, size=size)
    return *annotated(fixed, moving, truth), truth


def points_apart(result: Any, truth: Mapping, grid: Grid) -> float:
    """In voxels, within the image."""
    where = grid.center + 0.5 * grid.extent.min() * uniform(30, grid.ndim, seed=9)
    away = (result.map_points(where) - truth.map_points(where)).norm(dim=1).max()
    return float(away / grid.spacing.min())


# -- end to end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [fnreg.dice, fnreg.cross_entropy, fnreg.tversky], ids=str)
@pytest.mark.parametrize("dimension", [2, 3])
def test_by_labels_alone(objective: Any, dimension: int) -> None:
    """The images say nothing; edges of labels are known to a voxel, so of a small image the map is too."""
    fixed, moving, truth = pair_of(dimension, Translation(), 2.0)
    sides = [Subject(blank(side.image), labels=side.labels) for side in (fixed, moving)]
    result = register(*sides, Translation(), objective=objective, levels=2)
    grid = fixed.image.grid
    before = points_apart(linear_mapping(torch.eye(dimension + 1).double(), grid), truth, grid)
    assert points_apart(result, truth, grid) < min(0.5, before / 3)


@pytest.mark.parametrize("objective", [fnreg.landmarks, fnreg.landmarks(delta=0.5), fnreg.chamfer], ids=str)
@pytest.mark.parametrize("transform", [Translation(), Rigid(), Affine()], ids=str)
def test_by_points_alone(objective: Any, transform: Any) -> None:
    fixed, moving, truth = pair_of(2, transform, 0.7)
    sides = [Subject(blank(side.image), points=side.points) for side in (fixed, moving)]
    result = register(*sides, transform, objective=objective, levels=2)
    assert points_apart(result, truth, fixed.image.grid) < 0.05
    assert list(result.terms) == [objective.name]


def test_by_points_alone_images_need_not_overlap() -> None:
    fixed, moving, _ = pair_of()
    away = Image(moving.image.data, Grid(moving.image.grid.size, center=(500.0, 0.0)))
    assert moving.points is not None
    far = Subject(away, points=moving.points + tensor([500.0, 0.0]))
    result = register(fixed, far, Translation(), objective=fnreg.landmarks, optimizer=adam(30.0), levels=1, steps=300)
    assert float(result.value) < 5
    with pytest.raises(RegistrationError, match="do not overlap in world coordinates"):
        register(fixed, far, Translation(), objective=fnreg.mse + fnreg.landmarks, **QUICK)


@pytest.mark.parametrize("transform", [FFD(4), SVFFD(4), SVF(), fnreg.Displacement(), TPS(4)], ids=str)
def test_landmarks_bend_a_map(transform: Any) -> None:
    fixed, moving, truth = known_pair(Affine(), 2, size=0.5)
    sides = annotated(fixed, moving, truth)
    result = register(*sides, transform, objective=fnreg.landmarks, levels=1, steps=60)
    start = evaluate(*sides, Mapping(transform.init(fixed.grid), fixed.grid, transform), objective=fnreg.landmarks)[0]
    assert float(result.value) < 1e-2 * float(start)
    left = result.map_points(sides[0].points) - sides[1].points
    assert_close(result.value, left.square().sum(1).mean(), rtol=1e-6, atol=0)


def test_surfaces_slide_along_planes() -> None:
    """Points of a line, elsewhere on it: by planes only the distance to the line counts."""
    place = torch.linspace(-3, 3, 13).double()
    line = torch.stack([place, 0.3 * place], 1)
    normals = tensor([-0.3, 1.0]).expand(13, 2)
    image = blank(scene(2))
    fixed = Subject(image, points=line + tensor([0.4, 1.5]))
    moving = Subject(image, points=line, normals=normals)
    result = register(fixed, moving, Translation(), objective=fnreg.closest_points(to_plane=True), levels=1)
    shift = result.mapping.params["translation"]
    assert abs(float((shift + tensor([0.4, 1.5])) @ tensor([-0.3, 1.0]))) < 0.02
    with pytest.raises(ValueError, match="to_plane asks for normals of the moving points"):
        register(moving, fixed, Translation(), objective=fnreg.closest_points(to_plane=True), **QUICK)


@pytest.mark.parametrize("objective", [fnreg.ngf, fnreg.mind], ids=str)
@pytest.mark.parametrize("dimension", [2, 3])
def test_inverted_contrast(objective: Any, dimension: int) -> None:
    fixed, moving, truth = known_pair(Rigid(), dimension)
    inverted = Image(5 - 3 * moving.data, moving.grid)
    result = register(fixed, inverted, Rigid(), objective=objective, levels=2)
    assert points_apart(result, truth, fixed.grid) < 0.25
    straight = register(fixed, moving, Rigid(), objective=objective, levels=2)
    assert_close(result.mapping.matrix(), straight.mapping.matrix(), atol=1e-4, rtol=0)
    assert float(evaluate(fixed, inverted, result.mapping)[0]) > 1  # mean squares would have none of it


def test_a_weighted_sum() -> None:
    fixed, moving, truth = pair_of()
    more = [
        Subject(
            Image(torch.cat([s.image.data, uniform(*s.image.data.shape)]), s.image.grid),
            labels=s.labels,
            points=s.points,
        )
        for s in (fixed, moving)
    ]
    objective = 0.5 * fnreg.mse(channel=0) + 0.1 * fnreg.dice + 0.01 * fnreg.landmarks
    result = register(*more, Rigid(), objective=objective, levels=2)
    assert points_apart(result, truth, fixed.image.grid) < 0.2  # labels of a small image are jagged
    assert list(result.terms) == ["mse", "dice", "landmarks"]
    terms = result.terms
    assert_close(result.value, 0.5 * terms["mse"] + 0.1 * terms["dice"] + 0.01 * terms["landmarks"])
    found = evaluate(*more, result.mapping, objective=objective)
    assert_close(found, (result.value, terms))
    assert_close(terms["mse"], evaluate(fixed, moving, result.mapping)[0], atol=1e-12, rtol=0)


# -- what terms are given -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [1, 2, 3])
@pytest.mark.parametrize("padding", [None, "border", 0.7])
def test_terms_see_labels_and_points_under_the_map(dimension: int, padding: Any) -> None:
    fixed, moving, _ = pair_of(dimension)
    mapping = random_mapping(Affine(), fixed.image.grid, 3, 1.0)
    masked = Subject(
        fixed.image,
        inner_mask(fixed.image),
        labels=fixed.labels,
        points=fixed.points,
        point_weights=torch.arange(1.0, 10.0),
    )
    normal = Subject(moving.image, labels=moving.labels, points=moving.points, normals=uniform(9, dimension))
    seen: dict[str, Any] = {}

    def everything(
        warped_labels: Any,
        fixed_labels: Any,
        weights: Any,
        fixed_points: Any,
        mapped_points: Any,
        moving_points: Any,
        fixed_point_weights: Any,
        moving_point_weights: Any,
        fixed_normals: Any,
        moving_normals: Any,
        grid: Any,
    ) -> Tensor:
        seen.update(locals())
        return weights.mean()

    evaluate(masked, normal, mapping, objective=everything, padding=padding)
    assert fixed.labels is not None and moving.labels is not None and fixed.points is not None
    numbers = fixed.labels.unique()[1:].reshape(-1, *(1,) * dimension)
    mask = inner_mask(fixed.image)  # what it hides is filled in, as in the image
    assert_close(mask * seen["fixed_labels"], mask * (fixed.labels == numbers))
    outside = "border" if padding is None else padding if isinstance(padding, str) else "zeros"
    one_hot = Image((moving.labels == numbers).double(), moving.image.grid)
    expected = fnreg.warp(one_hot, mapping, fixed.image.grid, padding=outside).data
    assert_close(seen["warped_labels"], expected, atol=1e-12, rtol=0)
    assert torch.equal(seen["fixed_points"], fixed.points)
    assert_close(seen["mapped_points"], mapping.map_points(fixed.points))
    assert torch.equal(seen["moving_points"], moving.points)  # type: ignore[arg-type]
    assert torch.equal(seen["fixed_point_weights"], torch.arange(1.0, 10.0).double())
    assert torch.equal(seen["moving_normals"], uniform(9, dimension))
    assert seen["moving_point_weights"] is None and seen["fixed_normals"] is None
    assert seen["grid"].same_as(fixed.image.grid)


def test_points_go_through_what_acts_after() -> None:
    fixed, moving, _ = pair_of()
    for after in (random_mapping(Affine(), fixed.image.grid, 1), smooth_mapping(FFD(4), fixed.image.grid, 2)):
        result = register(fixed, moving, Rigid(), objective=fnreg.landmarks, then=after, levels=1, steps=20)
        left = result.map_points(fixed.points) - moving.points
        assert_close(result.value, left.square().sum(1).mean())


def test_labels_are_as_smooth_as_the_image() -> None:
    """On each level the channels are what the image would be if it were they; within a mask too."""
    fixed, moving, _ = pair_of()
    assert fixed.labels is not None
    numbers = tensor([3, 7]).reshape(2, 1, 1)
    for mask in (None, inner_mask(fixed.image)):
        side = Subject(fixed.image, mask, labels=fixed.labels)
        made = prepare(side, moving, None, levels=2, min_size=4, objectives=[as_objective(fnreg.dice)])
        channels = Subject(Image((fixed.labels == numbers).double(), fixed.image.grid), mask)
        plain = prepare(channels, channels, None, levels=2, min_size=4)
        assert made.labels is not None
        for level in (0, 1):
            assert_close(made.labels[0][level], plain.fixed[level].data)
        assert [len(side) for side in made.labels] == [2, 2]
    level = made.level(1, Rigid(), as_objective(fnreg.dice), 1, None)
    known = level.pairs.annotations
    assert known is not None and known.moving_labels is not None and moving.labels is not None
    half = resize((moving.labels == numbers).double(), made.moving[1].grid.size)
    assert known.moving_labels.shape == half.shape
    assert float((known.moving_labels - half).abs().max()) < 0.3  # spacing differs: a little smoother, as the image is


def test_a_pyramid_may_have_labels() -> None:
    fixed, moving, _ = pair_of()
    several = [[Subject(image, labels=classes(image)) for image in side.image.pyramid(2)] for side in (fixed, moving)]
    result = register(*several, Rigid(), objective=fnreg.dice, levels=2, steps=5)  # type: ignore[arg-type]
    assert result.ok
    with pytest.raises(ValueError, match="the moving pyramid has labels for some of its levels only"):
        part = [several[1][0], several[1][1].image]
        register(several[0], part, Rigid(), objective=fnreg.dice, levels=2)  # type: ignore[arg-type]


def test_what_nobody_asks_for_is_not_looked_at() -> None:
    fixed, moving, _ = pair_of()
    odd = Subject(moving.image, labels=torch.full_like(moving.labels, 9), points=tensor([[torch.nan, 0.0]]))  # type: ignore[arg-type]
    result = register(fixed, odd, Rigid(), **few_steps(DESCENT))
    plain = register(fixed.image, moving.image, Rigid(), **few_steps(DESCENT))
    assert torch.equal(result.mapping.matrix(), plain.mapping.matrix())


# -- laws -----------------------------------------------------------------------------------------------------------

SUM = 0.5 * fnreg.mse + 0.3 * fnreg.dice + 0.02 * fnreg.landmarks + 0.1 * fnreg.chamfer(delta=1.0)


@pytest.mark.parametrize(
    "objective", [SUM, fnreg.dice, fnreg.landmarks, fnreg.ngf + fnreg.mind, fnreg.cross_entropy], ids=str
)
@pytest.mark.parametrize("transform", [Rigid(), SVFFD(4)], ids=str)
def test_a_pair_alone_equals_the_pair_in_a_batch(objective: Any, transform: Any) -> None:
    fixed, moving = several_pairs()
    sides = [
        annotated(f, m, random_mapping(Rigid(), f.grid, n)) for n, (f, m) in enumerate(zip(fixed, moving, strict=True))
    ]
    options = few_steps(DESCENT, 4) | {"objective": objective}
    together = register(stack([f for f, _ in sides]), stack([m for _, m in sides]), transform, **options)
    for number, (f, m) in enumerate(sides):
        alone = register(f, m, transform, **options)
        assert voxels_apart(take(together.mapping, number), alone.mapping, f.image.grid) < 1e-9
        assert_close(together.value[number], alone.value, atol=1e-11, rtol=0)


def test_pairs_of_a_batch_may_have_different_classes_and_numbers_of_points() -> None:
    fixed, moving, truth = pair_of()
    assert fixed.labels is not None and moving.labels is not None
    assert fixed.points is not None and moving.points is not None
    few_points = [Subject(s.image, labels=(s.labels == 3).long(), points=s.points[:5]) for s in (fixed, moving)]  # type: ignore[index]
    padded = [
        Subject(s.image, labels=s.labels, points=torch.cat([s.points, torch.full((4, 2), torch.nan)]), point_weights=w)  # type: ignore[list-item]
        for s, w in zip(few_points, [torch.tensor([1.0] * 5 + [0.0] * 4)] * 2, strict=True)
    ]
    full = [Subject(s.image, labels=s.labels, points=s.points, point_weights=torch.ones(9)) for s in (fixed, moving)]
    options = few_steps(DESCENT, 4) | {"objective": SUM}
    together = register(stack([full[0], padded[0]]), stack([full[1], padded[1]]), Rigid(), **options)
    for number, sides in enumerate(((fixed, moving), few_points)):
        alone = register(*sides, Rigid(), **options)
        assert voxels_apart(take(together.mapping, number), alone.mapping, fixed.image.grid) < 1e-9
    assert voxels_apart(take(together.mapping, 0), take(together.mapping, 1), fixed.image.grid) > 1e-3
    assert truth is not None


@pytest.mark.parametrize("other", [fnreg.dice, fnreg.landmarks, fnreg.ngf, fnreg.chamfer], ids=str)
def test_weight_zero_equals_absent(other: Any) -> None:
    fixed, moving, _ = pair_of()
    for base in (fnreg.mse, fnreg.ncc):
        expected = register(fixed, moving, Rigid(), objective=base, **few_steps(DESCENT))
        result = register(fixed, moving, Rigid(), objective=base + 0 * other, **few_steps(DESCENT))
        assert voxels_apart(result.mapping, expected.mapping, fixed.image.grid) < 1e-9


@few
@given(st.integers(0, 100), st.sampled_from([fnreg.dice, fnreg.cross_entropy, fnreg.ngf, fnreg.mind]))
def test_masked_equals_cropped(seed: int, objective: Any) -> None:
    """At one level: what a mask of whole voxels hides is as if it were not there."""
    fixed, moving, _ = pair_of()
    mapping = random_mapping(Rigid(), fixed.image.grid, seed, 0.5)
    mask = inner_mask(fixed.image)
    cut = (slice(None), slice(4, -4), slice(4, -4))
    size = [n - 8 for n in fixed.image.grid.size]
    grid = Grid(
        size, spacing=fixed.image.grid.spacing, center=fixed.image.grid.center, direction=fixed.image.grid.direction
    )
    assert fixed.labels is not None
    cropped = Subject(Image(fixed.image.data[cut], grid), labels=fixed.labels[cut])
    found = evaluate(Subject(fixed.image, mask, labels=fixed.labels), moving, mapping, objective=objective)[0]
    assert_close(found, evaluate(cropped, moving, mapping, objective=objective)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_in_the_precision_of_the_images(dtype: torch.dtype) -> None:
    fixed, moving, _ = pair_of()
    sides = [
        Subject(Image(s.image.data.to(dtype), s.image.grid), labels=s.labels, points=s.points) for s in (fixed, moving)
    ]
    for objective in (fnreg.landmarks, SUM, fnreg.dice):
        result = register(*sides, SVFFD(4), objective=objective, **QUICK)
        assert result.value.dtype == result.history[0].value.dtype == dtype


def test_the_gradient_is_that_of_the_energy() -> None:
    """Central differences in every direction of a step, for labels, points and descriptors at once."""
    fixed, moving, _ = pair_of()
    objective = as_objective(SUM + 0.2 * fnreg.ngf + 0.3 * fnreg.mind + 0.1 * fnreg.cross_entropy)
    whole = prepare(fixed, moving, None, levels=1, min_size=4, objectives=[objective])
    level = whole.level(0, Affine(), objective, 1, "border")
    params = {k: v.unsqueeze(0) for k, v in random_params(Affine(), fixed.image.grid, 4, 0.2).items()}
    gradient, value, _ = level.gradient(params)
    assert_close(value, level.value(params)[0])
    for name, slope in gradient.items():
        for place in range(slope[0].numel()):
            ends = []
            for sign in (1, -1):
                step = {k: torch.zeros_like(v) for k, v in gradient.items()}
                step[name].view(-1)[place] = sign * 1e-6
                ends.append(level.value(level.retract(params, step))[0])
            found = (ends[0] - ends[1]) / 2e-6
            assert_close(slope.reshape(-1)[place : place + 1], found, atol=1e-6, rtol=1e-5)


def test_a_registration_by_landmarks_is_a_function_of_them() -> None:
    """The derivative of what was found by the place of a landmark and by the weight, against differences."""
    fixed, moving, _ = pair_of()

    def found(places: Tensor, weight: Tensor) -> Tensor:
        known = Subject(moving.image, labels=moving.labels, points=places)
        objective = 0.1 * fnreg.mse + weight * fnreg.landmarks
        result = register(
            fixed, known, Translation(), objective=objective, levels=1, steps=3, stop=None,
            optimizer=adam(0.3, pure=True),
        )  # fmt: skip
        return result.mapping.params["translation"].sum()

    assert moving.points is not None
    weight, direction = tensor(0.3), uniform(9, 2, seed=4)
    by_places, by_weight = grad(found, argnums=(0, 1))(moving.points, weight)
    ends = [found(moving.points + s * direction, weight) for s in (1e-5, -1e-5)]
    assert_close((by_places * direction).sum(), (ends[0] - ends[1]) / 2e-5, atol=1e-6, rtol=1e-4)
    ends = [found(moving.points, weight + s) for s in (1e-5, -1e-5)]
    assert_close(by_weight, (ends[0] - ends[1]) / 2e-5, atol=1e-6, rtol=1e-4)
    weights = tensor([0.1, 0.3])
    several = vmap(lambda w: found(moving.points, w))(weights)
    assert_close(several, torch.stack([found(moving.points, w) for w in weights]), atol=1e-10, rtol=0)


# -- both ways ------------------------------------------------------------------------------------------------------


def test_both_ways_swap_labels_and_points() -> None:
    """Backward is what the pair is with the two sides exchanged, seen on the fixed grid."""
    fixed, moving, _ = pair_of()
    after = random_mapping(Affine(), fixed.image.grid, 1, 0.5)
    objective = as_objective(fnreg.landmarks + fnreg.dice)
    whole = prepare(fixed, moving, after, levels=1, min_size=4, objectives=[objective])
    both = BothWays.of(whole.level(0, SVF(), objective, 1, "border", after))
    assert isinstance(both.backward, Level)
    velocity = smooth_mapping(SVF(), fixed.image.grid, 3, 0.5).params
    back = SVF().inverse(velocity, fixed.image.grid)
    terms = both.backward.value({k: -v.unsqueeze(0) for k, v in velocity.items()})[1]
    assert moving.points is not None and fixed.points is not None and fixed.labels is not None
    assert moving.labels is not None
    expected = points.landmarks(back.map_points(after.inverse().map_points(moving.points)), fixed.points)
    assert_close(terms["landmarks"][0], expected, atol=1e-9, rtol=0)
    grid, numbers = fixed.image.grid, tensor([3, 7]).reshape(2, 1, 1)
    there = fnreg.warp(Image((moving.labels == numbers).double(), moving.image.grid), after, grid, padding="border")
    here = fnreg.warp(Image((fixed.labels == numbers).double(), grid), back, grid, padding="border")
    assert_close(terms["dice"][0], overlap.dice(here.data, there.data), atol=1e-9, rtol=0)
    result = register(fixed, moving, [Rigid(), SVFFD(4)], objective=SUM, symmetric=True, levels=2, steps=10)
    assert result.ok


def test_normals_stay_across_a_surface_under_a_linear_map() -> None:
    from fnreg.annotations import Points

    matrix = torch.eye(4).double()
    matrix[:3, :3] = orientation(3, tensor([0.3, 0.2, -0.5])) @ torch.diag(tensor([1.0, 2.0, 0.5]))
    matrix[:3, 3] = tensor([3.0, -1.0, 2.0])
    normals, along = uniform(5, 3, seed=1), uniform(5, 3, seed=2)
    along = along - (along * normals).sum(1, keepdim=True) / normals.square().sum(1, keepdim=True) * normals
    moved = Points(uniform(5, 3), None, normals).through(matrix)
    assert moved.normals is not None
    assert_close((moved.normals * (along @ matrix[:3, :3].mT)).sum(1), torch.zeros(5).double(), atol=1e-12, rtol=0)
    assert_close(moved.points, uniform(5, 3) @ matrix[:3, :3].mT + matrix[:3, 3])


# -- one objective per level ------------------------------------------------------------------------------------------


def test_an_objective_per_level_is_that_of_the_level() -> None:
    fixed, moving, _ = pair_of()
    options: dict[str, Any] = {"levels": 2, "stop": None, **DESCENT}
    several = register(fixed, moving, Rigid(), objective=[fnreg.dice, fnreg.mse + fnreg.landmarks], steps=4, **options)
    coarse = register(fixed, moving, Rigid(), objective=fnreg.dice, steps=[4, 0], **options)
    fine = register(
        fixed, moving, Rigid(), objective=fnreg.mse + fnreg.landmarks, steps=[0, 4], initial=coarse.mapping, **options
    )
    assert voxels_apart(several.mapping, fine.mapping, fixed.image.grid) < 1e-9
    assert_close(several.history[0].value, coarse.history[0].value, atol=1e-12, rtol=0)
    assert list(several.terms) == ["mse", "landmarks"]
    stage = Stage(Rigid(), objective=(fnreg.dice, fnreg.mse + fnreg.landmarks))
    assert torch.equal(register(fixed, moving, [stage], steps=4, **options).mapping.matrix(), several.mapping.matrix())
    weights = tensor([0.1, 0.5])
    batch = register(fixed, moving, Rigid(), objective=[weights * fnreg.dice, fnreg.mse], steps=4, **options)
    assert batch.value.shape == (2,)


def test_a_pyramid_that_ends_early_drops_the_coarsest_objective() -> None:
    fixed, moving, _ = pair_of()
    options: dict[str, Any] = {"steps": 4, "stop": None, "min_size": 8, **DESCENT}
    with pytest.warns(UserWarning, match="3 levels were asked for but a fixed image of size"):
        result = register(
            fixed, moving, Rigid(), objective=[fnreg.landmarks, fnreg.dice, fnreg.mse], levels=3, **options
        )
    expected = register(fixed, moving, Rigid(), objective=[fnreg.dice, fnreg.mse], levels=2, **options)
    assert torch.equal(result.mapping.matrix(), expected.mapping.matrix())


@pytest.mark.parametrize("objective", [[fnreg.mse, fnreg.dice], [], (fnreg.mse,) * 4])
def test_as_many_objectives_as_levels(objective: Any) -> None:
    fixed, moving, _ = pair_of()
    with pytest.raises(ValueError, match=r"\d objectives for 3 levels: give one, or one per level from coarse to fine"):
        register(fixed, moving, Rigid(), objective=objective, levels=3)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "side", "message"),
    [
        (fnreg.dice, "fixed", r"dice asks for labels but fixed has none: give Subject\(image, labels=...\)"),
        (fnreg.mse + fnreg.tversky, "moving", "tversky asks for labels but moving has none"),
        (fnreg.landmarks, "fixed", r"landmarks asks for points but fixed has none: give Subject\(image, points=...\)"),
        (fnreg.chamfer + fnreg.mse, "moving", "chamfer asks for points but moving has none"),
    ],
    ids=str,
)
def test_what_is_missing_is_named(objective: Any, side: str, message: str) -> None:
    sides = dict(zip(("fixed", "moving"), pair_of()[:2], strict=True))
    sides[side] = Subject(sides[side].image)
    with pytest.raises(ValueError, match=message):
        register(sides["fixed"], sides["moving"], Rigid(), objective=objective, **QUICK)
    with pytest.raises(ValueError, match=message):
        register(sides["fixed"], sides["moving"], Rigid(), objective=[fnreg.mse, objective], levels=2)
    with pytest.raises(ValueError, match=message):
        evaluate(sides["fixed"], sides["moving"], random_mapping(Rigid(), scene(2).grid, 1), objective=objective)


def test_a_channel_out_of_range_is_refused_before_the_work_begins() -> None:
    message = r"mse\(channel=2\) but the images have 2 channels: choose from 0 to 1"
    sides = scene(2, channels=2), moving_scene(2, channels=2)
    for objective in (fnreg.mse(channel=2), fnreg.mse + 0.1 * fnreg.mse(channel=2), [fnreg.mse, fnreg.mse(channel=2)]):
        with pytest.raises(ValueError, match=message):
            register(*sides, Rigid(), objective=objective, levels=2)
    with pytest.raises(ValueError, match=message):
        register(*sides, Rigid(), objective=fnreg.mse(channel=2), **NEWTON, **QUICK)
    with pytest.raises(ValueError, match=message):
        evaluate(*sides, random_mapping(Rigid(), scene(2).grid, 1), objective=fnreg.mse(channel=2))
    result = register(*sides, Rigid(), objective=fnreg.mse(channel=(0, 1)), levels=1, **NEWTON)
    expected = register(*sides, Rigid(), levels=1, **NEWTON)
    assert_close(result.mapping.matrix(), expected.mapping.matrix(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_labels_are_integers(dtype: torch.dtype) -> None:
    fixed = pair_of()[0]
    assert fixed.labels is not None
    with pytest.raises(TypeError, match=f"labels are {dtype}: expected integers, one number for each class"):
        Subject(fixed.image, labels=fixed.labels.to(dtype))
    assert Subject(fixed.image, labels=fixed.labels > 0).labels is not None


def test_classes_that_one_image_lacks_are_named() -> None:
    fixed, moving, _ = pair_of()
    assert fixed.labels is not None
    other = Subject(fixed.image, labels=torch.where(fixed.labels == 3, 4, fixed.labels))
    message = (
        r"of the classes of labels \[4\] only fixed and \[3\] only moving has: give both the same classes, and 0 to"
    )
    with pytest.raises(ValueError, match=message):
        register(other, moving, Rigid(), objective=fnreg.dice, **QUICK)
    fewer = Subject(fixed.image, labels=torch.where(fixed.labels == 3, 0, fixed.labels))
    with pytest.raises(ValueError, match=r"of the classes of labels \[3\] only moving has"):
        register(fewer, moving, Rigid(), objective=fnreg.dice, **QUICK)
    none = [Subject(s.image, labels=torch.zeros_like(s.labels)) for s in (fixed, moving)]  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="labels are 0 everywhere, which is the background: there is no class to align"
    ):
        register(*none, Rigid(), objective=fnreg.dice, **QUICK)


def test_bad_labels_and_points_of_a_batch_are_statuses_and_touch_no_neighbour() -> None:
    fixed, moving, _ = pair_of()
    ones = torch.ones(9).double()

    def made(side: Subject, labels: Any = None, points: Any = None, weights: Any = None) -> Subject:
        known: dict[str, Any] = {"labels": side.labels if labels is None else labels}
        known |= {"points": side.points if points is None else points}
        return Subject(side.image, **known, point_weights=ones if weights is None else weights)

    assert fixed.labels is not None and moving.labels is not None and fixed.points is not None
    lost = torch.where(torch.arange(9).unsqueeze(1) == 4, torch.nan, fixed.points)
    pairs = [
        (made(fixed), made(moving)),
        (made(fixed, labels=torch.where(fixed.labels == 3, 4, fixed.labels)), made(moving)),
        (made(fixed, labels=0 * fixed.labels), made(moving, labels=0 * moving.labels)),
        (made(fixed, points=lost), made(moving)),
        (made(fixed), made(moving, weights=-ones)),
        (made(fixed), made(moving, weights=0 * ones)),
        (made(fixed, points=lost, weights=(torch.arange(9) != 4).double()), made(moving)),
    ]
    options = few_steps(DESCENT, 3) | {"objective": fnreg.dice + fnreg.landmarks}
    result = register(stack([f for f, _ in pairs]), stack([m for _, m in pairs]), Rigid(), **options)
    bad = Status.BAD_LABELS, Status.BAD_LABELS, Status.FIXED_BAD_POINTS, Status.MOVING_BAD_POINTS
    assert result.status.tolist() == [0, *bad, Status.MOVING_BAD_POINTS, 0]
    nothing = [stack([side, side]) for side in pairs[2]]
    assert register(*nothing, Rigid(), **options).status.tolist() == [Status.BAD_LABELS] * 2
    alone = register(*pairs[0], Rigid(), **options)
    assert_close(result.mapping.matrix()[0], alone.mapping.matrix(), atol=1e-9, rtol=0)
    with pytest.raises(RegistrationError, match=r"points of fixed or their normals are not finite.*weight 0"):
        register(*pairs[3], Rigid(), **options)
    with pytest.raises(RegistrationError, match=r"points of moving .* or their weights negative or all zero"):
        register(*pairs[5], Rigid(), **options)


def test_lists_of_landmarks_have_one_length() -> None:
    fixed, moving, _ = pair_of()
    assert moving.points is not None
    fewer = Subject(moving.image, points=moving.points[:7])
    with pytest.raises(ValueError, match="fixed has 9 points and moving 7: landmarks correspond one to one"):
        register(fixed, fewer, Rigid(), objective=fnreg.landmarks, **QUICK)
    assert register(fixed, fewer, Rigid(), objective=fnreg.closest_points, **QUICK).ok
    empty = Subject(moving.image, points=moving.points[:0])
    with pytest.raises(ValueError, match="chamfer asks for points but the list of moving is empty: give at least one"):
        register(fixed, empty, Rigid(), objective=fnreg.chamfer, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"point_weights": torch.ones(4)}, "point_weights are given without points"),
        (
            {"points": torch.ones(4, 2), "point_weights": torch.ones(3)},
            r"point_weights have shape \(3,\): expected \(4,\)",
        ),
        ({"points": torch.ones(4, 2), "normals": torch.ones(4, 3)}, r"normals have shape \(4, 3\): expected \(4, 2\)"),
        ({"normals": torch.ones(4, 2)}, "normals are given without points: give the points that they belong to"),
    ],
)
def test_weights_and_normals_belong_to_points(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Subject(scene(2), **options)


def test_labels_inside_vmap_cannot_be_read() -> None:
    fixed, moving, _ = pair_of()

    def inside(labels: Tensor) -> Tensor:
        known = Subject(fixed.image, labels=labels)
        return evaluate(known, moving, random_mapping(Rigid(), fixed.image.grid, 1), objective=fnreg.dice)[0]

    assert fixed.labels is not None
    with pytest.raises(ValueError, match="labels inside vmap: their classes cannot be read there; give the batch to"):
        vmap(inside)(torch.stack([fixed.labels] * 2))
    # Around labels that are shared all is well.
    shifts = tensor([[0.0, 0.0], [1.0, 0.5]])

    def moved(shift: Tensor) -> Tensor:
        mapping = Mapping({"translation": shift}, fixed.image.grid, Translation())
        return evaluate(fixed, moving, mapping, objective=fnreg.dice)[0]

    assert_close(vmap(moved)(shifts), torch.stack([moved(s) for s in shifts]), atol=1e-12, rtol=0)


def test_gauss_newton_sees_the_warped_image_only() -> None:
    fixed, moving, _ = pair_of()
    with pytest.raises(ValueError, match="landmarks is no least-squares term, so Gauss-Newton cannot use it"):
        register(fixed, moving, Rigid(), objective=fnreg.mse + fnreg.landmarks, **NEWTON, **QUICK)
    mine = fnreg.term(
        lambda mapped_points, moving_points: points.landmarks(mapped_points, moving_points),
        residuals=lambda mapped_points, moving_points: (mapped_points - moving_points) / 3,
    )
    with pytest.raises(ValueError, match="asks for labels or points, but Gauss-Newton sees the warped image only"):
        register(fixed, moving, Rigid(), objective=fnreg.mse + mine, **NEWTON, **QUICK)


def test_the_hot_path_stays_that_of_mean_squares() -> None:
    """Annotations that no term asks for, and penalties, keep it; a term of labels or points leaves it."""
    fixed, moving, _ = pair_of()
    for objective, hot in ((fnreg.mse, True), (fnreg.mse + fnreg.bending, True), (fnreg.mse + fnreg.landmarks, False)):
        total = as_objective(objective)
        whole = prepare(fixed, moving, None, levels=1, min_size=4, objectives=[total])
        level = whole.level(0, FFD(4), total, 1, None)
        plain = prepare(fixed.image, moving.image, None, levels=1, min_size=4)
        possible = plain.level(0, FFD(4), as_objective(fnreg.mse), 1, None)._passes is not None
        assert (level._passes is not None) == (hot and possible)
