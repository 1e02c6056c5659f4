"""What cannot be registered: alone it raises an error that says what to change, in a batch it is a status."""

from __future__ import annotations

import dataclasses
import re
import warnings
from typing import Any

import pytest
import torch
from scenes import equal_bits, known_pair, moving_scene, random_mapping, random_params, scene, tensor, voxels_apart

import fnreg
from fnreg import (
    Affine,
    Descent,
    GaussNewton,
    Grid,
    Held,
    Image,
    Mapping,
    RegistrationError,
    Rigid,
    Rotation,
    Scaling,
    Sequential,
    Stage,
    Status,
    Subject,
    Translation,
    adam,
    clip,
    evaluate,
    register,
    sgd,
    stack,
)
from fnreg.pytree import tree_flatten, tree_map, tree_unflatten

FIXED, MOVING, _ = known_pair(Rigid(), 2)
QUICK: dict[str, Any] = {"levels": 1, "steps": 2}


def like(image: Image, data: Any) -> Image:
    return Image(data, image.grid)


# -- sides that do not fit together --------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(2, 3), (3, 2), (1, 2)])
def test_images_of_different_dimension(a: int, b: int) -> None:
    with pytest.raises(
        ValueError, match=f"moving has {b} spatial axes but fixed has {a}: register images of one dimension"
    ):
        register(scene(a), moving_scene(b), Translation(), **QUICK)


def test_images_of_different_channels() -> None:
    with pytest.raises(ValueError, match="moving has 3 channels but fixed has 1: select channels so that both agree"):
        register(FIXED, moving_scene(2, channels=3), Rigid(), **QUICK)
    with pytest.raises(ValueError, match="moving has 1 channels but fixed has 2"):
        evaluate(scene(2, channels=2), MOVING, random_mapping(Rigid(), FIXED.grid, 1))


def test_images_of_different_dtype() -> None:
    with pytest.raises(ValueError, match=r"moving is torch.float32 but fixed is torch.float64: convert one"):
        register(FIXED, like(MOVING, MOVING.data.float()), Rigid(), **QUICK)


def away(tree: Any) -> Any:
    """On a device without memory, which is another one everywhere."""
    return tree_map(lambda leaf: leaf.to("meta"), tree)


def torn(image: Image) -> Image:
    """Its data elsewhere than its grid, which the constructor would refuse."""
    return tree_unflatten([away(image.data), *tree_flatten(image.grid)[0]], tree_flatten(image)[1])


def test_tensors_on_different_devices() -> None:
    shift, mask = {"translation": torch.zeros(2).double()}, torch.ones_like(MOVING.data)
    then = Mapping(shift, FIXED.grid, Translation())
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ("moving", away(MOVING), {}),
        ("moving.data", torn(MOVING), {}),
        ("moving.mask", Subject(MOVING, away(mask)), {}),
        ("then.params['translation']", MOVING, {"then": dataclasses.replace(then, params=away(shift))}),
        ("initial['translation']", MOVING, {"initial": away(shift)}),
        ("initial.params['translation']", MOVING, {"initial": away(then)}),
        ("starts['translation']", MOVING, {"starts": tree_map(lambda leaf: leaf.unsqueeze(0), away(shift))}),
    ]
    for told, moving, options in cases:
        message = re.escape(f"{told} is on meta but fixed is on cpu: give {told}.to('cpu')")
        with pytest.raises(ValueError, match=message):
            register(FIXED, moving, Translation(), **QUICK, **options)
    with pytest.raises(ValueError, match=r"moving is on cpu but fixed is on meta: give moving\.to\('meta'\)"):
        register(away(FIXED), MOVING, Translation(), **QUICK)
    with pytest.raises(ValueError, match=r"fixed\.data is on meta but its grid is on cpu: give fixed\.data\.to"):
        register(torn(FIXED), MOVING, Translation(), **QUICK)
    with pytest.raises(ValueError, match=r"mapping\.params.* is on meta but fixed is on cpu"):
        evaluate(FIXED, MOVING, away(then))


