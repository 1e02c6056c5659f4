"""A call of `register` that is to be differentiated: its arguments, and what must not hide in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from fnreg.grid import Grid
from fnreg.image import Image, Subject, subject
from fnreg.inputs import prepare
from fnreg.losses.features import Feature
from fnreg.losses.objective import Objective, Term
from fnreg.losses.terms import mse
from fnreg.pytree import forward_asked, is_differentiated, is_followed, is_transformed, tree_leaves, tree_map
from fnreg.registration import Course, course
from fnreg.stages import Stage, stages_of
from fnreg.transforms.base import Transform

NAMES = ("transform", "objective", "solver", "optimizer", "levels", "steps", "stop")


def stages_in(given: dict[str, Any]) -> list[Stage]:
    """The stages of a call, with nothing left open."""
    return stages_of(**{name: given[name] for name in NAMES})


def course_of(given: dict[str, Any], stages: Sequence[Stage], **options: Any) -> Course:
    """A call with these stages, which leave nothing open."""
    ready = [dataclasses.replace(stage, objective=list(stage.objective)) for stage in stages]
    closed: dict[str, Any] = {"transform": ready, "objective": mse, "solver": None, "optimizer": None}
    return course(**(given | closed | options))


def asked(tree: Any) -> bool:
    """Whether a derivative by a leaf is taken."""
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    if any(is_differentiated(leaf) for leaf in leaves if torch.is_grad_enabled() or is_transformed(leaf)):
        return True
    return forward_asked() and any(is_transformed(leaf) or unpack_dual(leaf).tangent is not None for leaf in leaves)


def check_unseen(given: dict[str, Any], stages: Sequence[Stage], adjoint: Any) -> None:
    """Tensors within the function of a term are out of sight, and derivatives by them would be lost in silence.

    A function of the user's is asked with images of numbers that nobody differentiates: what then has a derivative, or
    a batch axis, has it from elsewhere.
    """
    for stage in stages:
        for term in (term for objective in stage.objective for term in objective.terms):
            hidden = [value for _, value in term.options if isinstance(value, Tensor)]
            if not getattr(term.function, "__module__", "").startswith("fnreg.") or isinstance(term.function, Feature):
                hidden.append(_asked_alone(given, stage.transform, term))
            if any(is_followed(tensor) for tensor in hidden):
                raise ValueError(
                    f"{term.name} holds a tensor that asks for a gradient or is inside vmap, which "
                    f"{type(adjoint).__name__}() does not see: make it a weight, images or points, such as "
                    "Image(network(fixed)), or detach it, or use Unrolled()"
                )


def _asked_alone(given: dict[str, Any], transform: Transform, term: Term) -> Tensor:
    """The value of a term alone, of one pair of the same shapes."""
    one = Objective((dataclasses.replace(term, weight=torch.ones(())),))
    fixed, moving = (_plain(given[name]) for name in ("fixed", "moving"))
    whole = prepare(fixed, moving, None, levels=1, min_size=1, detach=False, objectives=[one])
    level = whole.level(0, transform, one, 1, given["padding"])
    begun = tree_map(lambda leaf: leaf.unsqueeze(0), transform.init(whole.domain))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        return level.value(begun)[0]


def _plain(given: Any) -> Subject:
    """Of an image, a subject or a pyramid one pair's shapes, on a plain grid, with numbers of their own."""
    known = subject(given[0] if isinstance(given, Sequence) else given)
    size, rank = known.image.grid.size, known.image.grid.ndim + 1

    def like(tensor: Tensor | None, rank: int) -> Any:
        if tensor is None:
            return None
        shape = tensor.shape[tensor.ndim - rank :]
        if not tensor.is_floating_point():
            return torch.ones(shape, dtype=tensor.dtype, device=tensor.device)
        waves = (0.7 * torch.arange(shape.numel(), device=tensor.device)).sin().square()  # vmap refuses random numbers
        return waves.to(tensor.dtype).reshape(shape)

    image = Image(like(known.image.data, rank), Grid(size, device=known.image.data.device))
    points = {name: like(getattr(known, name), 2) for name in ("points", "normals")}
    points["point_weights"] = like(known.point_weights, 1)
    return Subject(image, like(known.mask, rank), labels=like(known.labels, rank), **points)
