"""Figures: what they show, where, on which scale, and that every word fits."""

import dataclasses
import io
import math
from typing import Any

import pytest
import torch

import fnreg
from fnreg import data, plot

pytest.importorskip("matplotlib")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text


def drawn(figure: Figure) -> Figure:
    """The figure after it was rendered, with all of its words inside of it and no window opened."""
    assert isinstance(figure, Figure) and figure.canvas.manager is None
    stream = io.BytesIO()
    figure.savefig(stream)
    assert stream.getvalue().startswith(b"\x89PNG")
    edges = figure.bbox
    # Labels of ticks beyond the axis exist but are not drawn; axes that are off draw nothing.
    axises = [axis for axes in figure.findobj(Axes) for axis in (axes.xaxis, axes.yaxis)]
    away = [label for axis in axises for label in axis.get_ticklabels(which="both")]
    away += [text for axes in figure.findobj(Axes) if not axes.axison for text in axes.findobj(Text)]
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    words = [text for text in shown if text not in away]
    assert words
    for text in words:
        box = text.get_window_extent()
        assert box.x0 >= -1 and box.x1 <= edges.x1 + 1, text.get_text()
        assert box.y0 >= -1 and box.y1 <= edges.y1 + 1, text.get_text()
    return figure


def panels(figure: Figure) -> dict[str, Any]:
    return {axes.get_title().split("\n")[0]: axes for axes in figure.axes if axes.get_images() and axes.get_title()}


@pytest.fixture(scope="module")
def pair() -> tuple[fnreg.Image, fnreg.Image, fnreg.Registration]:
    fixed, moving = data.digits(9)
    return fixed, moving, fnreg.register(fixed, moving, [fnreg.Rigid(), fnreg.Affine()], levels=2, steps=4)


def test_overview_shows_five_images(pair: Any) -> None:
    fixed, moving, result = pair
    figure = drawn(plot.overview(fixed, moving, result.warp(moving), unit="pixels", title="nines"))
    shown = panels(figure)
    assert list(shown) == ["fixed", "moving", "warped", "moving − fixed, before", "warped − fixed, after"]
    limits = [axes.get_images()[0].get_clim() for axes in shown.values()]
    assert limits[0] == limits[1] == limits[2] and limits[3] == limits[4]
    assert limits[3][0] == -limits[3][1] < 0
    for axes in shown.values():
        assert axes.get_aspect() == 1 and axes.yaxis_inverted() and not axes.xaxis_inverted()
        assert axes.get_xlabel() == "x (pixels)" and axes.get_ylabel() == "y (pixels)"
        assert axes.get_xlim() == (-0.5, 27.5)


def test_images_lie_where_their_grid_puts_them() -> None:
    turn = math.radians(90)
    direction = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    grid = fnreg.Grid((4, 6), spacing=(2.0, 3.0), origin=(10.0, 20.0), direction=direction)
    values = torch.arange(24.0).reshape(1, 6, 4)
    image = fnreg.Image(values, grid)
    axes = panels(drawn(plot.overview(image, image, image)))["fixed"]
    shown = axes.get_images()[0]
    to_world = shown.get_transform() - axes.transData
    for index in ((0, 0), (3, 0), (3, 5)):
        expected = grid.index_to_world(torch.tensor(index, dtype=torch.float64)).tolist()
        assert to_world.transform(index) == pytest.approx(expected)
    assert axes.get_xlim() == pytest.approx((10 - 16.5, 10 + 1.5)) and axes.get_ylim() == pytest.approx((27, 19))


def test_difference_before_is_on_the_fixed_grid() -> None:
    fixed = fnreg.Image(torch.rand(1, 8, 8))
    moving = fnreg.Image(fixed.data[..., 2:, 2:], origin=(2.0, 2.0))
    before = panels(plot.overview(fixed, moving, fixed))["moving − fixed, before"].get_images()[0].get_array()
    assert abs(before[2:, 2:]).max() < 1e-6 and before[0, 0] == pytest.approx(-float(fixed.data[0, 0, 0]))


def test_colours_are_averaged_and_constants_shown() -> None:
    drawn(plot.overview(*(fnreg.Image(torch.ones(3, 5, 40)) for _ in range(3))))


