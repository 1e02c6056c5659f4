"""Registration inside an outer vmap: one more function that batches, with nothing falling back to a loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scenes import known_pair, moving_scene, random_mapping, random_params, scene, tensor
from torch import Tensor
from torch.func import vmap
from torch.testing import assert_close

import fnreg
from fnreg import (
    Affine,
    GaussNewton,
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
    Transform,
    Translation,
    adam,
    chain,
    clip,
    evaluate,
    normalized,
    register,
    sgd,
    stack,
    warp,
)
from fnreg.pytree import tree_map, tree_vmap

PURE: dict[str, Any] = {"levels": 2, "steps": 3, "stop": None, "optimizer": adam(0.3, pure=True)}
NEWTON: dict[str, Any] = {"levels": 2, "steps": 3, "stop": None, "solver": GaussNewton()}
SAME = 1e-9
both_solvers = pytest.mark.parametrize("options", [PURE, NEWTON], ids=["adam", "gauss-newton"])


def pairs(dimension: int = 2) -> tuple[list[Image], list[Image]]:
    """Three pairs on grids of their own."""
    fixed, moving = [], []
    for n in range(3):
        view: dict[str, Any] = {"turn": (0.2 * n, 0.1, 0.0), "spacing": 1 + 0.05 * n, "mirror": n == 2}
        fixed.append(scene(dimension, random_mapping(Rigid(), scene(dimension, **view).grid, n, 0.7), **view))
        moving.append(moving_scene(dimension, turn=(0.1, 0.1 * n, 0.0)))
    return fixed, moving


def points_of(result: Any) -> Tensor:
    return result.map_points(tensor([[1.0, 2.0, 3.0], [-4.0, 0.5, 1.0], [6.0, -5.0, 2.0]])[:, : result.fixed_grid.ndim])


@both_solvers
@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_register_under_vmap_equals_the_loop_and_its_own_batch(dimension: int, options: dict[str, Any]) -> None:
    fixed, moving = pairs(dimension) if dimension > 1 else ([], [])
    if dimension == 1:
        fixed = [scene(1, random_mapping(Affine(), scene(1).grid, n, 0.5), spacing=1 + 0.1 * n) for n in range(3)]
        moving = [moving_scene(1, spacing=0.9 + 0.1 * n) for n in range(3)]
    transform: Transform = Affine() if dimension == 1 else Rigid()

    def one(f: Image, m: Image) -> tuple[Tensor, Tensor]:
        result = register(f, m, transform, **options)
        return points_of(result), result.value

    found, value = tree_vmap(one, [None, None], stack(fixed), stack(moving))
    batch = register(stack(fixed), stack(moving), transform, **options)
    loop = [one(f, m) for f, m in zip(fixed, moving, strict=True)]
    assert_close(found, torch.stack([p for p, _ in loop]), atol=SAME, rtol=0)
    assert_close(found, points_of(batch), atol=SAME, rtol=0)
    assert_close(value, torch.stack([v for _, v in loop]), atol=1e-12, rtol=0)
    assert_close(value, batch.value, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "transform",
    [Translation(), Scaling(), Held(Rigid(), ("rotation",)), Sequential((Rigid(), Scaling()))],
    ids=str,
)
def test_every_kind_of_transform_runs_under_vmap(transform: Transform) -> None:
    fixed, moving = pairs()

    def one(f: Image, m: Image) -> Tensor:
        return points_of(register(f, m, transform, **PURE))

    loop = torch.stack([one(f, m) for f, m in zip(fixed, moving, strict=True)])
    assert_close(tree_vmap(one, [None, None], stack(fixed), stack(moving)), loop, atol=SAME, rtol=0)


def case(name: str) -> dict[str, Any]:
    """Options of register that vmap must not mind."""
    grid = scene(2).grid
    return {
        "ncc": {"objective": fnreg.mse + 0.1 * fnreg.ncc},
        "mae": {"objective": fnreg.mae},
        "callable": {
            "objective": lambda warped, fixed, displacement: (warped - fixed).square().mean() + 0 * displacement.mean()
        },
        "padding": {"padding": "reflection"},
        "then": {"then": random_mapping(Rigid(), grid, 1, 0.2)},
        "initial": {"initial": random_params(Rigid(), grid, 2, 0.2)},
        "map": {"initial": random_mapping(Rigid(), grid, 2, 0.2)},
        "starts": {"starts": Rigid().spread(grid, 4)},
        "center": {"start": "center"},
        "moments": {"start": "moments"},
        "auto": {"start": "auto"},
        "stages": {"transform": [Rigid(), Stage(Affine(), levels=1, steps=2), Rotation()]},
        "chain": {"optimizer": chain(clip(1.0), sgd(3.0, momentum=0.5, pure=True))},
        "one level": {"levels": 1},
        "no steps": {"steps": 0},
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "ncc",
        "mae",
        "callable",
        "padding",
        "then",
        "initial",
        "map",
        "starts",
        "center",
        "moments",
        "auto",
        "stages",
        "chain",
        "one level",
        "no steps",
    ],
)
def test_every_option_runs_under_vmap(name: str) -> None:
    fixed, moving = pairs()
    options = {"transform": Rigid(), **PURE, **case(name)}

    def one(f: Image, m: Image) -> Tensor:
        return points_of(register(f, m, **options))

    loop = torch.stack([one(f, m) for f, m in zip(fixed, moving, strict=True)])
    assert_close(tree_vmap(one, [None, None], stack(fixed), stack(moving)), loop, atol=SAME, rtol=0)


@pytest.mark.parametrize(
    "optimizer",
    [normalized(0.3, momentum=0.5), chain(chain(clip(0.5)), chain(clip(1.0), adam(0.3, pure=True)))],
    ids=["normalized", "nested"],
)
def test_every_optimizer_of_torch_alone_runs_under_vmap(optimizer: Any) -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    options: dict[str, Any] = {"levels": 1, "steps": 4, "stop": None, "optimizer": optimizer}
    data = torch.stack([moving.data, moving.data.square(), 0.5 * moving.data])

    def one(seen: Tensor) -> Tensor:
        return points_of(register(fixed, Image(seen, moving.grid), Rigid(), **options))

    loop = torch.stack([one(seen) for seen in data])
    assert_close(vmap(one)(data), loop, atol=SAME, rtol=0)
    assert float((loop[0] - loop[1]).abs().max()) > 1e-3


@both_solvers
def test_masks_under_vmap(options: dict[str, Any]) -> None:
    fixed, moving = pairs()
    masks = [torch.ones_like(f.data).index_fill(-1, torch.arange(3 + n), 0) for n, f in enumerate(fixed)]

    def one(f: Image, m: Image, mask: Tensor) -> Tensor:
        return points_of(register(Subject(f, mask), m, Rigid(), **options))

    loop = torch.stack([one(*items) for items in zip(fixed, moving, masks, strict=True)])
    found = tree_vmap(one, [None, None, None], stack(fixed), stack(moving), torch.stack(masks))
    assert_close(found, loop, atol=SAME, rtol=0)


def test_a_batch_inside_a_batch() -> None:
    """The rank rule within, vmap without: rates of learning over pairs."""
    fixed, moving = pairs()
    rates = tensor([0.05, 0.2, 0.4])

    def swept(rate: Tensor) -> Tensor:
        options = {**PURE, "optimizer": adam(rate, pure=True)}
        return points_of(register(stack(fixed), stack(moving), Rigid(), **options))

    found = vmap(swept)(rates)
    loop = torch.stack([swept(rate) for rate in rates])
    assert found.shape == (3, 3, 3, 2)
    assert_close(found, loop, atol=SAME, rtol=0)


def test_a_sweep_of_weights_of_starts_and_of_images_nests() -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    weights, shifts = tensor([0.0, 1e-2]), tensor([[0.0, 0.0], [0.5, -0.5], [0.0, 1.0]])

    def length(displacement: Tensor) -> Tensor:
        return displacement.square().mean()

    def one(weight: Tensor, shift: Tensor, data: Tensor) -> Tensor:
        initial = {"translation": shift}
        objective = fnreg.mse + weight * fnreg.term(length)
        return points_of(
            register(Image(data, fixed.grid), moving, Translation(), objective=objective, initial=initial, **PURE)
        )

    data = torch.stack([fixed.data, 1.1 * fixed.data])
    over_images = vmap(one, in_dims=(None, None, 0))
    found = vmap(vmap(over_images, in_dims=(None, 0, None)), in_dims=(0, None, None))(weights, shifts, data)
    loop = [[[one(w, t, d) for d in data] for t in shifts] for w in weights]
    assert_close(found, torch.stack([torch.stack([torch.stack(b) for b in a]) for a in loop]), atol=SAME, rtol=0)


def test_grids_alone_may_be_batched() -> None:
    """One image at several places and spacings."""
    fixed, moving, _ = known_pair(Rigid(), 2)
    grids = [tree_map(lambda leaf: leaf, moving.grid)]
    grids.append(
        Image(
            moving.data,
            spacing=1.02 * moving.grid.spacing,
            center=moving.grid.center + 0.4,
            direction=moving.grid.direction,
        ).grid
    )

    def one(grid: Any) -> Tensor:
        return points_of(register(fixed, Image(moving.data, grid), Rigid(), **PURE))

    loop = torch.stack([one(grid) for grid in grids])
    assert_close(tree_vmap(one, [None], stack(grids)), loop, atol=SAME, rtol=0)


def test_evaluate_and_warp_under_vmap_equal_the_loop() -> None:
    fixed, moving = pairs()
    several = [random_mapping(Rigid(), f.grid, n, 0.4) for n, f in enumerate(fixed)]

    def one(f: Image, m: Image, mapping: Mapping) -> tuple[Tensor, Tensor]:
        return evaluate(f, m, mapping, objective=fnreg.mse + 0.1 * fnreg.ncc)[0], warp(m, mapping).data

    loop = [one(*items) for items in zip(fixed, moving, several, strict=True)]
    value, data = tree_vmap(one, [None] * 3, stack(fixed), stack(moving), stack(several))
    assert_close(value, torch.stack([v for v, _ in loop]), atol=1e-13, rtol=0)
    assert_close(data, torch.stack([d for _, d in loop]), atol=1e-12, rtol=0)


def test_progress_inside_vmap_is_refused() -> None:
    """What it would tell are values, at which nobody can look there; inside grad one can."""
    fixed, moving, _ = known_pair(Translation(), 2)
    told = list[fnreg.levels.Event]()

    def one(x: Tensor, solve: Any = register, **options: Any) -> Tensor:
        seen = Image(moving.data + x, moving.grid)
        return solve(fixed, seen, Translation(), levels=1, steps=2, progress=told.append, **options).value

    start = torch.zeros(2, dtype=torch.float64)
    unrolled = fnreg.differentiable(register, adjoint=fnreg.Unrolled())
    for call in (
        lambda x: one(x, stop=None, optimizer=adam(0.3, pure=True)),
        lambda x: one(x, unrolled),
    ):
        with pytest.raises(ValueError, match="progress cannot be told inside vmap: leave it out"):
            vmap(call)(start)
    assert not told
    torch.func.grad(lambda x: one(x, unrolled))(start[0])
    assert len(told) == 2


def test_failures_inside_vmap_are_no_exceptions() -> None:
    """What a pair holds cannot be looked at: NaN comes out where NaN went in, and only there."""
    fixed, moving = pairs()
    bad = Image(torch.full_like(fixed[1].data, torch.nan), fixed[1].grid)

    def one(f: Image, m: Image) -> tuple[Tensor, Tensor, Tensor]:
        result = register(f, m, Rigid(), **PURE)
        return points_of(result), result.value, result.status

    clean = tree_vmap(one, [None, None], stack(fixed), stack(moving))
    dirty = tree_vmap(one, [None, None], stack([fixed[0], bad, fixed[2]]), stack(moving))
    for n in (0, 2):
        assert torch.equal(clean[0][n], dirty[0][n])
        assert torch.equal(clean[1][n], dirty[1][n])
    assert bool(dirty[1][1].isnan())
    assert dirty[2].tolist() == [Status.STEPS, Status.DIVERGED, Status.STEPS]  # not which image


def test_failures_that_can_be_seen_inside_vmap_are_exceptions() -> None:
    """The images are no batch: what is wrong with them does not hang on the weight."""
    fixed, moving, _ = known_pair(Rigid(), 2)
    far = Image(moving.data, center=(1e4, 0.0))
    flat = Image(torch.ones_like(moving.data), moving.grid)
    for bad, cause in ((far, Status.NO_OVERLAP), (flat, Status.MOVING_CONSTANT)):

        def one(weight: Tensor, bad: Image = bad) -> Tensor:
            return register(fixed, bad, Rigid(), objective=weight * fnreg.mse, **PURE).value

        for outer, weights in ((vmap, torch.ones(2)), (torch.func.grad, torch.ones(()))):
            with pytest.raises(RegistrationError) as error:
                outer(one)(weights)
            assert str(error.value) == cause.remedy


def test_a_whole_registration_can_leave_vmap() -> None:
    fixed, moving = pairs()
    found = tree_vmap(lambda f, m: register(f, m, Rigid(), **PURE), [None, None], stack(fixed), stack(moving))
    batch = register(stack(fixed), stack(moving), Rigid(), **PURE)
    assert_close(found.value, batch.value, atol=1e-12, rtol=0)
    assert_close(points_of(found), points_of(batch), atol=SAME, rtol=0)


def test_registrations_can_be_stacked() -> None:
    fixed, moving = pairs()
    grid = [Image(f.data, fixed[0].grid) for f in fixed]
    both = stack([register(f, moving[0], Rigid(), **PURE) for f in grid[:2]])
    assert both.value.shape == (2,)


# -- what is refused -----------------------------------------------------------------------------------------------

NOT_PURE: dict[str, dict[str, Any]] = {
    "the default": {},
    "stopping": {"optimizer": adam(0.3, pure=True)},
    "torchopt": {"stop": None},
    "torchopt in a chain": {"stop": None, "optimizer": chain(clip(1.0), adam(0.3))},
    "torchopt in a chain of chains": {"stop": None, "optimizer": chain(clip(1.0), chain(adam(0.3)))},
}
WRAPPED = ["fixed", "moving", "grid", "mask", "then", "initial", "starts", "weight"]


@pytest.mark.parametrize("name", NOT_PURE)
@pytest.mark.parametrize("what", WRAPPED)
@pytest.mark.parametrize("outer", [vmap, torch.func.grad], ids=["vmap", "grad"])
def test_inside_a_transform_the_options_that_work_are_named(outer: Any, what: str, name: str) -> None:
    fixed, moving, _ = known_pair(Translation(), 2)
    zero = {"translation": torch.zeros(2).double()}

    def one(x: Tensor) -> Tensor:
        options: dict[str, Any] = {"levels": 1, "steps": 2, **NOT_PURE[name]}
        sides: list[Any] = [fixed, moving]
        shift = {"translation": zero["translation"] + x}
        if what == "fixed":
            sides[0] = Image(fixed.data + x, fixed.grid)
        elif what == "moving":
            sides[1] = Image(moving.data + x, moving.grid)
        elif what == "grid":
            sides[1] = Image(moving.data, center=moving.grid.center + x, spacing=moving.grid.spacing)
        elif what == "mask":
            sides[0] = Subject(fixed, torch.ones_like(fixed.data) + x)
        elif what == "then":
            options["then"] = Mapping(shift, fixed.grid, Translation())
        elif what == "initial":
            options["initial"] = shift
        elif what == "starts":
            options["starts"] = tree_map(lambda leaf: leaf.unsqueeze(0), shift)
        else:
            options["objective"] = (1 + x) * fnreg.mse
        return register(*sides, Translation(), **options).value

    start = torch.zeros(3, dtype=torch.float64) if outer is vmap else tensor(0.0)
    with pytest.raises(ValueError, match=r"inside vmap or grad needs stop=None and .*adam\(0\.3, pure=True\)"):
        outer(one)(start)
