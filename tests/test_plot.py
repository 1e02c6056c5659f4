"""Figures: what they show, where, on which scale, and that every word fits."""

import dataclasses
import io
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

import fnreg
from fnreg import Grid, Image, Mapping, Transform, data, plot
from fnreg.plot.ellipses import limit

pytest.importorskip("matplotlib")
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
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


def test_losses_of_several_terms_show_each(pair: Any) -> None:
    objective = [fnreg.mse, fnreg.mse + 0.5 * fnreg.ncc]
    result = fnreg.register(*pair[:2], fnreg.Rigid(), objective=objective, levels=2, steps=20)
    figure = drawn(plot.losses(result))
    assert [axes.get_ylabel() for axes in figure.axes] == ["objective", "mse", "ncc"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 2, 1]
    shown, ncc = figure.axes[2].lines[0], result.history[1].terms["ncc"]
    assert shown.get_ydata().tolist() == pytest.approx(ncc[ncc.isfinite()].tolist())
    assert shown.get_xdata()[0] == int(result.steps[0])
    assert len(drawn(plot.losses(pair[2])).axes) == 1


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
        plot.batch(solid, solid, solid)
    with pytest.raises(ValueError, match="moving has 3 spatial axes but fixed has 2"):
        plot.overview(fixed, solid, fixed)
    with pytest.raises(ValueError, match="fixed has 1 spatial axis"):
        plot.difference(fnreg.Image(torch.rand(1, 8)), fixed)
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


# -- 3-D ---------------------------------------------------------------------------------------------------------


def solid(direction: Any = None) -> Image:
    grid = Grid((7, 6, 5), spacing=(1.0, 1.5, 2.0), center=(10.0, -20.0, 30.0), direction=direction)
    return Image(torch.rand(1, *grid.shape), grid)


def shown(figure: Figure) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_images() and axes.get_label() != "<colorbar>"]


def pixels(axes: Any, number: int = 0) -> torch.Tensor:
    return torch.as_tensor(axes.get_images()[number].get_array().filled(math.nan))


def test_slices_are_layers_of_voxels() -> None:
    image = solid()
    figure = drawn(plot.slices(image, at=(11.2, -20.0, 27.0), unit="mm", title="solid"))
    panel = shown(figure)
    # index 4.2, 2.5 and 0.5: halves go down
    assert [axes.get_title() for axes in panel] == ["z = 26", "y = -20.75", "x = 11"]
    expected = image.data[0, 0], image.data[0, :, 2], image.data[0, :, :, 4]
    for axes, layer in zip(panel, expected, strict=True):
        assert torch.equal(pixels(axes), layer)
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in panel] == [
        ("x (mm)", "y (mm)"),
        ("x (mm)", "z (mm)"),
        ("y (mm)", "z (mm)"),
    ]
    assert [axes.yaxis_inverted() for axes in panel] == [True, False, False]
    assert panel[1].get_xlim() == pytest.approx((6.5, 13.5)) and panel[1].get_ylim() == pytest.approx((25.0, 35.0))
    assert len({axes.get_images()[0].get_clim() for axes in panel}) == 1
    assert [line.get_xdata()[0] for line in panel[0].lines[:1]] == [11.0]
    for drawing in (
        figure,
        drawn(plot.overlay(image, image)),
        drawn(plot.jacobian(Image(image.data - 0.1, image.grid))),
    ):
        panel = shown(drawing)
        scales = [axes.get_window_extent().width / abs(axes.get_xlim()[1] - axes.get_xlim()[0]) for axes in panel]
        assert max(scales) < 1.01 * min(scales) and all(axes.get_aspect() == 1 for axes in panel)
    assert not shown(plot.slices(image, cross=False))[0].lines


def test_a_flat_image_is_its_own_slice() -> None:
    image = Image(torch.rand(1, 6, 8))
    [axes] = shown(drawn(plot.slices(image, title="flat", unit="pixels")))
    assert torch.equal(pixels(axes), image.data[0]) and axes.get_title() == "flat" and not axes.lines