@pytest.mark.parametrize(
    ("three", "four"),
    [
        ("fixed", "moving"),
        ("fixed", "mask"),
        ("fixed", "weight"),
        ("moving", "then"),
        ("fixed", "initial"),
        ("moving grid", "fixed"),
    ],
)
def test_leading_axes_that_differ_are_named(three: str, four: str) -> None:
    options: dict[str, Any] = {}
    sides: dict[str, Any] = {"fixed": FIXED, "moving": MOVING}
    for what, count in ((three, 3), (four, 4)):
        if what in ("fixed", "moving"):
            sides[what] = like(sides[what], sides[what].data.expand(count, *sides[what].data.shape))
        elif what == "moving grid":
            sides["moving"] = Image(MOVING.data, Grid(MOVING.grid.size, spacing=torch.ones(count, 2)))
        elif what == "mask":
            sides["fixed"] = Subject(sides["fixed"], torch.ones(count, *FIXED.data.shape))
        elif what == "weight":
            options["objective"] = torch.ones(count) * fnreg.mse
        else:
            params = stack([Rigid().init(FIXED.grid)] * count)
            options[what] = params if what == "initial" else Mapping(params, FIXED.grid, Rigid())
    with pytest.raises(ValueError, match=r"leading batch axes differ \(.*3.*4|.*4.*3.*\): give every batched leaf"):
        register(sides["fixed"], sides["moving"], Rigid(), **options, **QUICK)


def test_a_leaf_of_no_known_rank_is_named() -> None:
    twice = Image(FIXED.data.expand(3, *FIXED.data.shape), FIXED.grid)
    object.__setattr__(twice, "data", FIXED.data.expand(2, 3, *FIXED.data.shape))
    with pytest.raises(
        ValueError, match=r"fixed.*data has shape \(2, 3, 1, 18, 20\): expected 3 axes for one pair, or 4"
    ):
        register(twice, MOVING, Rigid(), **QUICK)
    with pytest.raises(ValueError, match=r"objective.*weight has shape \(2, 2\): expected 0 axes for one pair, or 1"):
        register(FIXED, MOVING, Rigid(), objective=torch.ones(2, 2) * fnreg.mse, **QUICK)


@pytest.mark.parametrize("value", [None, torch.zeros(1, 8, 8), "image.nii", 3])
def test_what_is_no_image(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="expected an Image or a Subject, got"):
        register(value, MOVING, Rigid(), **QUICK)
    with pytest.raises((TypeError, ValueError), match="expected an Image or a Subject, got"):
        register(FIXED, value, Rigid(), **QUICK)


def test_an_empty_pyramid() -> None:
    with pytest.raises(ValueError, match="moving is an empty pyramid: give at least one image"):
        register(FIXED, [], Rigid(), **QUICK)


def test_a_pyramid_that_grows() -> None:
    with pytest.raises(
        ValueError, match=r"the fixed pyramid grows from \(10, 9\) to \(20, 18\): give the finest first"
    ):
        register(FIXED.pyramid(2)[::-1], MOVING, Rigid(), **QUICK)
    with pytest.raises(ValueError, match="the images of the moving pyramid differ in channels or dimension"):
        register(FIXED, [MOVING, moving_scene(2, channels=2, grow=-4)], Rigid(), **QUICK)


def test_an_empty_batch() -> None:
    with pytest.raises(ValueError, match="the batch is empty: give at least one pair"):
        register(like(FIXED, FIXED.data.expand(0, *FIXED.data.shape)), MOVING, Rigid(), **QUICK)


# -- grids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [0.0, -1.0, (1.0, 0.0), float("nan"), float("inf")])
def test_spacing_that_is_none(spacing: Any) -> None:
    with pytest.raises(ValueError, match=r"spacing is .*(it must be positive|not finite)"):
        Image(FIXED.data, spacing=spacing)


@pytest.mark.parametrize(
    "direction",
    [[[1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.3], [0.0, 1.0]]],
)
def test_a_direction_that_is_singular_or_sheared(direction: Any) -> None:
    with pytest.raises(ValueError, match="direction is not orthonormal"):
        Image(FIXED.data, direction=direction)


@pytest.mark.parametrize("size", [(3,), (3, 3), (2, 3, 1)])
def test_an_image_under_four_voxels(size: tuple[int, ...]) -> None:
    small = Image(torch.rand(1, *size[::-1]))
    with pytest.raises(ValueError, match=r"fixed has size .*: expected at least 4 voxels along some axis"):
        register(small, small, Translation(), **QUICK)
    large = Image(torch.rand(1, *(8,) * len(size)))
    with pytest.raises(ValueError, match=r"moving has size .*: expected at least 4 voxels along some axis"):
        register(large, small, Translation(), **QUICK)


