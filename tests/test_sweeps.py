"""Sweeps: as single registrations one after another, and the choice is what labels and landmarks say."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from scenes import take

import fnreg
from fnreg import (
    FFD,
    Descent,
    Grid,
    Image,
    Rigid,
    Rotation,
    Stage,
    Subject,
    Translation,
    adam,
    bending,
    chain,
    data,
    mse,
    sweep,
    sweeps,
)
from fnreg.pytree import tree_map
from fnreg.transforms import warping

SHORT: dict[str, Any] = {"levels": 2, "steps": 8, "stop": None}
WEIGHTS = torch.tensor([0.0, 1e-3, 1.0], dtype=torch.float64)
RATES = torch.tensor([0.1, 0.5], dtype=torch.float64)


def weighed(weight: torch.Tensor) -> dict[str, Any]:
    return {"objective": mse + weight * bending}


def labelled(count: int) -> tuple[Subject, Subject]:
    """Pairs of digits in float64, with the digit as label."""
    return tuple(  # type: ignore[return-value]
        Subject(Image(image.data.double(), image.grid), labels=(image.data > 0.5).long())
        for image in data.digit_pairs(count)
    )


def dice_of(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.logical_and(a, b).sum() / (a.sum() + b.sum())


def test_every_registration_is_as_by_itself() -> None:
    fixed, moving = labelled(3)
    found = sweep(
        fixed,
        moving,
        FFD(stride=7),
        lambda weight, rate: {"objective": mse + weight * bending, "optimizer": adam(rate)},
        over={"weight": WEIGHTS, "rate": RATES},
        **SHORT,
    )
    assert found.scores.shape == found.roughness.shape == (3, 3, 2)  # type: ignore[union-attr]
    for pair in range(3):
        a, b = (Subject(Image(s.image.data[pair], s.image.grid), labels=s.labels[pair]) for s in (fixed, moving))
        table = np.zeros((3, 2))
        for i, weight in enumerate(WEIGHTS):
            for j, rate in enumerate(RATES):
                alone = fnreg.register(
                    a, b, FFD(stride=7), objective=mse + float(weight) * bending, optimizer=adam(float(rate)), **SHORT
                )
                params = found.every.mapping.params["coefficients"][(pair * 3 + i) * 2 + j]
                torch.testing.assert_close(params, alone.mapping.params["coefficients"], atol=1e-9, rtol=0)
                warped = alone.warp(b).labels
                table[i, j] = dice_of(warped.numpy() > 0, a.labels.numpy() > 0)
                log = alone.jacobian().data.clamp(min=1e-300).log()[alone.jacobian().data > 0]
                assert float(found.roughness[pair, i, j]) == pytest.approx(float(log.std(correction=0)), abs=1e-6)
        np.testing.assert_allclose(found.scores[pair], table, atol=1e-12)
        assert int(found.chosen[pair]) == int(table.argmax())
        chosen = divmod(int(found.chosen[pair]), 2)
        assert float(found.picked()["weight"][pair]) == float(WEIGHTS[chosen[0]])
        assert float(found.picked()["rate"][pair]) == float(RATES[chosen[1]])
        best = found.every.mapping.params["coefficients"][pair * 6 + int(found.chosen[pair])]
        assert torch.equal(found.best.mapping.params["coefficients"][pair], best)
        assert float(found.best_scores[pair]) == table.max()
    assert int(found.common) == int(found.scores.mean(0).argmax())
    assert found.picked(found.common)["weight"].shape == ()


def test_a_pair_alone_is_without_the_axis_of_pairs() -> None:
    fixed, moving = labelled(2)
    batch = sweep(fixed, moving, FFD(stride=7), weighed, over={"weight": WEIGHTS}, **SHORT)
    assert isinstance(batch, fnreg.Sweep) and isinstance(batch.best, fnreg.Registration)
    one, other = take(fixed.image.data, 1), take(moving.image.data, 1)
    a = Subject(Image(one), labels=fixed.labels[1])
    b = Subject(Image(other), labels=moving.labels[1])
    alone = sweep(a, b, FFD(stride=7), weighed, over={"weight": WEIGHTS}, **SHORT)
    assert alone.scores.shape == (3,) and alone.chosen.shape == alone.best.status.shape == ()
    assert torch.equal(alone.scores, batch.scores[1]) and int(alone.chosen) == int(batch.chosen[1])
    torch.testing.assert_close(
        alone.best.mapping.params["coefficients"], batch.best.mapping.params["coefficients"][1], atol=1e-9, rtol=0
    )
    assert alone.best.warp(b).labels.shape == (1, 28, 28)


def test_what_pairs_share_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed, moving = labelled(2)
    shared = Subject(Image(fixed.image.data[0], fixed.image.grid), labels=fixed.labels[0])
    seen: list[Any] = []

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append(arguments)
        return fnreg.register(*arguments, **options)

    monkeypatch.setattr(sweeps, "register", spy)
    found = sweep(shared, moving, FFD(stride=7), weighed, over={"weight": WEIGHTS}, levels=1, steps=1)
    assert seen[0][0].image.data.data_ptr() == shared.image.data.data_ptr()
    assert seen[0][1].image.data.shape[0] == 6
    assert found.best.fixed_grid.center.ndim == found.best.moving_grid.center.ndim == 1


def test_landmarks_choose_by_their_weights() -> None:
    fixed, moving = data.digits(9, count=2)
    points = torch.tensor([[10.0, 12.0], [15.0, 14.0], [3.0, 3.0]]).double()
    shift = torch.tensor([2.0, -1.0]).double()
    moved = points + shift
    moved[2] += 20
    weights = torch.tensor([1.0, 1.0, 0.0]).double()
    starts = {"translation": torch.tensor([[0.0, 0.0], [2.0, -1.0], [5.0, 0.0]]).double()}
    found = sweep(
        Subject(fixed, points=points, point_weights=weights),
        Subject(moving, points=moved),
        Translation(),
        lambda start: {"initial": start},
        over={"start": starts},
        judge="points",
        steps=0,
        levels=1,
    )
    expected = (starts["translation"] - shift).norm(dim=1)
    torch.testing.assert_close(found.scores, expected)
    assert int(found.chosen) == 1 and not found.higher and found.roughness is None
    assert torch.equal(found.picked()["start"]["translation"], starts["translation"][1])


def test_starts_by_the_value_are_a_search() -> None:
    fixed, moving = data.digit_pairs(3)
    angles = torch.linspace(-1, 1, 5).double()[:, None]
    found = sweep(
        fixed,
        moving,
        Rotation(),
        lambda start: {"initial": {"rotation": start}},
        over={"start": angles},
        judge="value",
        steps=3,
        levels=1,
    )
    assert torch.equal(found.chosen, found.every.value.reshape(3, 5).argmin(1))
    assert torch.equal(found.best.value, found.every.value.reshape(3, 5).amin(1))


def test_a_start_of_each_pair_goes_with_all_its_settings() -> None:
    fixed, moving = labelled(2)
    initial = {"translation": torch.tensor([[3.0, 0.0], [0.0, -2.0]]).double()}
    then = fnreg.Mapping(
        {"translation": torch.tensor([[1.0, 1.0], [0.0, 2.0]]).double()}, fixed.image.grid, Translation()
    )
    found = sweep(
        fixed,
        moving,
        Translation(),
        lambda rate: {"optimizer": adam(rate)},
        over={"rate": RATES},
        initial=initial,
        then=then,
        steps=0,
        levels=1,
    )
    where = torch.zeros(1, 2).double()
    total = initial["translation"] + then.params["translation"]
    assert torch.equal(found.every.map_points(where)[:, 0], total.repeat_interleave(2, 0))
    assert torch.equal(found.best.map_points(where)[:, 0], total)


def test_what_failed_is_never_chosen_and_disturbs_nobody() -> None:
    fixed, moving = labelled(3)
    bad = tree_map(torch.clone, moving)
    bad.image.data[1] = 0.5  # constant
    weights = torch.tensor([torch.nan, 1e-3]).double()
    found = sweep(fixed, bad, FFD(stride=7), weighed, over={"weight": weights}, **SHORT)
    assert bool(found.scores[:, 0].isnan().all()) and bool(found.scores[1].isnan().all())
    assert found.chosen.tolist() == [1, 0, 1]
    assert found.best.ok.tolist() == [True, False, True]
    good = sweep(fixed, moving, FFD(stride=7), weighed, over={"weight": weights[1:]}, **SHORT)
    assert torch.equal(found.scores[::2, 1], good.scores[::2, 0])


def test_the_common_setting_is_of_the_pairs_that_tell() -> None:
    """Without the pair that no setting registers and the one without labels it is that of all others."""
    fixed, moving = labelled(4)
    weights = torch.tensor([30.0, 0.1, 1e-3], dtype=torch.float64)
    good = sweep(fixed, moving, FFD(stride=7), weighed, over={"weight": weights}, **SHORT)
    assert int(good.scores[:2].mean(0).argmax()) > 0  # so that 0 would be seen to be wrong
    bad = tree_map(torch.clone, moving)
    bad.image.data[2] = 0.5  # constant
    known = fixed.labels.clone()  # type: ignore[union-attr]
    known[3], bad.labels[3] = 0, 0  # type: ignore[index]
    found = sweep(
        dataclasses.replace(fixed, labels=known), bad, FFD(stride=7), weighed, over={"weight": weights}, **SHORT
    )
    assert found.every.ok.reshape(4, 3).all(1).tolist() == [True, True, False, True]
    assert found.counted.tolist() == [True, True, False, False]
    torch.testing.assert_close(found.means, good.scores[:2].mean(0))
    assert int(found.common) == int(good.scores[:2].mean(0).argmax())
    assert f"mean Dice {float(found.best_scores[:2].mean()):.4g}" in repr(found) and "nan" not in repr(found)


def test_no_common_setting_is_told() -> None:
    fixed, moving = labelled(2)
    found = sweep(fixed, moving, FFD(stride=7), weighed, over={"weight": WEIGHTS[1:]}, levels=1, steps=1)
    nan = torch.nan
    several = dataclasses.replace(found, scores=torch.tensor([[nan, 0.5], [0.6, nan]]))
    with pytest.raises(ValueError, match="as every setting failed for one pair or another: see every"):
        _ = several.common
    nobody = dataclasses.replace(found, scores=torch.full((2, 2), nan))
    with pytest.raises(ValueError, match=r"no setting is best in the mean, as no pair has a score: .* leave such"):
        _ = nobody.common
    one = dataclasses.replace(found, scores=torch.tensor([[nan, 0.5], [0.6, 0.4]]))
    assert int(one.common) == 1 and bool(one.means[0].isnan())


def test_landmarks_without_weight_may_be_nowhere() -> None:
    fixed, moving = data.digit_pairs(2)
    points = torch.tensor([[10.0, 12.0], [15.0, 14.0], [3.0, 3.0]]).double().repeat(2, 1, 1)
    moved, weights = points + 1, torch.ones(2, 3).double()
    points[0, 2], moved[1, 0], weights[0, 2], weights[1, 0] = torch.nan, torch.nan, 0, 0
    options: dict[str, Any] = {"over": {"rate": RATES}, "judge": "points", "steps": 0, "levels": 1}
    for transform in (Translation(), FFD(stride=7)):
        sides = Subject(fixed, points=points, point_weights=weights), Subject(moving, points=moved)
        found = sweep(*sides, transform, lambda rate: {"optimizer": adam(rate)}, **options)
        torch.testing.assert_close(found.scores, torch.full((2, 2), 2**0.5).double())
    sides = Subject(fixed, points=points, point_weights=0 * weights), Subject(moving, points=moved)
    with pytest.raises(ValueError, match="point_weights of fixed and moving leave no landmark to judge by"):
        sweep(*sides, Translation(), lambda rate: {"optimizer": adam(rate)}, **options)


def test_a_weight_of_a_later_stage_is_swept() -> None:
    fixed, moving = labelled(2)

    def using(weight: torch.Tensor) -> dict[str, Any]:
        return {"transform": [Stage(Rigid()), Stage(FFD(7), objective=mse + weight * bending)]}

    found = sweep(fixed, moving, None, using, over={"weight": WEIGHTS}, **SHORT)
    assert found.scores.shape == (2, 3)
    for k, weight in enumerate(WEIGHTS):
        alone = fnreg.register(fixed, moving, using(weight)["transform"], **SHORT)
        field = found.every.mapping.params[0]["coefficients"][k::3]
        torch.testing.assert_close(field, alone.mapping.params[0]["coefficients"], atol=1e-9, rtol=0)
    initial = {"rotation": torch.zeros(2, 1).double(), "translation": torch.ones(2, 2).double()}
    begun = sweep(fixed, moving, None, using, over={"weight": WEIGHTS}, initial=initial, levels=1, steps=0)
    where = begun.every.map_points(torch.zeros(1, 2).double())
    torch.testing.assert_close(where, torch.ones(6, 1, 2).double())
    with pytest.raises(ValueError, match="transform is an option of the call and of using: give it once"):
        sweep(fixed, moving, Rigid(), using, over={"weight": WEIGHTS}, **SHORT)
    with pytest.raises(ValueError, match="no transform: give one in the call, or by using"):
        sweep(fixed, moving, None, weighed, over={"weight": WEIGHTS}, **SHORT)
    with pytest.raises(ValueError, match="initial alone says how many pairs there are: give it in using"):
        one = tuple(Subject(Image(s.image.data[0]), labels=s.labels[0]) for s in (fixed, moving))  # type: ignore[index]
        sweep(*one, None, using, over={"weight": WEIGHTS}, initial=initial, **SHORT)


def test_labels_alone_are_warped(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed, moving = labelled(2)
    seen: list[Any] = []

    def spy(values: torch.Tensor, *rest: Any, **options: Any) -> Any:
        seen.append(values)
        return interpolate(values, *rest, **options)

    interpolate = warping.interpolate
    monkeypatch.setattr(warping, "interpolate", spy)
    sweep(fixed, moving, Rigid(), lambda rate: {"optimizer": adam(rate)}, over={"rate": RATES}, levels=1, steps=1)
    assert seen and not any(values.is_floating_point() for values in seen)


def test_labels_that_are_held_out_may_judge_what_saw_others() -> None:
    fixed, moving = labelled(2)

    def using(weight: torch.Tensor) -> dict[str, Any]:
        return {"objective": weight * fnreg.dice + mse}

    with pytest.raises(ValueError, match=r"dice.* sees the labels that are to judge it: judge by others"):
        sweep(fixed, moving, Rigid(), using, over={"weight": WEIGHTS}, **SHORT)
    stages = [fnreg.Stage(Rigid(), objective=fnreg.dice)]
    with pytest.raises(ValueError, match="sees the labels"):
        sweep(fixed, moving, stages, weighed, over={"weight": WEIGHTS}, **SHORT)
    others = tuple(dataclasses.replace(s, labels=(s.image.data > 0.8).long()) for s in (fixed, moving))
    found = sweep(fixed, moving, Rigid(), using, over={"weight": WEIGHTS}, held=others, **SHORT)
    warped = found.best.warp(Subject(moving.image, labels=others[1].labels)).labels
    expected = [dice_of(warped[n].numpy() > 0, others[0].labels[n].numpy() > 0) for n in range(2)]
    np.testing.assert_allclose(found.best_scores, expected)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"over": {}}, ValueError, "over is empty"),
        ({"over": {"weight": torch.tensor(1.0)}}, ValueError, r"over\['weight'\] is .*: expected a tensor of values"),
        ({"over": {"weight": 1.0}}, ValueError, "expected a tensor of values"),
        ({"over": {"weight": torch.zeros(0)}}, ValueError, r"leading axes of \[0\]: expected one length, at least 1"),
        ({"over": {"weight": {"a": torch.ones(2), "b": torch.ones(3)}}}, ValueError, r"axes of \[2, 3\]"),
        ({"judge": "folds"}, ValueError, "judge is 'folds': choose labels, points, value"),
        ({"judge": "points"}, ValueError, "fixed has no points to judge by"),
        ({"objective": mse}, ValueError, "objective is an option of the call and of using: give it once"),
        ({"using": lambda weight: mse}, TypeError, "using returned Term: expected a dict of options"),
        ({"using": lambda weight: {"pace": weight}}, TypeError, "pace"),
        ({"initial": {"translation": torch.zeros(3, 2)}}, ValueError, "leading batch axes differ .*initial"),
    ],
)
def test_what_does_not_fit_is_told(change: dict[str, Any], error: type[Exception], told: str) -> None:
    fixed, moving = labelled(2)
    given: dict[str, Any] = {"using": weighed, "over": {"weight": WEIGHTS}} | SHORT | change
    if "initial" in given:
        given["using"] = lambda weight: {"objective": weight * mse}
    using = given.pop("using")
    with pytest.raises(error, match=told):
        sweep(fixed, moving, Translation(), using, **given)


def test_pairs_that_do_not_fit_are_told() -> None:
    fixed, moving = labelled(3)
    given: dict[str, Any] = {"over": {"weight": WEIGHTS}} | SHORT
    fewer = labelled(2)[1]
    with pytest.raises(ValueError, match=r"leading batch axes differ \(fixed.image.data: 3, .*moving.image.data: 2"):
        sweep(fixed, fewer, FFD(stride=7), weighed, **given)
    with pytest.raises(ValueError, match="moving has no labels to judge by: give Subject"):
        sweep(fixed, moving.image, FFD(stride=7), weighed, **given)
    with pytest.raises(ValueError, match=r"held\[1\] has no labels"):
        sweep(fixed, moving, FFD(stride=7), weighed, held=(fixed, Subject(moving.image)), **given)
    empty = Subject(moving.image, labels=torch.zeros_like(moving.labels))
    with pytest.raises(ValueError, match="are 0 everywhere"):
        sweep(empty, empty, FFD(stride=7), weighed, **given)
    a, b = (Subject(s.image, points=torch.rand(n, 2)) for s, n in ((fixed, 4), (moving, 5)))
    with pytest.raises(ValueError, match="fixed has 4 points and moving 5: give pairs"):
        sweep(a, b, FFD(stride=7), weighed, judge="points", **given)
    none = tree_map(lambda leaf: leaf[:0] if leaf.ndim > 2 else leaf, fixed.image.data)
    nobody = Subject(Image(none, fixed.image.grid), labels=fixed.labels[:0])
    with pytest.raises(ValueError, match="the batch is empty"):
        sweep(nobody, nobody, FFD(stride=7), weighed, judge="value", **given)


def test_values_that_nothing_uses_are_told() -> None:
    fixed, moving = data.digits(9, count=2)
    with pytest.raises(ValueError, match=r"using gave \['padding'\] without the axis of the values: use them in"):
        sweep(fixed, moving, Rigid(), lambda w: {"padding": "border"}, over={"w": WEIGHTS}, judge="value", **SHORT)


def test_values_that_nothing_uses_are_told_of_a_batch_too() -> None:
    """There the registrations are as many as they should be, and each is done several times over."""
    fixed, moving = data.digit_pairs(3)
    given: dict[str, Any] = {"judge": "value", **SHORT}
    with pytest.raises(ValueError, match=r"using gave \['padding'\] without the axis of the values: use them in"):
        sweep(fixed, moving, Rigid(), lambda w: {"padding": "border"}, over={"w": WEIGHTS}, **given)
    both = {"weight": WEIGHTS, "rate": RATES}
    with pytest.raises(ValueError, match=r"using gave \['objective'\] that are the same for all values of rate: use"):
        sweep(fixed, moving, FFD(7), lambda weight, rate: weighed(weight), over=both, **given)
    with pytest.raises(ValueError, match="the same for all values of weight"):
        sweep(fixed, moving, FFD(7), lambda weight, rate: {"solver": Descent(chain(adam(rate)))}, over=both, **given)
    alike = {"weight": torch.ones(2), "rate": RATES}  # values that do not differ cannot make a difference
    found = sweep(
        fixed, moving, FFD(7), lambda weight, rate: weighed(weight) | {"optimizer": adam(rate)}, over=alike, **given
    )
    assert torch.equal(found.scores[:, 0], found.scores[:, 1])


def test_labels_that_judge_lie_on_the_fixed_grid() -> None:
    fixed, moving = labelled(2)
    given: dict[str, Any] = {"over": {"weight": WEIGHTS}} | SHORT
    grid = fixed.image.grid
    elsewhere = dataclasses.replace(fixed, image=Image(fixed.image.data, Grid(grid.size, origin=(0.5, 0.0))))
    with pytest.raises(ValueError, match=r"held\[0\] lies up to 0.5 voxels away from fixed: give labels of the fixed"):
        sweep(fixed, moving, FFD(7), weighed, held=(elsewhere, moving), **given)
    small = Subject(Image(torch.zeros(2, 1, 14, 14), Grid((14, 14))), labels=torch.ones(2, 1, 14, 14).long())
    with pytest.raises(ValueError, match=r"held\[0\] has size \(14, 14\) but fixed has \(28, 28\)"):
        sweep(fixed, moving, FFD(7), weighed, held=(small, moving), **given)
    deep = Subject(Image(torch.zeros(1, 4, 4, 4)), labels=torch.ones(1, 4, 4, 4).long())
    with pytest.raises(ValueError, match=r"held\[1\] has 3 spatial axes but the images have 2"):
        sweep(fixed, moving, FFD(7), weighed, held=(fixed, deep), **given)
    points = Subject(small.image, points=torch.rand(5, 2))  # which are of the world, on whatever grid
    found = sweep(fixed, moving, FFD(7), weighed, held=(points, points), judge="points", **given)
    assert bool(torch.isfinite(found.scores).all())


@pytest.mark.cuda
def test_images_of_a_gpu_are_swept_by_values_of_the_cpu() -> None:
    sides = [tree_map(lambda leaf: leaf.to("cuda"), side) for side in labelled(3)]
    found = sweep(*sides, FFD(stride=7), weighed, over={"weight": WEIGHTS}, **SHORT)
    here = sweep(*labelled(3), FFD(stride=7), weighed, over={"weight": WEIGHTS}, **SHORT)
    assert found.scores.device.type == "cuda" and found.picked()["weight"].device.type == "cpu"
    torch.testing.assert_close(found.scores.cpu(), here.scores, atol=1e-6, rtol=0)
    assert torch.equal(found.picked(found.common)["weight"], here.picked(here.common)["weight"])


# -- the figure ----------------------------------------------------------------------------------------------------


def test_the_trade_off_shows_what_was_found() -> None:
    pytest.importorskip("matplotlib")
    fixed, moving = labelled(3)
    found = sweep(fixed, moving, FFD(stride=7), weighed, over={"weight": WEIGHTS}, **SHORT)
    figure = fnreg.plot.trade_off(found)
    figure.canvas.draw()
    (axes,) = figure.axes
    assert found.roughness is not None
    mean, picked = axes.lines[3], axes.lines[4]  # behind a thin line for each pair
    np.testing.assert_allclose(mean.get_xdata(), found.roughness.mean(0))
    np.testing.assert_allclose(mean.get_ydata(), found.scores.mean(0))
    np.testing.assert_allclose(picked.get_ydata(), found.best_scores)
    assert "Dice" in axes.get_ylabel() and "log det J" in axes.get_xlabel() and "3 pairs" in axes.get_title()


def test_the_trade_off_and_the_common_setting_go_by_one_rule() -> None:
    """A setting that failed for a pair is not on the curve, a pair that no setting serves in no mean."""
    pytest.importorskip("matplotlib")
    fixed, moving = labelled(3)
    found = sweep(fixed, moving, FFD(stride=7), weighed, over={"weight": WEIGHTS}, **SHORT)
    scores = found.scores.clone()
    scores[0, 2], scores[1] = torch.nan, torch.nan
    scores[2, 2] = 1.0  # by the pairs that did not fail the last one were best
    found = dataclasses.replace(found, scores=scores)
    figure = fnreg.plot.trade_off(found)
    figure.canvas.draw()
    (axes,) = figure.axes
    mean = axes.lines[3]
    np.testing.assert_allclose(mean.get_ydata(), [*scores[[0, 2], :2].mean(0), np.nan])
    np.testing.assert_allclose(mean.get_ydata(), found.means)
    assert found.roughness is not None
    np.testing.assert_allclose(mean.get_xdata()[:2], found.roughness[[0, 2], :2].mean(0))
    assert int(found.common) == int(np.nanargmax(mean.get_ydata()))
    nobody = fnreg.plot.trade_off(dataclasses.replace(found, scores=torch.full_like(scores, torch.nan)))
    nobody.canvas.draw()


def test_the_trade_off_of_two_names_and_of_linear_maps() -> None:
    pytest.importorskip("matplotlib")
    fixed, moving = labelled(2)
    found = sweep(
        fixed,
        moving,
        Rigid(),
        lambda rate, weight: {"objective": weight * mse, "optimizer": adam(rate)},
        over={"rate": torch.tensor([0.01, 0.1, 1.0]), "weight": torch.tensor([1.0, 2.0])},
        judge="value",
        **SHORT,
    )
    figure = fnreg.plot.trade_off(found)
    figure.canvas.draw()
    (axes,) = figure.axes
    assert axes.get_xlabel() == "rate" and axes.get_xscale() == "log" and "lower is better" in axes.get_ylabel()
    assert [line.get_label() for line in axes.lines] == ["weight 1", "weight 2", "chosen, each pair"]
    np.testing.assert_allclose(axes.lines[1].get_ydata(), found.scores[:, :, 1].mean(0))
