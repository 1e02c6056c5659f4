"""Correlation in windows: the equation by loops over windows, its laws, its closed form, and a registration by it."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import close, equal_bits, few, without_kernels
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, grad_and_value, vmap

import fnreg
from fnreg import native
from fnreg.filters import gaussian
from fnreg.losses import local
from fnreg.losses.local import lncc

SHAPES = [(11,), (9, 7), (6, 5, 7)]
shapes = pytest.mark.parametrize("shape", SHAPES)
needs_compiler = pytest.mark.skipif(native.load() is None, reason="the closed form is in C")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def mask(*shape: int, seed: int = 5) -> Tensor:
    return torch.rand(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_loops(a: Tensor, b: Tensor, weights: Tensor | None, radius: int, squared: bool, window: str = "box") -> float:
    """The definition, window after window, in NumPy."""
    w = np.ones(a.shape[1:]) if weights is None else weights[0].numpy()
    reach = radius if window == "box" else 2 * radius
    found = []
    for x, y in zip(a.numpy(), b.numpy(), strict=True):
        total, share = 0.0, 0.0
        for centre in np.ndindex(w.shape):
            near = tuple(slice(max(c - reach, 0), c + reach + 1) for c in centre)
            away = [np.arange(s.start, min(s.stop, n)) - c for s, n, c in zip(near, w.shape, centre, strict=True)]
            if window == "box":
                g = w[near].copy()
            else:
                g = w[near] * np.exp(-2 * sum(d.astype(float) ** 2 for d in np.ix_(*away)) / radius**2)
            if g.sum() == 0:
                continue
            g /= g.sum()
            p, q = x[near] - (g * x[near]).sum(), y[near] - (g * y[near]).sum()
            cov, first, second = (g * p * q).sum(), (g * p * p).sum(), (g * q * q).sum()
            total += w[centre] * (cov**2 / (first * second) if squared else cov / math.sqrt(first * second))
            share += w[centre]
        found.append(1 - total / share)
    return float(np.mean(found))


@shapes
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("window", ["box", "gaussian"])
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "plain"])
def test_the_equation(shape: tuple[int, ...], masked: bool, squared: bool, window: Any, kernel: bool) -> None:
    a, b = random(2, *shape), random(2, *shape, seed=1)
    weights = mask(*shape) if masked else None
    expected = by_loops(a, b, weights, 1, squared, window)
    with mock.patch.object(native, "load", native.load if kernel else lambda: None):
        found = lncc(a, b, weights, radius=1, squared=squared, window=window)
    assert float(found) == pytest.approx(expected, abs=1e-12)


@needs_compiler
@shapes
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("squared", [True, False])
def test_the_closed_form_is_the_derivative_of_the_equation(shape: tuple[int, ...], masked: bool, squared: bool) -> None:
    a, b = random(2, *shape), random(2, *shape, seed=1)
    weights = mask(*shape) if masked else None
    gradient = grad(lambda x: lncc(x, b, weights, squared=squared))
    found = gradient(a)
    with without_kernels():
        close(found, gradient(a), atol=1e-14)
    assert float(found.abs().max()) > 1e-4


@needs_compiler
@shapes
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("window", ["box", "gaussian"])
@pytest.mark.parametrize("flat", [0.1, 0.9])
def test_the_closed_form_by_the_weights(shape: tuple[int, ...], squared: bool, window: Any, flat: float) -> None:
    """With voxels and windows without weight, of images that are flat in places; no tape over the equation."""
    a, b, weights = random(2, *shape), random(2, *shape, seed=1), mask(*shape)
    a[..., :3], b[..., -3:], weights[..., 3] = 0.5, -1.0, 0.0
    gradient = grad(lambda a, w: lncc(a, b, w, radius=1, squared=squared, window=window, flat=flat), argnums=(0, 1))
    with mock.patch.object(local, "_composed", side_effect=AssertionError("took the equation")):
        found = gradient(a, weights)
    with without_kernels():
        expected = gradient(a, weights)
    for one, other in zip(found, expected, strict=True):
        close(one, other, atol=1e-11 * (1 + float(other.abs().max())))  # steep where a window hardly varies
    assert float(found[1].abs().max()) > 1e-4


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "plain"])
def test_the_first_weight_of_a_voxel_counts(kernel: bool) -> None:
    """The derivative by a weight of zero is that towards more of it."""
    a, b, weights = random(1, 6, 7), random(1, 6, 7, seed=1), mask(6, 7)
    weights[0, 2, 3] = 0.0
    more = torch.zeros_like(weights)
    more[0, 2, 3] = 1e-7
    with mock.patch.object(native, "load", native.load if kernel else lambda: None):
        slope = grad(lambda w: lncc(a, b, w))(weights)[0, 2, 3]
        difference = (lncc(a, b, weights + more) - lncc(a, b, weights)) / 1e-7
    assert abs(float(slope)) > 1e-5
    assert float(slope) == pytest.approx(float(difference), rel=1e-4)


@needs_compiler
@pytest.mark.parametrize("axes", [(0, None, 0), (0, 0, None), (0, None, None)])
def test_derivatives_by_weights_of_a_batch(axes: tuple[int | None, ...]) -> None:
    """Alone and shared, by vmap inside grad and outside of it."""
    images = random(3, 2, 6, 5), random(3, 2, 6, 5, seed=1), torch.stack([mask(6, 5, seed=k) for k in range(3)])
    a, b, w = (image if axis == 0 else image[0] for image, axis in zip(images, axes, strict=True))

    def pair(k: int) -> Any:
        of = [image if axis is None else image[k] for image, axis in zip((a, b, w), axes, strict=True)]
        return grad(lncc, argnums=(0, 2))(*of)

    alone = [pair(k) for k in range(3)]
    each = vmap(grad(lncc, argnums=(0, 2)), axes)(a, b, w)
    close(each, tuple(torch.stack([one[k] for one in alone]) for k in range(2)), atol=1e-14)
    whole = grad(lambda a, w: vmap(lncc, axes)(a, b, w).sum(), argnums=(0, 1))(a, w)
    close(whole, (each[0], each[1] if axes[2] == 0 else each[1].sum(0)), atol=1e-14)


@pytest.mark.parametrize("squared", [True, False])
def test_every_derivative(squared: bool) -> None:
    given = random(1, 4, 5).requires_grad_(), random(1, 4, 5, seed=1).requires_grad_(), mask(4, 5).requires_grad_()
    assert gradcheck(lambda a, b, w: lncc(a, b, w, radius=1, squared=squared), given, check_batched_grad=True)
    assert gradcheck(lambda a: lncc(a, given[1].detach(), radius=1, squared=squared), given[:1])
    assert gradgradcheck(lambda a: lncc(a, given[1].detach(), given[2].detach(), radius=1, squared=squared), given[:1])
    assert gradgradcheck(lambda a, b: lncc(a, b, radius=1, squared=squared), given[:2])
    by_images = lncc(given[0], given[1].detach(), given[2], radius=1, squared=squared)
    assert [leaf.requires_grad for leaf in torch.autograd.grad(by_images, given[::2], create_graph=True)] == [True] * 2
    assert gradgradcheck(lambda a, w: lncc(a, given[1].detach(), w, radius=1, squared=squared), given[::2])


@needs_compiler
def test_forward_mode_and_a_hessian() -> None:
    a, b = random(1, 3, 4), random(1, 3, 4, seed=1)

    def value(x: Tensor) -> Tensor:
        return lncc(x, b, radius=1)

    tangent = random(1, 3, 4, seed=2)
    close(torch.func.jvp(value, (a,), (tangent,))[1], (grad(value)(a) * tangent).sum(), atol=1e-12)
    hessian = torch.func.hessian(value)(a)
    found = torch.func.jacrev(grad(value))(a)
    close(found, hessian, atol=1e-10)


@few
@given(scale=st.floats(0.1, 50), shift=st.floats(-100, 100), sign=st.sampled_from([1.0, -1.0]), seed=st.integers(0, 99))
def test_contrast_and_brightness_do_not_matter(scale: float, shift: float, sign: float, seed: int) -> None:
    a, b = random(1, 8, 9, seed=seed), random(1, 8, 9, seed=seed + 1)
    assert float(lncc(sign * scale * a + shift, b)) == pytest.approx(float(lncc(a, b)), abs=1e-9)
    assert float(lncc(a, b)) == pytest.approx(float(lncc(b, a)), abs=1e-12)
    signed = lncc(scale * a + shift, b, squared=False), lncc(a, b, squared=False)
    assert float(signed[0]) == pytest.approx(float(signed[1]), abs=1e-9)
    inverted = lncc(-a, b, squared=False)
    assert float(inverted) == pytest.approx(2 - float(signed[1]), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_images_are_at_the_optimum(dtype: torch.dtype) -> None:
    """Binary and flat ones too: windows without variance have no weight."""
    binary = (gaussian(random(1, 20, 20, 20), 2.0) > 0).to(dtype)
    for image in (random(1, 20, 20, dtype=dtype), binary, 1000 + binary, 1e-3 * binary):
        value, gradient = (x for x in grad_and_value(lambda x, y=image: lncc(x, y))(image)[::-1])
        assert abs(float(value)) < (1e-5 if dtype == torch.float32 else 1e-12)
        assert bool(gradient.isfinite().all())
        shifted = lncc(image.roll(1, -1), image)
        assert float(shifted) > 0.1


def test_flat_images_have_finite_values_and_no_gradient() -> None:
    flat, rough = torch.full((1, 7, 8), 3.0), random(1, 7, 8, dtype=torch.float32)
    for a, b in ((flat, rough), (rough, flat), (flat, flat)):
        gradient, value = grad_and_value(lambda x, y=b: lncc(x, y))(a)
        assert float(value) == 1.0
        assert bool(gradient.isfinite().all())
    patch = rough.clone()
    patch[:, :, :5] = 2.0
    gradient, value = grad_and_value(lambda x: lncc(x, patch))(patch + 0.01 * rough)
    assert bool(gradient.isfinite().all()) and float(value) < 1


def test_hidden_voxels_have_no_influence() -> None:
    a, b, weights = random(1, 9, 10), random(1, 9, 10, seed=1), mask(9, 10)
    weights[..., 6:] = 0
    gradient, value = grad_and_value(lambda x: lncc(x, b, weights))(a)
    assert float(value) == pytest.approx(float(lncc(a[..., :6], b[..., :6], weights[..., :6])), abs=1e-13)
    assert not bool(gradient[..., 6:].any())
    other = a.clone()
    other[..., 6:] = 1e3
    assert float(lncc(other, b, weights)) == pytest.approx(float(value), abs=1e-13)
    close(lncc(a, b, 7 * weights), value, atol=1e-13)  # only shares count
    ones = torch.ones_like(weights)
    close(lncc(a, b, ones), lncc(a, b), atol=1e-14)
    nothing = grad_and_value(lambda x: lncc(x, b, 0 * weights))(a)
    assert float(nothing[1]) == 1.0 and not bool(nothing[0].any())


@needs_compiler
@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_is_its_pairs(masked: bool) -> None:
    a, b = random(4, 2, 12, 13, dtype=torch.float32), random(4, 2, 12, 13, seed=1, dtype=torch.float32)
    weights = torch.stack([mask(12, 13, seed=k).float() for k in range(4)]) if masked else None
    function = grad_and_value(lambda x, y, w: lncc(x, y, w))
    whole = vmap(function, (0, 0, 0 if masked else None))(a, b, weights)
    shared = vmap(function, (0, None, 0 if masked else None))(a, b[0], weights)
    one_mask = vmap(function, (0, 0, None))(a, b, mask(12, 13).float())
    for k in range(4):
        own = None if weights is None else weights[k]
        assert equal_bits(function(a[k], b[k], own), tuple(part[k] for part in whole))
        assert equal_bits(function(a[k], b[0], own), tuple(part[k] for part in shared))
        assert equal_bits(function(a[k], b[k], mask(12, 13).float()), tuple(part[k] for part in one_mask))
    nested = vmap(vmap(lambda x, y: lncc(x, y)))(a.reshape(2, 2, 2, 12, 13), b.reshape(2, 2, 2, 12, 13))
    close(nested.flatten(), vmap(lambda x, y: lncc(x, y))(a, b), atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (None, None)], ids=str)
@pytest.mark.parametrize("below", [(0, None, None), (None, 0, None), (None, None, 0), (0, None, 0), (0, 0, None)])
def test_nested_batches_with_what_is_shared_at_either_level(axes: Any, below: Any) -> None:
    """Against the composition, which torch batches itself."""
    outer = (0, *axes)

    def made(place: int, *shape: int) -> Tensor:
        lead = [2] * (outer[place] == 0) + [3] * (below[place] == 0)
        return random(*lead, *shape, seed=place).abs() if place == 2 else random(*lead, *shape, seed=place)

    given = made(0, 1, 6, 7), made(1, 1, 6, 7), made(2, 1, 6, 7)
    function = vmap(vmap(grad_and_value(lambda a, b, w: lncc(a, b, w, radius=1)), below), outer)
    found = function(*given)
    with without_kernels():
        close(found, function(*given), atol=1e-13)


@pytest.mark.parametrize("scale", [1e-10, 1e-6, 1e-4, 1e6, 1e10])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "plain"])
def test_the_unit_of_intensity_does_not_matter_in_float32(scale: float, squared: bool, kernel: bool) -> None:
    a, b = (gaussian(random(1, 30, 30, seed=s, dtype=torch.float32), 1.0).clamp(min=0) for s in (0, 1))
    # Windows that vary by little more than rounding have derivatives of little more than rounding.
    function = grad_and_value(lambda x, y: lncc(x, y, squared=squared, flat=0.1))
    with mock.patch.object(native, "load", native.load if kernel else lambda: None):
        gradient, value = function(a, b)
        scaled = function(scale * a, scale * b)
    assert float(scaled[1]) == pytest.approx(float(value), abs=1e-4)
    close(scale * scaled[0], gradient, atol=1e-3 * float(gradient.abs().max()))


@needs_compiler
def test_forward_over_reverse() -> None:
    a, b, tangent = (random(1, 5, 6, seed=s) for s in range(3))
    pull = torch.func.vjp(lambda x: lncc(x, b, radius=1), a)[1]
    moved = torch.func.jvp(lambda c: pull(c)[0], (torch.ones(()).double(),), (torch.tensor(0.3, dtype=torch.float64),))[
        1
    ]
    close(moved, 0.3 * pull(torch.ones(()).double())[0], atol=1e-14)
    found = torch.func.jvp(grad(lambda x: lncc(x, b, radius=1)), (a,), (tangent,))[1]
    expected = torch.func.vjp(grad(lambda x: lncc(x, b, radius=1)), a)[1](tangent)[0]
    close(found, expected, atol=1e-12)  # the Hessian is symmetric


def test_a_mask_of_truth_values() -> None:
    a, b = random(1, 8, 9), random(1, 8, 9, seed=1)
    hidden = mask(8, 9) > 0.3
    close(lncc(a, b, hidden), lncc(a, b, hidden.double()), atol=0)


@needs_compiler
def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = random(2, 40, 50, 30, dtype=torch.float32), random(2, 40, 50, 30, seed=1, dtype=torch.float32)
    function = grad_and_value(lambda x: lncc(x, b))
    whole = function(a)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert equal_bits(function(a), whole)


def test_large_offsets_cost_no_precision() -> None:
    a, b = random(1, 12, 12, 12, dtype=torch.float32), random(1, 12, 12, 12, seed=1, dtype=torch.float32)
    expected = float(lncc(a.double(), b.double()))
    assert float(lncc(a, b)) == pytest.approx(expected, abs=1e-6)
    assert float(lncc(a + 100, b - 300)) == pytest.approx(expected, abs=1e-4)  # float32 keeps 1e-5 of such an image


@pytest.mark.parametrize("options", [{"radius": 1}, {"radius": 2, "window": "gaussian"}, {"squared": False}])
def test_a_registration_finds_a_known_shift(options: dict[str, Any]) -> None:
    fixed = fnreg.Image(gaussian(random(1, 32, 32), 2.0))
    bias = 1 + 0.5 * torch.linspace(0, 1, 32, dtype=torch.float64)
    moving = fnreg.Image(3 * fixed.data * bias + 10, origin=(1.5, -1.0))
    result = fnreg.register(fixed, moving, fnreg.Translation(), objective=fnreg.lncc(**options), levels=2, steps=60)
    assert float((result.mapping.params["translation"] - torch.tensor([1.5, -1.0])).abs().max()) < 0.05


@pytest.mark.parametrize("transform", [fnreg.Affine(), fnreg.Diffeomorphism(), fnreg.FFD(4)], ids=str)
@pytest.mark.parametrize("hidden", [False, True])
def test_the_passes_give_the_gradient_of_the_composition(transform: Any, hidden: bool) -> None:
    from fnreg.inputs import prepare
    from fnreg.losses.objective import objective
    from fnreg.pair import pair_gradient
    from fnreg.pytree import tree_map

    grid = fnreg.Grid((14, 12), spacing=(1.0, 1.5))
    fixed, moving = (
        fnreg.stack([fnreg.Image(gaussian(random(2, 12, 14, seed=s + k), 1.0), grid) for k in range(3)]) for s in (0, 9)
    )
    subjects = [fnreg.Subject(image, mask(12, 14, seed=7) if hidden else None) for image in (fixed, moving)]
    level = prepare(*subjects, None, levels=1, min_size=4).level(
        0, transform, objective(fnreg.lncc(radius=1) + 0.2 * fnreg.mse), 3, None
    )
    zero = level.zero_step()
    params = tree_map(lambda leaf: leaf.expand(3, *leaf.shape), transform.init(grid))
    params = level.retract(params, tree_map(lambda leaf: 0.3 * random(*leaf.shape, seed=3), zero))
    found, expected = level.gradient(params), level._over(pair_gradient, params)  # pyright: ignore[reportPrivateUsage]
    close(found, expected, atol=1e-12, rtol=1e-9)
    close(level.value(params)[0], expected[1], atol=1e-13)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"radius": 0}, "radius is 0: expected a whole number of voxels, at least 1"),
        ({"radius": 1.5}, "radius is 1.5: expected a whole"),
        ({"radius": True}, "radius is True"),
        ({"window": "disc"}, "unknown window 'disc': choose box or gaussian"),
        ({"flat": 1.0}, "flat is 1.0: expected a share"),
        ({"flat": -1e-3}, "flat is -0.001"),
    ],
)
def test_absurd_options(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        lncc(random(1, 8, 8), random(1, 8, 8), **options)


@pytest.mark.parametrize("options", [{"radius": 6}, {"radius": 3, "window": "gaussian"}])
def test_a_window_larger_than_the_finest_image(options: dict[str, Any]) -> None:
    image = fnreg.Image(random(1, 20, 12))
    with pytest.raises(ValueError, match=r"has windows of 13 voxels for an image of size \(12, 20\): choose a smaller"):
        fnreg.register(image, image, fnreg.Translation(), objective=fnreg.mse + fnreg.lncc(**options), levels=1)
    coarse = fnreg.Image(
        random(1, 32, 32)
    )  # of a window that fits the finest level what is left on a coarse one counts
    fnreg.register(coarse, coarse, fnreg.Translation(), objective=fnreg.lncc(radius=5), levels=3, steps=1)


def test_images_of_different_shape() -> None:
    with pytest.raises(ValueError, match=r"warped has shape \(1, 8, 8\) but fixed has \(1, 8, 9\)"):
        lncc(random(1, 8, 8), random(1, 8, 9))