def test_a_thin_image_is_registered() -> None:
    """A slab of one voxel: the axis that it lacks is no reason to refuse it."""
    fixed, moving, truth = known_pair(Translation(), 2)
    slab = [
        Image(
            image.data.unsqueeze(1),
            spacing=(*image.grid.spacing.tolist(), 3.0),
            center=(*image.grid.center.tolist(), 0.0),
            direction=torch.block_diag(image.grid.direction, torch.ones(1, 1).double()),
        )
        for image in (fixed, moving)
    ]
    result = register(*slab, Held(Rigid(), ("rotation",)), levels=2, steps=40)
    assert torch.allclose(result.mapping.params["translation"][:2], truth.params["translation"], atol=0.05)


def test_fewer_levels_than_asked_are_told() -> None:
    small = Image(FIXED.data[..., :7, :6])
    with pytest.warns(
        UserWarning, match=r"3 levels were asked for but a fixed image of size \(6, 7\) gives 2: no axis"
    ):
        result = register(small, small, Translation(), steps=2)
    assert result.steps.shape == (2,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register(small, small, Translation(), levels=2, steps=2)


# -- voxels --------------------------------------------------------------------------------------------------------


def test_integers_are_converted() -> None:
    counts = [like(image, (1000 * image.data).round().to(torch.int16)) for image in (FIXED, MOVING)]
    floats = [like(image, (1000 * image.data).round().float()) for image in (FIXED, MOVING)]
    found, expected = (register(*pair, Rigid(), levels=2, steps=10) for pair in (counts, floats))
    assert equal_bits(found.mapping, expected.mapping)
    assert found.warp(counts[1]).data.dtype == torch.float32


def test_complex_data_are_refused() -> None:
    with pytest.raises(TypeError, match="data are complex: give the magnitude, or the real and imaginary part"):
        Image(torch.zeros(1, 8, 8, dtype=torch.complex64))


def faulty(kind: str, image: Image) -> Any:
    one = torch.zeros_like(image.data)
    one[0, 3, 4] = 1
    return {
        "NaN": lambda: like(image, torch.where(one > 0, torch.nan, image.data)),
        "infinity": lambda: like(image, torch.where(one > 0, -torch.inf, image.data)),
        "constant": lambda: like(image, torch.full_like(image.data, 0.37)),
        "zero mask": lambda: Subject(image, torch.zeros_like(image.data)),
        "negative mask": lambda: Subject(image, 1 - 2 * one),
        "NaN as mask": lambda: Subject(image, torch.where(one > 0, torch.nan, torch.ones_like(one))),
        "constant in the mask": lambda: Subject(
            like(image, torch.where(one > 0, 9.0, 0.37 * torch.ones_like(one))), 1 - one
        ),
        "NaN in the mask": lambda: Subject(
            like(image, torch.where(one > 0, torch.nan, image.data)), torch.ones_like(one)
        ),
    }[kind]()


FAULTS = {
    "NaN": "{} holds NaN or infinity: exclude these voxels by a mask",
    "infinity": "{} holds NaN or infinity: exclude these voxels by a mask",
    "constant": "{} is constant where it counts: there is nothing to align",
    "negative mask": "the mask of {} has negative or NaN weights: a voxel counts by a weight from 0 on",
    "NaN as mask": "the mask of {} has negative or NaN weights",
    "zero mask": "the mask of {} is zero everywhere: give a mask with some positive voxels",
    "constant in the mask": "{} is constant where it counts",
    "NaN in the mask": "{} holds NaN or infinity",
}
CODES = {
    "NaN": "NOT_FINITE",
    "infinity": "NOT_FINITE",
    "constant": "CONSTANT",
    "negative mask": "BAD_MASK",
    "NaN as mask": "BAD_MASK",
    "zero mask": "EMPTY_MASK",
    "constant in the mask": "CONSTANT",
    "NaN in the mask": "NOT_FINITE",
}
SOLVERS: list[dict[str, Any]] = [{}, {"solver": GaussNewton()}]


@pytest.mark.parametrize("options", SOLVERS, ids=["adam", "gauss-newton"])
@pytest.mark.parametrize("side", ["fixed", "moving"])
@pytest.mark.parametrize("kind", FAULTS)
def test_a_faulty_image_is_refused_alone_and_marked_in_a_batch(kind: str, side: str, options: dict[str, Any]) -> None:
    good = {"fixed": FIXED, "moving": MOVING}
    bad = {**good, side: faulty(kind, good[side])}
    options = {"levels": 2, "steps": 5, **options}
    with pytest.raises(RegistrationError, match=FAULTS[kind].format(side)) as error:
        register(bad["fixed"], bad["moving"], Rigid(), **options)

    def subject(item: Any) -> Subject:
        return item if isinstance(item, Subject) else Subject(item, torch.ones_like(item.data))

    columns = {name: stack([subject(good[name]), subject(bad[name]), subject(good[name])]) for name in good}
    batch = register(columns["fixed"], columns["moving"], Rigid(), **options)
    assert batch.ok.tolist() == [True, False, True]
    assert Status(int(batch.status[1])) is Status[f"{side.upper()}_{CODES[kind]}"]
    assert Status(int(batch.status[1])).remedy == str(error.value)
    assert batch.steps[1].tolist() == [0, 0]
    assert all(bool(trace.value[1].isnan().all()) for trace in batch.history)
    assert equal_bits(batch.mapping.params["translation"][1], Rigid().init(FIXED.grid)["translation"])
    assert bool(torch.isfinite(batch.value[[0, 2]]).all())
    alone = register(subject(FIXED), subject(MOVING), Rigid(), **options)
    one = Mapping({name: leaf[0] for name, leaf in batch.mapping.params.items()}, FIXED.grid, Rigid())
    assert voxels_apart(one, alone.mapping, FIXED.grid) < 1e-9


def test_the_first_cause_is_told() -> None:
    """A bad mask before what it shows, the fixed image before the moving one, both before the overlap."""
    ones, far = torch.ones_like(FIXED.data), Grid(MOVING.grid.size, center=(1e4, 0.0))
    flat = like(FIXED, ones)
    fixed = [Subject(flat, -ones), Subject(flat, 0 * ones), Subject(flat, ones), Subject(FIXED, ones)]
    gone = Image(torch.full_like(MOVING.data, torch.nan), far)
    batch = register(stack(fixed), gone, [Translation(), Rigid()], **QUICK)
    told = [Status(code).name for code in batch.status.tolist()]
    assert told == ["FIXED_BAD_MASK", "FIXED_EMPTY_MASK", "FIXED_CONSTANT", "MOVING_NOT_FINITE"]
    for subject, code in zip(fixed, batch.status.tolist(), strict=True):
        with pytest.raises(RegistrationError) as error:
            register(subject, gone, [Translation(), Rigid()], **QUICK)
        assert str(error.value) == Status(code).remedy


def test_a_shared_image_with_a_fault_fails_every_pair() -> None:
    several = like(FIXED, torch.stack([FIXED.data, faulty("NaN", FIXED).data, FIXED.data]))
    batch = register(several, faulty("constant", MOVING), Rigid(), **QUICK)
    assert batch.status.tolist() == [Status.MOVING_CONSTANT, Status.FIXED_NOT_FINITE, Status.MOVING_CONSTANT]


def test_one_constant_channel_is_no_fault() -> None:
    both = [like(image, torch.cat([image.data, torch.ones_like(image.data)])) for image in (FIXED, MOVING)]
    assert bool(register(*both, Rigid(), **QUICK).ok)


def test_a_stage_after_a_failure_is_not_run() -> None:
    told: list[Any] = []
    with pytest.raises(RegistrationError, match="holds NaN"):
        register(faulty("NaN", FIXED), MOVING, [Rigid(), Affine()], progress=told.append, **QUICK)
    assert all(event.stage == 0 for event in told)
    data = torch.stack([FIXED.data, faulty("NaN", FIXED).data])
    batch = register(like(FIXED, data), MOVING, [Rigid(), Affine()], levels=1, steps=2)
    assert batch.ok.tolist() == [True, False]
    assert int(batch.status[1]) == Status.FIXED_NOT_FINITE
    assert batch.steps[1].tolist() == [0, 0]


@pytest.mark.parametrize("start", ["header", "center"])
def test_images_without_overlap(start: Any) -> None:
    far = Image(MOVING.data, center=(1e4, 0.0))
    if start == "center":
        register(FIXED, far, Rigid(), start=start, **QUICK)
        return
    hint = "do not overlap in world coordinates at the start: use start='center' or 'moments'"
    with pytest.raises(RegistrationError, match=hint):
        register(FIXED, far, Rigid(), **QUICK)
    movings = stack(
        [MOVING, Image(MOVING.data, MOVING.grid), Image(MOVING.data, Grid(MOVING.grid.size, center=(1e4, 0.0)))]
    )
    batch = register(FIXED, movings, Rigid(), **QUICK)
    assert batch.ok.tolist() == [True, True, False]
    assert int(batch.status[2]) == Status.NO_OVERLAP
    assert batch.steps[2].tolist() == [0]


def test_masks_without_overlap() -> None:
    left, right = torch.zeros_like(FIXED.data), torch.zeros_like(MOVING.data)
    left[..., :4], right[..., -4:] = 1, 1
    with pytest.raises(RegistrationError, match="do not overlap"):
        register(Subject(FIXED, left), Subject(MOVING, right), Translation(), **QUICK)


def test_overlap_that_is_lost_on_the_way() -> None:
    """Both images are brighter towards one side, and a long step runs off the image."""
    ramp = torch.linspace(0, 1, 20, dtype=torch.float64).expand(1, 18, 20)
    fixed, moving = Image(ramp), Image(ramp + 5)
    options: dict[str, Any] = {"optimizer": adam(60.0, decay=1.0), "levels": 1}
    with pytest.raises(RegistrationError, match="lost their overlap on the way: use a smaller learning rate"):
        register(fixed, moving, Translation(), stop=None, steps=1, **options)
    with pytest.raises(
        RegistrationError, match=r"diverged: .* or the images lost their overlap; use a smaller learning"
    ):
        register(fixed, moving, Translation(), stop=None, steps=3, **options)
    two = Image(torch.stack([ramp, ramp]), fixed.grid)
    for steps, cause in ((1, Status.LOST_OVERLAP), (3, Status.DIVERGED)):
        lost = register(two, moving, Translation(), stop=None, steps=steps, **options)
        assert lost.ok.tolist() == [False, False]
        assert lost.status.tolist() == [cause] * 2


def test_a_registration_that_diverges() -> None:
    def explode(displacement: torch.Tensor) -> torch.Tensor:
        return -(1e3 * displacement.square().mean() + displacement.mean()).exp()

    options: dict[str, Any] = {"objective": explode, "padding": "border", "levels": 1, "steps": 20}
    with pytest.raises(RegistrationError, match=r"the registration diverged: .*use a smaller learning rate"):
        register(FIXED, MOVING, Translation(), optimizer=sgd(1.0), **options)
    rates = torch.tensor([1e-9, 1.0], dtype=torch.float64)
    batch = register(
        FIXED, like(MOVING, torch.stack([MOVING.data] * 2)), Translation(), optimizer=sgd(rates), **options
    )
    assert batch.ok.tolist() == [True, False]
    assert int(batch.status[1]) == Status.DIVERGED


# -- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["rigid", None, 3, Rigid, "rigid+affine", [Rigid(), "affine"], [Affine]], ids=repr)
def test_what_is_no_transform(value: Any) -> None:
    with pytest.raises(TypeError, match=r"transform is .*: expected a value such as Rigid\(\), a Stage, or a sequence"):
        register(FIXED, MOVING, value, **QUICK)


def test_no_transform_at_all() -> None:
    with pytest.raises(ValueError, match="no transform: give one, or a sequence of stages"):
        register(FIXED, MOVING, [], **QUICK)


def test_a_line_that_should_turn() -> None:
    with pytest.raises(ValueError, match="a line cannot be rotated: choose Translation, Scaling or Affine in 1-D"):
        register(scene(1), moving_scene(1), Rigid(), **QUICK)


@pytest.mark.parametrize("value", ["centre", "", None, 0])
def test_an_unknown_start(value: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown start .*: choose header, center, moments or auto"):
        register(FIXED, MOVING, Rigid(), start=value, **QUICK)


@pytest.mark.parametrize("transform", [Rotation(), Scaling(), Sequential((Rigid(), Scaling()))], ids=str)
def test_a_start_that_the_transform_cannot_take(transform: Any) -> None:
    with pytest.raises(
        ValueError, match=r"start='center' needs a transform that can shift; .* cannot: run Translation"
    ):
        register(FIXED, MOVING, transform, start="center", **QUICK)


@pytest.mark.parametrize(
    ("levels", "steps"),
    [
        (2, (3,)),
        (2, (1, 2, 3)),
        (1, ()),
        (2, -1),
        (2, (3, -1)),
        (1, 2.7),
        (1, [2.7]),
        (2, torch.tensor([3, 3])),
        (1, "3"),
    ],
)
def test_steps_of_the_wrong_length(levels: int, steps: Any) -> None:
    with pytest.raises(
        ValueError, match=r"steps is .* for \d levels: give one whole number, or one per level from coarse to fine"
    ):
        register(FIXED, MOVING, Rigid(), levels=levels, steps=steps)


@pytest.mark.parametrize(
    "levels",
    [
        # None and 0 are one to the stage: a single level is run.
        0,
        -1,
    ],
)
def test_no_levels(levels: int) -> None:
    with pytest.raises(ValueError, match=f"levels is {levels}: give at least one"):
        register(FIXED, MOVING, Rigid(), levels=levels, steps=2)


def test_an_unknown_padding() -> None:
    with pytest.raises(ValueError, match="unknown padding 'edge': choose from border, zeros, reflection, or a number"):
        register(FIXED, MOVING, Rigid(), padding="edge", **QUICK)  # type: ignore[arg-type]


def test_an_objective_that_is_no_scalar_or_asks_for_too_much() -> None:
    with pytest.raises(TypeError, match=r"mine returned \(1, 18, 20\): an objective returns a scalar tensor"):

        def mine(warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
            return (warped - fixed).square()

        register(FIXED, MOVING, Rigid(), objective=mine, **QUICK)
    with pytest.raises(TypeError, match="an objective asks for 'target': it may ask for warped, fixed, weights"):
        register(FIXED, MOVING, Rigid(), objective=lambda warped, target: warped.mean(), **QUICK)
    with pytest.raises(TypeError, match="an objective is a Term, a sum of terms or a callable, not str"):
        register(FIXED, MOVING, Rigid(), objective="mse", **QUICK)


@pytest.mark.parametrize("objective", [fnreg.mae, fnreg.mse + fnreg.huber, lambda warped: warped.mean()])
def test_gauss_newton_without_residuals(objective: Any) -> None:
    with pytest.raises(
        ValueError, match=r"is no least-squares term, so Gauss-Newton cannot use it: choose mse or ncc, or"
    ):
        register(FIXED, MOVING, Rigid(), objective=objective, solver=GaussNewton(), **QUICK)


def test_gauss_newton_with_a_negative_weight() -> None:
    with pytest.raises(ValueError, match="weight"):
        register(FIXED, MOVING, Rigid(), objective=fnreg.mse + (-0.1) * fnreg.ncc, solver=GaussNewton(), **QUICK)


@pytest.mark.parametrize("value", [0.3, "adam", torch.optim.Adam, adam])
def test_what_is_no_optimizer(value: Any) -> None:
    with pytest.raises(TypeError, match=r"optimizer is \w+: expected one of fnreg.optim, such as adam\(0.3\)"):
        register(FIXED, MOVING, Rigid(), optimizer=value, **QUICK)
    with pytest.raises(TypeError, match=r"optimizer is \w+: expected one of fnreg.optim, such as adam\(0.3\)"):
        Descent(value)


def test_an_optimizer_that_would_climb() -> None:
    with pytest.raises(ValueError, match=r"only passes the gradient on.*chain\(clip\(1.0\), adam\(0.3\)\)"):
        register(FIXED, MOVING, Rigid(), optimizer=clip(1.0), **QUICK)


def test_a_solver_and_an_optimizer_that_exclude_each_other() -> None:
    class Own:
        scales = True
        init = step = staticmethod(lambda *given: None)

    with pytest.raises(ValueError, match="GaussNewton has no optimizer: give either a solver or an optimizer"):
        register(FIXED, MOVING, Rigid(), solver=GaussNewton(), optimizer=adam(0.3), **QUICK)
    with pytest.raises(ValueError, match="Own has no optimizer"):
        register(FIXED, MOVING, Rigid(), solver=Own(), optimizer=adam(0.3), **QUICK)
    with pytest.raises(ValueError, match="GaussNewton has no optimizer"):
        register(FIXED, MOVING, Stage(Rigid(), solver=GaussNewton(), optimizer=adam(0.3)), **QUICK)


@pytest.mark.parametrize("options", [{"solver": 0.3}, {"solver": GaussNewton}, {"stop": 3}], ids=str)
def test_what_is_no_solver_or_stop(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"(solver|stop) is"):
        register(FIXED, MOVING, Rigid(), **options, **QUICK)


def test_rates_for_other_pairs() -> None:
    with pytest.raises(ValueError, match=r"lr has shape \(3,\) for 1 pairs: give one rate, or one per pair"):
        register(FIXED, MOVING, Rigid(), optimizer=adam(torch.ones(3)), **QUICK)


@pytest.mark.parametrize(
    "value", [{}, {"translation": torch.zeros(2)}, torch.zeros(3), {"rotation": 0, "shift": 0}], ids=str
)
def test_parameters_that_do_not_fit(value: Any) -> None:
    with pytest.raises(ValueError, match=r"initial does not fit Rigid\(\): expected the structure of Rigid\(\).init"):
        register(FIXED, MOVING, Rigid(), initial=value, **QUICK)
    with pytest.raises(ValueError, match=r"starts do not fit Rigid\(\): expected the structure of Rigid\(\).init"):
        register(FIXED, MOVING, Rigid(), starts=value, **QUICK)


@pytest.mark.parametrize("name", ["initial", "starts"])
def test_parameters_of_the_wrong_size(name: str) -> None:
    shape = (3,) if name == "initial" else (2, 3)
    with pytest.raises(ValueError, match=rf"{name}.*translation.*3,?\), expected \(2,\)"):
        register(FIXED, MOVING, Translation(), **{name: {"translation": torch.zeros(shape)}}, **QUICK)


def test_starts_without_an_axis_of_starts() -> None:
    with pytest.raises(ValueError, match=r"starts have shape \(1,\): expected an axis of starts before 1 axes"):
        register(FIXED, MOVING, Rigid(), starts=Rigid().init(FIXED.grid), **QUICK)
    uneven = {"rotation": torch.zeros(3, 1), "translation": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"starts have different lengths \[2, 3\]: give every parameter as many"):
        register(FIXED, MOVING, Rigid(), starts=uneven, **QUICK)


def test_an_initial_map_for_a_transform_that_has_no_fit() -> None:
    mapping = random_mapping(Rigid(), FIXED.grid, 1)
    with pytest.raises(ValueError, match=r"initial is a Mapping but Sequential.* is not linear: pass it as then"):
        register(FIXED, MOVING, Sequential((Rigid(), Scaling())), initial=mapping, **QUICK)


def test_an_initial_map_and_a_start_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="initial"):
        register(FIXED, MOVING, Rigid(), initial=random_params(Rigid(), FIXED.grid, 1), start="center", **QUICK)


def test_a_pyramid_of_subjects_keeps_its_masks() -> None:
    mask = torch.zeros_like(FIXED.data)
    mask[..., 5:-5] = 1
    expected = register(Subject(FIXED, mask), MOVING, Rigid(), levels=1, steps=5, stop=None)
    result = register([Subject(FIXED, mask)], MOVING, Rigid(), levels=1, steps=5, stop=None)  # type: ignore[list-item]
    assert equal_bits(result.mapping, expected.mapping)
    assert not equal_bits(result.mapping, register(FIXED, MOVING, Rigid(), levels=1, steps=5, stop=None).mapping)


@pytest.mark.parametrize("shape", [(1, 18, 19), (18, 20), (2, 18, 20)])
def test_masks_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"mask has shape .*: expected \(1, 18, 20\)"):
        Subject(FIXED, torch.ones(shape))


@pytest.mark.parametrize("what", ["evaluate", "then", "initial"])
def test_a_mapping_of_another_dimension(what: str) -> None:
    mapping = random_mapping(Rigid(), scene(3).grid, 1)
    with pytest.raises(ValueError, match=r"axes|dimension|coordinates"):
        if what == "evaluate":
            evaluate(FIXED, MOVING, mapping)
        else:
            register(FIXED, MOVING, Rigid(), **{what: mapping}, **QUICK)


def test_warping_an_image_of_another_dimension() -> None:
    result = register(FIXED, MOVING, Rigid(), **QUICK)
    with pytest.raises(ValueError, match="image has 3 spatial axes but the mapping has 2"):
        result.warp(scene(3))
    with pytest.raises(ValueError, match=r"points have shape \(4, 3\): expected \(N, 2\) world points"):
        result.map_points(tensor([[0.0, 0.0, 0.0]] * 4))