@pytest.mark.parametrize("tiles", [2, 7, 8, 100])
def test_checkerboard_takes_turns(tiles: int) -> None:
    size = 28
    fixed, warped = fnreg.Image(torch.zeros(1, size, size)), fnreg.Image(torch.ones(1, size, size))
    figure = drawn(plot.checkerboard(fixed, warped, tiles))
    mixed = torch.as_tensor(figure.axes[0].get_images()[0].get_array())
    assert mixed[0, 0] == 0 and mixed[0, -1] == mixed[-1, 0]
    assert int(mixed[0].diff().abs().sum()) == min(tiles, size) - 1
    assert 0.4 < float(mixed.mean()) < 0.6


def test_losses_one_curve_per_level(pair: Any) -> None:
    figure = drawn(plot.losses(pair[2], objective="mean squared difference"))
    names = [line.get_label() for line in figure.axes[0].lines]
    assert names == [f"stage {s}, level {n}" for s in (1, 2) for n in ("1, 1/2", "0, full resolution")]
    assert figure.axes[0].get_xlabel() == "step" and figure.axes[0].get_ylabel() == "mean squared difference"


def test_losses_of_a_batch_keep_what_has_ended() -> None:
    fixed, moving = data.digit_pairs(6)
    result = fnreg.register(fixed, moving, fnreg.Translation(), levels=1, steps=40)
    trace = dataclasses.replace(result.history[0], value=torch.tensor([[4.0, 2.0, 1.0], [3.0, 3.0, float("nan")]]))
    shown = drawn(plot.losses(fnreg.Registration(**{**vars(result), "history": (trace,)})))
    assert shown.axes[0].lines[0].get_ydata().tolist() == [3.5, 2.5, 2.0]
    assert "6 pairs" in drawn(plot.losses(result)).axes[0].get_title()


def test_losses_without_steps(pair: Any) -> None:
    fixed, moving, _ = pair
    drawn(plot.losses(fnreg.register(fixed, moving, fnreg.Rigid(), levels=1, steps=0)))


def test_search_marks_the_lowest() -> None:
    figure = drawn(plot.search(torch.arange(360), torch.cos(torch.deg2rad(torch.arange(360.0))), objective="loss"))
    assert "best: 180.0°" in [line.get_label() for line in figure.axes[0].lines]
    assert figure.axes[0].get_xlabel() == "angle (degrees)" and figure.axes[0].get_ylabel() == "loss"
    figure = drawn(plot.search([0.0, 1.0], [2.0, 3.0], best=1.0, others={"stuck": (0.5, 2.5)}))
    assert {"best: 1.0°", "stuck"} <= {line.get_label() for line in figure.axes[0].lines}


def test_batch_shows_a_pair_per_column() -> None:
    fixed, moving = data.digit_pairs(12)
    figure = drawn(plot.batch(fixed, moving, moving, count=5, title="five pairs"))
    assert len([axes for axes in figure.axes if axes.get_images() and axes.get_label() != "<colorbar>"]) == 20
    shared = fnreg.Image(fixed.data[0], fixed.grid)
    drawn(plot.batch(shared, moving, moving, count=2))


def test_what_cannot_be_shown_is_told(pair: Any) -> None:
    fixed, moving, _ = pair
    many = data.digit_pairs(3)[0]
    small = fnreg.Image(torch.rand(1, 8, 8))
    solid = fnreg.Image(torch.rand(1, 4, 8, 8))
    with pytest.raises(ValueError, match="take a slice"):
        plot.overview(solid, solid, solid)
    with pytest.raises(ValueError, match="fixed is a batch of 3"):
        plot.overview(many, moving, moving)
    with pytest.raises(ValueError, match="not on the grid of fixed"):
        plot.checkerboard(fixed, small)
    with pytest.raises(ValueError, match="at least 2"):
        plot.checkerboard(fixed, fixed, tiles=1)
    with pytest.raises(TypeError, match="expected an Image"):
        plot.overview(fixed.data, moving, moving)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one of each"):
        plot.search([0.0, 1.0], [1.0])
    with pytest.raises(ValueError, match="images of one length"):
        plot.batch(fixed, moving, moving)
    with pytest.raises(ValueError, match="show at least one"):
        plot.batch(many, many, many, count=0)
