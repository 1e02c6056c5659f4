"""What similarities make of the fixed image once per level: values and gradients are those of every step anew."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from scenes import close
from torch import Tensor

import fnreg
from fnreg import Diffeomorphism, Grid, Image, Subject, native, stack
from fnreg.filters import gaussian
from fnreg.inputs import prepare
from fnreg.losses import terms
from fnreg.losses.objective import STATISTICS, objective
from fnreg.problem import Level
from fnreg.pytree import tree_map

needs_compiler = pytest.mark.skipif(native.load() is None, reason="only the passes in C have levels with statistics")
TERMS = [
    fnreg.ngf,
    fnreg.ngf(edge=0.1, channel=(1, 0)),
    fnreg.mind,
    fnreg.mind(radius=0, dilation=2, channel=0),
    0.3 * fnreg.mse + 0.5 * fnreg.mind(radius=0) + fnreg.mi,
]
COUNT = 3


def image(seed: int, spacing: float = 1.0) -> Image:
    data = torch.randn(2, 12, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Image(gaussian(data, 1.0), Grid((14, 12), spacing=(spacing, 1.5)))


def mask(seed: int) -> Tensor:
    return torch.rand(1, 12, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).sub(0.2).relu()


def level_of(term: Any, shared: bool, masks: str, padding: Any = "border", moving_mask: bool = False) -> Level:
    fixed = image(0) if shared else stack([image(k, 1 + k / 10) for k in range(COUNT)])
    moving = stack([image(10 + k) for k in range(COUNT)])
    known = {"none": None, "shared": mask(5), "each": torch.stack([mask(5 + k) for k in range(COUNT)])}[masks]
    whole = prepare(
        Subject(fixed, known), Subject(moving, mask(9) if moving_mask else None), None, levels=1, min_size=4
    )
    return whole.level(0, Diffeomorphism(), objective(term), COUNT, padding)


def params_of(level: Level) -> Any:
    def bent(leaf: Tensor) -> Tensor:
        seeds = torch.Generator().manual_seed(3)
        return leaf + 0.7 * torch.randn(leaf.shape, dtype=leaf.dtype, generator=seeds)

    return tree_map(bent, level.zero_step())


@needs_compiler
@pytest.mark.parametrize("term", TERMS, ids=repr)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "each"])
@pytest.mark.parametrize("masks", ["none", "shared", "each"])
def test_values_and_gradients_are_those_without(term: Any, shared: bool, masks: str) -> None:
    level = level_of(term, shared, masks)
    params = params_of(level)
    found = level.gradient(params), level.value(params)
    some = torch.tensor([2, 0])
    taken = level.take(some).gradient(tree_map(lambda leaf: leaf[some], params))
    with mock.patch.dict(STATISTICS, clear=True):
        expected = level_of(term, shared, masks)
        close(found, (expected.gradient(params), expected.value(params)), atol=1e-13)
    close(taken, tree_map(lambda leaf: leaf[some], found[0]), atol=1e-13)


def counted(level: Level) -> int:
    """How often the statistics are made in three steps."""
    made: list[Any] = []

    def of_fixed(*given: Any, **options: Any) -> Any:
        made.append(given)
        return original.of_fixed(*given, **options)

    original = STATISTICS[terms.mind.function]
    with mock.patch.dict(STATISTICS, {terms.mind.function: original._replace(of_fixed=of_fixed)}):
        for _ in range(3):
            level.gradient(params_of(level))
    return len(made)


@needs_compiler
def test_they_are_made_once_and_only_of_what_stays() -> None:
    assert counted(level_of(fnreg.mind, shared=False, masks="each")) == 1
    assert counted(level_of(fnreg.mind, shared=False, masks="each", padding=None)) == 0
    assert counted(level_of(fnreg.mind, shared=False, masks="none", moving_mask=True)) == 0


@needs_compiler
def test_a_shared_fixed_image_has_shared_statistics() -> None:
    for masks, batched in (("none", False), ("shared", False), ("each", True)):
        passes = level_of(fnreg.ngf, shared=True, masks=masks)._passes
        assert passes is not None
        found, axes = passes._statistics
        assert set(axes) == ({0} if batched else {None})
        assert found[0].ndim == (5 if batched else 4)  # (D, C, Y, X) for one pair


@needs_compiler
def test_what_is_alike_for_all_pairs_is_kept_once() -> None:
    """Self-similarity does not ask for grids, and without masks all fixed images are seen everywhere."""
    moved = stack([Grid((14, 12), origin=(k, 0.0)) for k in range(COUNT)])
    moving = Image(torch.stack([image(10 + k).data for k in range(COUNT)]), moved)
    for fixed, batched in ((Image(image(0).data, moved), [False, False]), (moving, [True, False])):
        whole = prepare(fixed, moving, None, levels=1, min_size=4)
        passes = whole.level(0, Diffeomorphism(), objective(fnreg.mind), COUNT, "border")._passes
        assert passes is not None
        found, axes = passes._statistics
        assert [axis == 0 for axis in axes] == batched
        assert [len(leaf) == COUNT for leaf in found[0]] == batched
        value, terms_of = passes._of_images(moving.data, None)
        alone = [
            fnreg.mind.function(a, b) for a, b in zip(moving.data, fixed.data.expand(COUNT, -1, -1, -1), strict=True)
        ]
        close(value, torch.stack(alone), atol=1e-12)
        assert list(terms_of) == ["mind"]


@needs_compiler
@pytest.mark.parametrize("term", [fnreg.ngf, fnreg.mind], ids=repr)
def test_pairs_that_end_early_leave_the_others_theirs(term: Any) -> None:
    """Compaction takes pairs out of a batch; each ends where it would have ended alone."""
    fixed, moving = stack([image(k) for k in range(4)]), stack([image(k if k < 2 else 20 + k) for k in range(4)])
    options: dict[str, Any] = {"objective": term, "levels": 1, "steps": 40, "padding": "border"}
    options["stop"] = fnreg.Stop(every=2, patience=3, relative=1e-2)
    batch = fnreg.register(fixed, moving, Diffeomorphism(), **options)
    assert len(set(batch.steps[:, 0].tolist())) > 1
    for k in range(4):
        alone = fnreg.register(image(k), image(k if k < 2 else 20 + k), Diffeomorphism(), **options)
        close(alone.mapping.params, tree_map(lambda leaf: leaf[k], batch.mapping.params), atol=1e-9)  # noqa: B023