def test_slices_of_axes_in_another_order_show_the_same_world() -> None:
    image = solid()
    swapped = torch.tensor([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # stored as (y, z, -x)
    grid = Grid((6, 5, 7), spacing=(1.5, 2.0, 1.0), center=(10.0, -20.0, 30.0), direction=swapped)
    stored = Image(image.data.permute(0, 3, 1, 2).flip(1), grid)
    for one, other in zip(shown(plot.slices(image)), shown(plot.slices(stored)), strict=True):
        assert torch.equal(pixels(one), pixels(other))
        assert one.get_title() == other.get_title() and one.get_xlim() == pytest.approx(other.get_xlim())


def test_slices_of_an_oblique_image_lie_in_the_world() -> None:
    turn = torch.linalg.matrix_exp(torch.tensor([[0.0, -0.3, 0.2], [0.3, 0.0, -0.4], [-0.2, 0.4, 0.0]]).double())
    grid = solid(turn).grid
    slope = torch.tensor([0.5, -0.25, 1.0]).double()
    image = Image((grid.points() @ slope).reshape(1, *grid.shape), grid)
    found = 0
    for axes, both, through in zip(shown(drawn(plot.slices(image))), ((0, 1), (0, 2), (1, 2)), (2, 1, 0), strict=True):
        place = axes.get_images()[0].get_transform() - axes.transData
        values = pixels(axes)
        for row, column in ((values.shape[0] // 2, values.shape[1] // 2), (values.shape[0] // 2 + 1, 4), (0, 0)):
            point = grid.center.clone()
            point[list(both)] = torch.tensor(place.transform((column, row))).double()
            point[through] = float(axes.get_title().split(" = ")[1])
            index = grid.world_to_index(point)
            size = torch.tensor(grid.size)
            if bool(((index >= 0) & (index <= size - 1)).all()):
                assert float(values[row, column]) == pytest.approx(float(point @ slope), abs=2e-2)  # titles are rounded
                found += 1
            elif bool(((index < -0.5) | (index > size - 0.5)).any()):
                assert math.isnan(values[row, column])
    assert found >= 4


def test_nan_does_not_spread() -> None:
    image = solid()
    image.data[0, 2, 3, 3] = math.nan
    axes = shown(drawn(plot.slices(image, at=(10.0, -19.25, 30.0))))[0]
    assert int(pixels(axes).isnan().sum()) == 1 and math.isnan(pixels(axes)[3, 3])


def test_pairs_of_solids() -> None:
    fixed, moving = solid(), Image(solid().data, origin=(0.0, 0.0, 0.0))
    warped = Image(torch.rand_like(fixed.data), fixed.grid)
    panel = shown(drawn(plot.overview(fixed, moving, warped, unit="mm", title="solids")))
    assert len(panel) == 15
    assert torch.equal(pixels(panel[0]), fixed.data[0, 2])
    assert torch.equal(pixels(panel[1]), moving.data[0, 2])
    assert torch.equal(pixels(panel[4]), (warped.data - fixed.data)[0, 2])
    assert torch.equal(pixels(panel[12]), warped.data[0, :, :, 3])
    change = shown(drawn(plot.difference(fixed, warped, at=(7.0, -20.0, 30.0))))
    assert torch.equal(pixels(change[2]), (warped.data - fixed.data)[0, :, :, 0])
    mixed = pixels(shown(drawn(plot.checkerboard(fixed, warped, tiles=5)))[0])
    ours, theirs = mixed == fixed.data[0, 2], mixed == warped.data[0, 2]
    assert bool((ours ^ theirs).all()) and bool(ours[0, 0]) and 0.3 < float(ours.double().mean()) < 0.7
    assert len(shown(drawn(plot.overlay(fixed, warped)))) == 3


def test_points_beyond_the_image_are_refused() -> None:
    with pytest.raises(ValueError, match=r"outside of the image: it covers x 6\.5 to 13\.5, y -24\.5 to -15\.5"):
        plot.slices(solid(), at=(0.0, -20.0, 30.0))
    with pytest.raises(ValueError, match="one world point"):
        plot.slices(solid(), at=(0.0, 1.0))
    with pytest.raises(ValueError, match="leave it out for 2-D"):
        plot.slices(Image(torch.rand(1, 8, 8)), at=(0.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="leave it out for 2-D"):
        plot.difference(Image(torch.rand(1, 8, 8)), Image(torch.rand(1, 8, 8)), at=(0.0, 0.0, 0.0))


# -- pairs and pyramids ------------------------------------------------------------------------------------------


def test_overlay_has_an_image_per_colour() -> None:
    fixed, warped = (Image(torch.rand(1, 6, 8) * 4 - 1) for _ in range(2))
    low, high = torch.cat([fixed.data, warped.data]).aminmax()
    red, green = ((image.data[0] - low) / (high - low) for image in (fixed, warped))
    found = pixels(shown(drawn(plot.overlay(fixed, warped, title="overlay")))[0])
    expected = torch.stack([red, green, torch.zeros_like(red), torch.ones_like(red)], -1)
    torch.testing.assert_close(found, expected)
    magenta = pixels(shown(plot.overlay(fixed, warped, colours="magenta-green"))[0])
    torch.testing.assert_close(magenta[..., 2], red)
    with pytest.raises(ValueError, match="unknown colours 'blue': choose from red-green, magenta-green"):
        plot.overlay(fixed, warped, colours="blue")  # type: ignore[arg-type]


def test_difference_is_symmetric_about_zero() -> None:
    fixed, warped = Image(torch.zeros(1, 6, 8)), Image(torch.full((1, 6, 8), -0.5))
    axes = shown(drawn(plot.difference(fixed, warped)))[0]
    assert torch.equal(pixels(axes), warped.data[0]) and axes.get_images()[0].get_clim() == (-0.5, 0.5)
    assert "root mean square 0.5" in axes.get_title()
    assert shown(plot.difference(fixed, warped, reach=2.0))[0].get_images()[0].get_clim() == (-2.0, 2.0)
    with pytest.raises(ValueError, match="reach is 0"):
        plot.difference(fixed, warped, reach=0.0)


@pytest.mark.parametrize("shape", [(24, 32), (8, 12, 16)])
def test_pyramid_shows_every_level_in_one_scale(shape: tuple[int, ...]) -> None:
    image = Image(torch.rand(1, *shape), spacing=0.5)
    levels = image.pyramid(3)
    levels = (levels[0], Image(2 + levels[1].data, levels[1].grid), levels[2])  # the brightest is not the first
    panel = shown(drawn(plot.pyramid(levels, title="pyramid")))
    rows = 1 if len(shape) == 2 else 3
    assert len(panel) == rows * 3
    for axes, level in zip(panel, levels, strict=False):
        data_of = level.data[0] if len(shape) == 2 else level.data[0, (level.grid.shape[0] - 1) // 2]
        assert torch.equal(pixels(axes), data_of)
        assert " × ".join(map(str, level.grid.size)) in axes.get_title()
        assert axes.get_xlim() == pytest.approx(panel[0].get_xlim())
        every = torch.cat([pixels(other).flatten() for other in panel])
        assert axes.get_images()[0].get_clim() == pytest.approx((float(every.min()), float(every.max())))


def test_pyramids_that_are_none() -> None:
    with pytest.raises(ValueError, match="at least one level"):
        plot.pyramid([])
    with pytest.raises(ValueError, match="expected one dimension"):
        plot.pyramid([Image(torch.rand(1, 4, 4)), Image(torch.rand(1, 4, 4, 4))])


# -- maps --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Wave(Transform, abstract=True):
    """x + a sin(y + phase), y + a sin(x): no line stays straight."""

    amplitude: float = 1.0

    def init(self, domain: Any) -> Any:
        return {"phase": torch.zeros((), dtype=torch.float64)}

    def points(self, params: Any, domain: Any, points: torch.Tensor) -> torch.Tensor:
        x, y = points.unbind(-1)
        return torch.stack(
            [x + self.amplitude * torch.sin(y / 2 + params["phase"]), y + self.amplitude * torch.sin(x / 2)], -1
        )


def wave(grid: Grid, amplitude: float = 1.0) -> Mapping:
    return Mapping({"phase": torch.tensor(0.4, dtype=torch.float64)}, grid, Wave(amplitude))


OBLIQUE = Grid((28, 14), spacing=(0.9, 1.2), center=(3.0, -5.0), direction=[[0.8, -0.6], [0.6, 0.8]])


def lines_of(figure: Figure) -> list[list[torch.Tensor]]:
    found = [artist for artist in figure.axes[0].collections if isinstance(artist, LineCollection)]
    return [[torch.as_tensor(line) for line in artist.get_segments()] for artist in found]


@pytest.mark.parametrize("kind", ["wave", "linear"])
def test_lines_of_a_warped_grid_are_mapped_points(kind: str) -> None:
    matrix = torch.tensor([[1.1, -0.3, 2.0], [0.2, 0.9, -1.0]]).double()
    mapping = wave(OBLIQUE) if kind == "wave" else fnreg.linear_mapping(matrix, OBLIQUE)
    border, lines = lines_of(drawn(plot.warped_grid(mapping, lines=7, size=256, unit="mm")))
    # lines at one distance: 7 across the longer side of 25.2, and 5 across the shorter one of 16.8
    assert len(lines) == 7 + 5 and len(border) == 4 and all(len(line) == 256 for line in lines)
    along = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for number, line in enumerate(lines):
        fixed = torch.linspace(-1, 1, 7)[number] if number < 7 else torch.linspace(-1, 1, 5)[number - 7]
        still = torch.full_like(along, float(fixed))
        cube = torch.stack([still, along] if number < 7 else [along, still], -1)
        torch.testing.assert_close(line, mapping.map_points(OBLIQUE.convert(cube, "cube", "world")), atol=1e-6, rtol=0)
    (left, top), (right, bottom) = torch.cat([*lines, *border]).aminmax(dim=0)
    axes = plot.warped_grid(mapping, lines=7).axes[0]
    assert axes.get_xlim()[0] < left and axes.get_xlim()[1] > top
    assert axes.get_ylim()[1] < right and axes.get_ylim()[0] > bottom  # y down


def test_a_small_warped_grid_is_drawn_large(pair: Any) -> None:
    _, moving, result = pair
    figure = drawn(plot.warped_grid(result, image=moving, unit="pixels", title="nine"))
    width, height = figure.axes[0].get_window_extent().size
    assert 470 < width < 550 and 470 < height < 550
    assert torch.equal(pixels(figure.axes[0]), moving.data[0])
    assert all(len(line) == 512 for line in lines_of(figure)[1])
    assert figure.axes[0].get_title() == "nine"
    wide = drawn(plot.warped_grid(wave(Grid((100, 20))), lines=20, size=300))
    width, height = wide.axes[0].get_window_extent().size
    assert 270 < width < 330 and height < 120


def test_points_that_are_lost_leave_gaps() -> None:
    mapping = fnreg.linear_mapping(torch.eye(3, dtype=torch.float64), Grid((8, 8)))

    class Torn(Wave, abstract=True):
        def points(self, params: Any, domain: Any, points: torch.Tensor) -> torch.Tensor:
            return torch.where(points[:, :1] > 2, torch.nan, points)

    torn = Mapping({"phase": torch.zeros((), dtype=torch.float64)}, Grid((8, 8)), Torn())
    axes = drawn(plot.warped_grid(torn)).axes[0]
    assert axes.get_xlim() == plot.warped_grid(mapping).axes[0].get_xlim()
    drawn(plot.quiver(torn))
    lost = Mapping({"phase": torch.tensor(math.nan).double()}, Grid((8, 8)), Wave())
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.warped_grid(lost)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_arrows_are_displacements_in_world_units(scale: float) -> None:
    figure = drawn(plot.quiver(wave(OBLIQUE), arrows=9, scale=scale, unit="mm"))
    arrows = figure.axes[0].collections[0]
    starts = torch.as_tensor(arrows.get_offsets()).double()
    coarse = OBLIQUE.resize((9, 6))
    torch.testing.assert_close(starts, coarse.points())
    vectors = torch.stack([torch.as_tensor(arrows.U), torch.as_tensor(arrows.V)], -1)
    torch.testing.assert_close(vectors, wave(OBLIQUE).map_points(starts) - starts)
    torch.testing.assert_close(torch.as_tensor(arrows.get_array()), vectors.norm(dim=-1))
    assert arrows.angles == arrows.scale_units == "xy" and arrows.scale == pytest.approx(1 / scale)
    assert ("3 times" in figure.axes[0].get_title()) == (scale == 3.0)
    part = Grid((4, 4), center=(3.0, -5.0))
    shown_part = drawn(plot.quiver(wave(OBLIQUE), part, arrows=2, image=Image(torch.rand(1, 4, 4), part)))
    torch.testing.assert_close(
        torch.as_tensor(shown_part.axes[0].collections[0].get_offsets()).double(), part.resize(2).points()
    )


def test_colours_of_a_flow_tell_direction_and_length() -> None:
    grid = Grid((5, 1), spacing=2.0)
    field = torch.tensor([[4.0, -4.0, 0.0, 0.0, math.nan], [0.0, 0.0, 2.0, 0.0, 0.0]]).reshape(2, 1, 5)
    figure = drawn(plot.flow(field, grid, unit="mm"))
    found = pixels(figure.axes[0])[0]
    red, cyan, half, white = [1, 0, 0, 1], [0, 1, 1, 1], [0.75, 1, 0.5, 1], [1, 1, 1, 1]
    torch.testing.assert_close(found[:4], torch.tensor([red, cyan, half, white]).double())
    assert float(found[4, 3]) == 0 and "longest 4 mm" in figure.axes[0].get_title()
    key = figure.axes[1]
    assert key.get_xlim() == (-4, 4) and key.get_ylim() == (4, -4)
    wheel = pixels(key)
    torch.testing.assert_close(wheel[100, 200], torch.tensor(red).double())  # right, as the first pixel
    torch.testing.assert_close(wheel[150, 100], torch.tensor(half).double())  # half way down, as the third
    assert float(wheel[0, 0, 3]) == 0
    paler = pixels(plot.flow(field, grid, limit=8.0).axes[0])[0]
    torch.testing.assert_close(paler[0], torch.tensor([1, 0.5, 0.5, 1]).double())
    drawn(plot.flow(torch.zeros(2, 6, 6), Grid((6, 6))))


def test_jacobian_is_centred_at_one() -> None:
    grid = Grid((3, 2))
    values = torch.tensor([[0.5, 1.0, 1.5], [1.0, math.nan, 1.0]])
    figure = drawn(plot.jacobian(values, grid))
    axes = shown(figure)[0]
    assert axes.get_images()[0].get_clim() == pytest.approx((0.5, 2.0))
    assert figure.axes[-1].get_ylim() == pytest.approx((0.5, 2.0))
    assert [text.get_text() for text in figure.axes[-1].get_yticklabels()] == ["0.5", "0.707", "1", "1.41", "2"]
    norm = axes.get_images()[0].norm
    assert norm(1.0) == pytest.approx(0.5) and norm(1 / 1.7) == pytest.approx(1 - norm(1.7))
    assert axes.get_title() == "Jacobian determinant\n0.5 to 1.5, folded 0 %"
    assert bool(pixels(axes, 1).isnan().all()) and not figure.legends
    limited = shown(drawn(plot.jacobian(Image(values.unsqueeze(0), grid), limit=1.2, title="two")))[0]
    assert limited.get_images()[0].get_clim() == pytest.approx((1 / 1.2, 1.2))
    assert limited.get_title().startswith("two\n0.5 to 1.5")


def test_folds_are_loud() -> None:
    values = torch.tensor([[[1.0, -0.5], [0.0, 20.0]], [[1.0, 1.0], [1.0, 1.0]]])
    figure = drawn(plot.jacobian(values[0], Grid((2, 2))))
    axes = shown(figure)[0]
    assert axes.get_images()[0].get_clim() == pytest.approx((1 / 8, 8))  # one voxel does not take all colours
    assert torch.equal(pixels(axes).isnan(), values[0] <= 0)
    assert torch.equal(pixels(axes, 1).isnan(), values[0] > 0)
    assert to_hex(axes.get_images()[1].cmap(0.5)) == "#ffe100"
    assert axes.get_title().endswith("-0.5 to 20, folded 50 %")
    assert "folded" in figure.legends[0].get_texts()[0].get_text()
    solids = drawn(plot.jacobian(values, Grid((2, 2, 2))))
    assert len(shown(solids)) == 3 and "folded 25 %" in solids.get_suptitle()
    drawn(plot.jacobian(torch.full((4, 4), math.nan), Grid((4, 4))))
    drawn(plot.jacobian(torch.ones(4, 4), Grid((4, 4))))


def test_maps_that_cannot_be_drawn() -> None:
    grid = Grid((8, 8))
    solid_map = fnreg.linear_mapping(torch.eye(4, dtype=torch.float64), Grid((4, 4, 4)))
    many = fnreg.stack([wave(grid), wave(grid)])
    for draw in (plot.warped_grid, plot.quiver):
        with pytest.raises(ValueError, match="draws 2-D maps"):
            draw(solid_map)
        with pytest.raises(ValueError, match="a batch of maps"):
            draw(many)
        with pytest.raises(TypeError, match="expected a Mapping or a Registration"):
            draw(Wave())  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="draws 2-D images"):
            draw(wave(grid), image=Image(torch.rand(1, 4, 4, 4)))
    with pytest.raises(ValueError, match="at least 2 lines"):
        plot.warped_grid(wave(grid), lines=1)
    with pytest.raises(ValueError, match="at least one arrow"):
        plot.quiver(wave(grid), arrows=0)
    with pytest.raises(ValueError, match="expected a 2-D field"):
        plot.flow(torch.zeros(2, 4, 4), grid)
    with pytest.raises(ValueError, match="limit is 0"):
        plot.flow(torch.zeros(2, 8, 8), grid, limit=0.0)
    with pytest.raises(ValueError, match="give the grid"):
        plot.jacobian(torch.ones(8, 8))
    with pytest.raises(ValueError, match="leave out the other grid"):
        plot.jacobian(Image(torch.ones(1, 8, 8)), grid)
    with pytest.raises(ValueError, match="2 channels"):
        plot.jacobian(torch.ones(2, 8, 8), grid)
    with pytest.raises(ValueError, match="limit is 1"):
        plot.jacobian(torch.ones(8, 8), grid, limit=1.0)
    with pytest.raises(TypeError, match="determinant is list"):
        plot.jacobian([[1.0]], grid)  # type: ignore[arg-type]


# -- patients and labels -----------------------------------------------------------------------------------------


def letters(axes: Any) -> dict[str, tuple[float, float]]:
    """World positions of the letters of a panel, by letter."""
    place = axes.transAxes + axes.transData.inverted()
    return {text.get_text(): tuple(place.transform(text.get_position())) for text in axes.texts}


@pytest.mark.parametrize("turned", [False, True])
def test_letters_tell_the_sides_of_the_patient(turned: bool) -> None:
    """World LPS: x leads to the left, y to the back, z to the head; whatever the axes of the grid are."""
    direction = torch.tensor([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]) if turned else torch.eye(3)
    image = Image(torch.rand(1, 7, 5, 6), Grid((6, 5, 7), spacing=(1.5, 2.0, 1.0), direction=direction))
    leads = {"R": (0, -1), "L": (0, 1), "A": (1, -1), "P": (1, 1), "I": (2, -1), "S": (2, 1)}  # axis, sign
    panel = shown(drawn(plot.slices(image, unit="mm")))
    for axes, both, expected in zip(panel, ((0, 1), (0, 2), (1, 2)), ("RLPA", "RLIS", "APIS"), strict=True):
        found = letters(axes)
        assert sorted(found) == sorted(expected)
        for letter, world in found.items():
            axis, sign = leads[letter]
            along = world[both.index(axis)] - float(image.grid.center[axis])
            assert along * sign > 0.3 * float(image.grid.extent.min())
        # On the screen the right side is on the left, and the front or the head above.
        screen = {text.get_text(): axes.transAxes.transform(text.get_position()) for text in axes.texts}
        assert screen[expected[0]][0] < screen[expected[1]][0] and screen[expected[2]][1] < screen[expected[3]][1]
    assert not any(axes.texts for axes in shown(plot.slices(image)))  # of another unit there is no patient
    flat = Image(torch.rand(1, 5, 6))
    assert not any(axes.texts for axes in shown(plot.difference(flat, flat, unit="mm")))


@pytest.mark.parametrize("ndim", [2, 3])
def test_borders_lie_between_pixels_of_different_labels(ndim: int) -> None:
    turn = torch.linalg.qr(torch.randn(ndim, ndim, generator=torch.Generator().manual_seed(1)).double()).Q
    direction = torch.eye(3)[[1, 2, 0]] if ndim == 3 else turn
    grid = Grid((9, 8, 7)[:ndim], spacing=(1.0, 2.0, 3.0)[:ndim], origin=(5.0, -4.0, 2.0)[:ndim], direction=direction)
    fixed = Image(torch.rand(1, *grid.shape), grid)
    ours = torch.zeros(1, *grid.shape, dtype=torch.int64)
    ours[(0, *[slice(2, 5)] * ndim)] = 3
    ours[(0, *[slice(2, 5)] * (ndim - 1), slice(4, 5))] = 2**40  # numbers that floats confuse
    ours[(0, *[slice(2, 5)] * (ndim - 1), slice(5, 7))] = 2**40 + 1
    figure = drawn(plot.labels(fixed, ours, torch.zeros_like(ours), ours, unit="mm", title="labels"))
    panel = shown(figure)
    assert len(panel) == 2 * (1 if ndim == 2 else 3)
    assert [axes.get_title().split(",")[0] for axes in panel] == ["before"] * (len(panel) // 2) + ["after"] * (
        len(panel) // 2
    )
    for number, axes in enumerate(panel):
        fixed_lines, moving_lines = [c for c in axes.collections if isinstance(c, LineCollection)]
        segments = torch.as_tensor(np.stack(fixed_lines.get_segments()))
        assert len(segments) and (len(moving_lines.get_segments()) > 0) == (number >= len(panel) // 2)
        if ndim == 2:
            middle = grid.world_to_index(segments.double().mean(1))
            sides = [((middle + d).round().long(), (middle - d).round().long()) for d in (torch.tensor([0.25, 0.25]),)]
            for a, b in sides:  # one index is whole, the other halfway between two pixels
                assert bool((ours[0, a[:, 1], a[:, 0]] != ours[0, b[:, 1], b[:, 0]]).all())
            assert len(segments) == 3 * 2 + 5 * 2 + 2 * 3
    if ndim == 3:  # cut through the middle of what is marked
        assert (
            panel[0].get_title() == "before, z = " + f"{float(grid.index_to_world(torch.tensor([4.0, 3, 3]))[2]):.4g}"
        )
    with pytest.raises(ValueError, match="before has shape"):
        plot.labels(fixed, ours, ours[0], ours)


def test_ellipses_have_the_size_that_holds_a_share_of_the_truth() -> None:
    image = fnreg.Image(torch.rand(1, 20, 30), spacing=(2.0, 1.0))
    points = torch.tensor([[10.0, 5.0], [30.0, 12.0], [40.0, 9.0]])
    covariance = torch.tensor([[[4.0, 0.0], [0.0, 1.0]], [[2.0, 1.0], [1.0, 2.0]], [[math.inf, 0.0], [0.0, 1.0]]])
    figure = drawn(plot.ellipses(image, points, covariance, level=0.9, scale=2.0, unit="mm"))
    (axes,) = figure.axes
    assert axes.get_title() == "90 % ellipses, drawn 2 times as large"
    (lines,) = (made for made in axes.collections if isinstance(made, LineCollection))
    first, second = lines.get_segments()
    radius = 2 * math.sqrt(-2 * math.log(0.1))
    assert np.ptp(first[:, 0]) == pytest.approx(2 * radius * 2) and np.ptp(first[:, 1]) == pytest.approx(2 * radius)
    away = second[:-1] - [30.0, 12.0]
    square = np.einsum("ni,ij,nj->n", away, np.linalg.inv([[2.0, 1.0], [1.0, 2.0]]), away)
    assert square == pytest.approx(radius**2)
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [line.get_xydata().tolist() for line in crosses] == [[[40.0, 9.0]]]
    assert figure.legends[0].get_texts()[0].get_text() == "infinite variance, or no registration"


@pytest.mark.parametrize("count", [2, 3, 8, 32, 1000])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_the_limit_of_copies_is_that_of_fishers_distribution(level: float, count: int) -> None:
    quantile = 2 * count / (count - 1) * scipy.stats.f.ppf(level, 2, count - 1)
    assert limit(level, count) == pytest.approx(quantile, rel=1e-9)
    assert limit(level) == pytest.approx(scipy.stats.chi2.ppf(level, 2), rel=1e-12)


def test_the_ellipse_of_copies_holds_what_it_says() -> None:
    """Errors that are as those of the copies, about a reference that is known."""
    draws = np.random.default_rng(0).normal(size=(20_000, 9, 2)) @ np.array([[2.0, 0.3], [0.0, 0.5]])
    error, copies = draws[:, 0], draws[:, 1:]
    covariance = np.einsum("bni,bnj->bij", copies, copies) / 8
    square = np.einsum("bi,bij,bj->b", error, np.linalg.inv(covariance), error)
    assert np.mean(square <= limit(0.95, 8)) == pytest.approx(0.95, abs=0.006)
    assert np.mean(square <= limit(0.95)) == pytest.approx(0.86, abs=0.01)  # as if there were no end of copies


def test_ellipses_of_copies_are_larger() -> None:
    given = fnreg.Image(torch.rand(1, 8, 8)), torch.tensor([[4.0, 4.0]]), torch.eye(2)[None]
    figure = drawn(plot.ellipses(*given, count=8))
    (axes,) = figure.axes
    assert axes.get_title() == "95 % ellipses of 8 copies"
    (lines,) = (made for made in axes.collections if isinstance(made, LineCollection))
    assert np.ptp(lines.get_segments()[0][:, 0]) == pytest.approx(2 * math.sqrt(limit(0.95, 8)))


def test_ellipses_of_volumes_are_on_the_slices_that_are_near() -> None:
    image = fnreg.Image(torch.rand(1, 10, 12, 14))
    points = torch.tensor([[6.0, 5.0, 4.0], [6.0, 11.0, 4.0], [13.0, 5.0, 9.0]])
    covariance = torch.diag(torch.tensor([1.0, 4.0, 9.0])).expand(3, 3, 3)
    figure = drawn(plot.ellipses(image, points, covariance, at=(6.0, 5.0, 4.0), slab=1.0, title="errors"))
    shown = [axes.collections[0].get_segments() for axes in figure.axes]
    assert [len(segments) for segments in shown] == [2, 2, 2]  # z = 4, y = 5, x = 6
    radius = math.sqrt(-2 * math.log(0.05))
    spans = [(np.ptp(segments[0][:, 0]), np.ptp(segments[0][:, 1])) for segments in shown]
    assert spans == [pytest.approx((2 * radius * a, 2 * radius * b)) for a, b in ((1, 2), (1, 3), (2, 3))]


@pytest.mark.parametrize(
    ("points", "covariance", "options", "words"),
    [
        (torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3), {}, r"points have shape \(2, 3\): expected \(N, 2\)"),
        (torch.zeros(2, 2), torch.eye(2), {}, r"covariance has shape \(2, 2\): expected \(2, 2, 2\)"),
        (torch.zeros(1, 2), torch.eye(2)[None], {"level": 1.0}, "level is 1.0 and scale 1.0"),
        (torch.zeros(1, 2), torch.eye(2)[None], {"slab": 0.0}, "slab is 0.0: expected a positive length"),
        (torch.zeros(1, 2), torch.eye(2)[None], {"count": 1}, "count is 1: a covariance is estimated from at least 2"),
    ],
)
def test_ellipses_that_do_not_fit(points: Any, covariance: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plot.ellipses(fnreg.Image(torch.rand(1, 8, 8)), points, covariance, **options)
