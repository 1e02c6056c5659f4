"""Optimizers as frozen specs: pure functions of (gradient, state), batched along the leading axis.

A spec's `init(step)` gives a state and `update(gradient, state, progress)` the change of the step and the next
state.  The gradient has a leading batch axis; `progress` in [0, 1), one number or (B,), is how far the level has run.
`adam`, `sgd` and the like are torchopt's; `pure=True` takes fnreg's own few lines of the same formulas, which also work
under an outer `vmap` or `grad`.  Any torchopt `GradientTransformation` is an optimizer as well.

Learning rates are in voxels of the level; a tensor (B,) is one rate per pair.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fnreg import native
from fnreg.lengths import mean_square, rows
from fnreg.pytree import (
    beside,
    is_concrete,
    is_tracked,
    tree_flatten,
    tree_leaves,
    tree_scale,
    tree_unflatten,
)

Rate = float | Tensor


class Optimizer(Protocol):
    """What a solver asks of an optimizer."""

    def init(self, step: Any) -> Any:
        """The state at the start; `step` has the leading batch axis."""
        ...

    def update(self, gradient: Any, state: Any, progress: Rate) -> tuple[Any, Any]:
        """The change of the step, and the next state."""
        ...


class _State(NamedTuple):
    inner: Any
    rate: Rate = 1.0  # (B,) where pairs have their own: it is dropped with a pair that is done
    method: Any = None  # torchopt's; some of them remember that they have been called, so every run makes its own


def take(optimizer: Any, index: Tensor) -> Any:
    """The optimizer of some of the pairs: of rates per pair theirs."""
    if isinstance(optimizer, Chain):
        return Chain(tuple(take(part, index) for part in optimizer.parts))
    rate = getattr(optimizer, "lr", None)
    return dataclasses.replace(optimizer, lr=rate[index]) if isinstance(rate, Tensor) and rate.ndim else optimizer


def rates(optimizer: Any) -> list[Tensor]:
    """The tensors among an optimizer's options."""
    if isinstance(optimizer, Chain):
        return [rate for part in optimizer.parts for rate in rates(part)]
    options = [getattr(optimizer, "lr", None), *(value for _, value in getattr(optimizer, "options", ()))]
    return [value for value in options if isinstance(value, Tensor)]


def purely(optimizer: Any) -> Any:
    """The same by fnreg's own lines, where there are some."""
    if isinstance(optimizer, Chain):
        return Chain(tuple(purely(part) for part in optimizer.parts))
    return dataclasses.replace(optimizer, pure=True) if isinstance(optimizer, (Adam, SGD)) else optimizer


def is_pure(optimizer: Any) -> bool:
    """Whether its updates are fnreg's own lines, through which the transforms of torch.func go."""
    if isinstance(optimizer, Chain):
        return all(is_pure(part) for part in optimizer.parts)
    return isinstance(optimizer, (Normalized, Clip)) or bool(getattr(optimizer, "pure", False))


def counts_each(state: Any) -> bool:
    """Whether a state is of each pair alone: torchopt's has one count of steps for all of them."""
    if isinstance(state, _State):
        return state.method is None
    return isinstance(state, tuple) and all(counts_each(part) for part in state)


def _rates(rate: Rate, step: list[Tensor]) -> Rate:
    if isinstance(rate, Tensor) and rate.ndim and tuple(rate.shape) != tuple(step[0].shape[:1]):
        pairs = step[0].shape[0]
        raise ValueError(f"lr has shape {tuple(rate.shape)} for {pairs} pairs: give one rate, or one per pair")
    return rate


def _check_fit(spec: Optimizer, step: list[Tensor], state: list[Tensor]) -> None:
    """A state that was made for another step would be broadcast, or read beyond its end: refuse it."""
    for a, b in zip(step, state, strict=True):
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            raise ValueError(
                f"the state of {type(spec).__name__} does not fit a step of shape {tuple(a.shape)}: "
                "it was made for other parameters"
            )


def _serves(step: list[Tensor]) -> bool:
    return native.serves(*step, voxels=1)


def _torchopt(factory: str, **options: Any) -> Any:
    import torchopt

    return getattr(torchopt, factory)(**options)


@dataclasses.dataclass(frozen=True)
class Adam(Optimizer):
    """Adam with bias correction.  Kingma and Ba 2015, arXiv 1412.6980.

        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
        step = -lr m / (1 - b1^k) / (sqrt(v / (1 - b2^k)) + eps + relative rms)

    lr : voxels; a tensor (B,) for one rate per pair
    decay : the rate falls exponentially to `decay * lr` over the level
    eps : 1e-12, so small that the scale of the images does not matter
    relative : of rms, the root of the mean of v / (1 - b2^k) over all entries of a leaf of the pair; at 0 every entry
        moves by about the rate, however small its gradient, and the larger it is the more the gradients' sizes count:
        for fields, which would else be rough where images tell nothing
    pure : fnreg's own lines instead of torchopt's; its one pass in C serves in either case
    """

    lr: Rate = 0.3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-12
    decay: float = 0.1
    relative: float = 0.0
    pure: bool = False

    def __post_init__(self) -> None:
        _positive("lr", self.lr)
        known = 0 <= self.b1 < 1 and 0 <= self.b2 < 1 and 0 < self.decay <= 1
        if not (known and self.eps >= 0 and 0 <= self.relative < math.inf):
            raise ValueError(
                f"{self!r}: expected b1 and b2 in [0, 1), decay in (0, 1], eps >= 0 and a finite relative >= 0"
            )

    def init(self, step: Any) -> Any:
        leaves, _ = tree_flatten(step)
        rate = _rates(self.lr, leaves)
        if not (self.pure or self.relative or _serves(leaves)):
            method = _torchopt("adam", lr=1.0, betas=(self.b1, self.b2), eps=self.eps)
            return _State(method.init(leaves), rate, method)
        zero = [torch.zeros_like(leaf) for leaf in leaves]
        count = torch.zeros(leaves[0].shape[0], dtype=torch.float64, device=leaves[0].device)
        return _State((zero, zero, count, [torch.zeros_like(count) for _ in leaves]), rate)

    def update(self, gradient: Any, state: Any, progress: Rate) -> tuple[Any, Any]:
        leaves, spec = tree_flatten(gradient)
        rate = state.rate * self.decay**progress
        if state.method is not None:
            steps, inner = state.method.update(leaves, state.inner, inplace=False)
            return tree_scale(tree_unflatten(steps, spec), rate), state._replace(inner=inner)
        _check_fit(self, leaves, state.inner[0])
        m, v, count, mean = state.inner
        count = count + 1
        first, second = rate / (1 - self.b1**count), 1 / (1 - self.b2**count)  # (B,)
        if self.relative:  # the mean of v follows from that of the squared gradient
            mean = [self.b2 * a + (1 - self.b2) * mean_square(g) for a, g in zip(mean, leaves, strict=True)]
        change = self._in_one_pass if not is_tracked(leaves, state) and _serves(leaves) else self._plain
        changed: list[tuple[Tensor, Tensor, Tensor]] = []
        least = torch.full_like(count, self.eps)
        for g, m_before, v_before, of_v in zip(leaves, m, v, mean, strict=True):
            if self.relative:  # 1e-30 under a root keeps its derivative finite where a gradient has always been zero
                least = self.eps + self.relative * (second * of_v + 1e-30).sqrt()
            changed.append(change(g, m_before, v_before, first, second, least))
        m, v, steps = (list(part) for part in zip(*changed, strict=True))
        return tree_unflatten(steps, spec), state._replace(inner=(m, v, count, mean))

    def _plain(
        self, g: Tensor, m: Tensor, v: Tensor, first: Tensor, second: Tensor, least: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        m = self.b1 * m + (1 - self.b1) * g
        v = self.b2 * v + (1 - self.b2) * g * g
        first, second, least = (beside(factor.to(g.dtype), g) for factor in (first, second, least))
        return m, v, -first * m / ((second * v + 1e-30).sqrt() + least)

    def _in_one_pass(
        self, g: Tensor, m: Tensor, v: Tensor, first: Tensor, second: Tensor, least: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same in C, where torch makes a dozen passes."""
        g, m, v = g.contiguous(), m.contiguous(), v.contiguous()
        after = torch.empty_like(g), torch.empty_like(g), torch.empty_like(g)
        options = (first.to(torch.float64), second, least, self.b1, self.b2, g[0].numel())
        native.call("_adam", g.dtype, None, (g, m, v, *after, *options), g.numel())
        return after


@dataclasses.dataclass(frozen=True)
class SGD(Optimizer):
    """Gradient descent with optional momentum: v <- momentum v + g, step = -lr v; the rate decays as in `Adam`.

    The step scales with the gradient, so the rate depends on the images' intensities.
    """

    lr: Rate = 1.0
    momentum: float = 0.0
    decay: float = 1.0
    pure: bool = False

    def __post_init__(self) -> None:
        _positive("lr", self.lr)
        if not (0 <= self.momentum < 1 and 0 < self.decay <= 1):
            raise ValueError(f"{self!r}: expected momentum in [0, 1) and decay in (0, 1]")

    def init(self, step: Any) -> Any:
        leaves, _ = tree_flatten(step)
        rate = _rates(self.lr, leaves)
        if not self.pure:
            method = _torchopt("sgd", lr=1.0, momentum=self.momentum)
            return _State(method.init(leaves), rate, method)
        return _State([torch.zeros_like(leaf) for leaf in leaves], rate)

    def update(self, gradient: Any, state: Any, progress: Rate) -> tuple[Any, Any]:
        leaves, spec = tree_flatten(gradient)
        if self.pure:
            inner = [self.momentum * v + g for v, g in zip(state.inner, leaves, strict=True)]
            steps = [-v for v in inner]
        else:
            steps, inner = state.method.update(leaves, state.inner, inplace=False)
        return tree_scale(tree_unflatten(steps, spec), state.rate * self.decay**progress), state._replace(inner=inner)


@dataclasses.dataclass(frozen=True)
class Normalized(Optimizer):
    """Steepest descent by steps of one length: v <- momentum v + g, step = -lr v / max |v_i|, where i goes over voxels.

    The longest vector of a pair moves by `lr`, all others in proportion: where the gradient is rounding, as in flat
    areas, next to nothing moves, while `Adam` makes steps of full size there.  So it suits `Diffeomorphism` on images
    with large flat areas, such as shapes and masks; on images with texture everywhere `Adam` gets further.  The scale
    of the images does not matter.  The updates of ANTs' and greedy's registrations are scaled so; Avants et al. 2008,
    doi 10.1016/j.media.2007.06.004.

    A leaf with spatial axes, (B, D, [Z,] Y, X), has a vector of its first axis at each voxel; of any other leaf (B, P)
    each number is a vector of its own.  The longest is that over all leaves of the pair.

    lr : voxels; a tensor (B,) for one rate per pair
    momentum : in [0, 1); 0.9 keeps about ten steps in mind
    decay : the rate falls exponentially to `decay * lr` over the level.  1, not at all, as a `Diffeomorphism` is
        smoothed by the same amount after each step, so that ever shorter steps would let it relax
    """

    lr: Rate = 0.5
    momentum: float = 0.0
    decay: float = 1.0

    def __post_init__(self) -> None:
        _positive("lr", self.lr)
        if not (0 <= self.momentum < 1 and 0 < self.decay <= 1):
            raise ValueError(f"{self!r}: expected momentum in [0, 1) and decay in (0, 1]")

    def init(self, step: Any) -> Any:
        leaves, _ = tree_flatten(step)
        return _State([torch.zeros_like(leaf) for leaf in leaves], _rates(self.lr, leaves))

    def update(self, gradient: Any, state: Any, progress: Rate) -> tuple[Any, Any]:
        leaves, spec = tree_flatten(gradient)
        _check_fit(self, leaves, state.inner)
        inner = [self.momentum * v + g for v, g in zip(state.inner, leaves, strict=True)]
        # Largest entries first: squares of what is tiny would be 0, and of what is huge infinite.
        size = torch.stack([rows(v.abs()).amax(1) for v in inner]).amax(0)  # (B,)
        units = [v / beside(torch.where(size == 0, 1, size), v) for v in inner]
        squares = [v.square().sum(1) if v.ndim > 2 else v.square() for v in units]
        longest = torch.stack([rows(square).amax(1) for square in squares]).amax(0)
        # A pair without any gradient stays where it is; NaN comes through.
        longest = torch.where(longest == 0, 1, longest).sqrt()
        steps = [-v / beside(longest, v) for v in units]
        return tree_scale(tree_unflatten(steps, spec), state.rate * self.decay**progress), state._replace(inner=inner)


@dataclasses.dataclass(frozen=True)
class Torchopt(Optimizer):
    """Any torchopt optimizer by name with its options: `Torchopt("rmsprop", (("lr", 0.1),))`.

    The optimizers of torchopt that take `params` (weight decay) are refused by it: a step has none.
    """

    factory: str
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        import torchopt

        if not callable(getattr(torchopt, self.factory, None)):
            raise ValueError(f"torchopt has no optimizer {self.factory!r}: try adam, sgd, rmsprop, adagrad or radam")

    def init(self, step: Any) -> Any:
        method = _torchopt(self.factory, **dict(self.options))
        return _State(method.init(tree_flatten(step)[0]), method=method)

    def update(self, gradient: Any, state: Any, progress: Rate) -> tuple[Any, Any]:
        leaves, spec = tree_flatten(gradient)
        steps, inner = state.method.update(leaves, state.inner, inplace=False)
        return tree_unflatten(steps, spec), state._replace(inner=inner)


@dataclasses.dataclass(frozen=True)
class _Given(Optimizer):
    """A torchopt GradientTransformation as it was given."""

    inner: Any

    def init(self, step: Any) -> Any:
        return _State(self.inner.init(tree_flatten(step)[0]), method=self.inner)

    def update(self, gradient: Any, state: Any, progress: Rate) -> tuple[Any, Any]:
        leaves, spec = tree_flatten(gradient)
        steps, inner = self.inner.update(leaves, state.inner, inplace=False)
        return tree_unflatten(steps, spec), state._replace(inner=inner)


@dataclasses.dataclass(frozen=True)
class Clip(Optimizer):
    """Shrink each pair's gradient to at most `norm`: g min(1, norm / |g|), over all leaves of the pair jointly."""

    norm: float

    def __post_init__(self) -> None:
        _positive("norm", self.norm)

    def init(self, step: Any) -> Any:
        return ()

    def update(self, gradient: Any, state: Any, progress: Rate) -> tuple[Any, Any]:
        each = (rows(leaf.square()).sum(1) for leaf in tree_leaves(gradient))
        squares = functools.reduce(torch.add, each)
        # The root of no gradient at all has no derivative: it is not taken.
        size = squares.clamp(min=self.norm**2).sqrt()
        return tree_scale(gradient, torch.where(squares > self.norm**2, self.norm / size, 1.0)), state


@dataclasses.dataclass(frozen=True)
class Chain(Optimizer):
    """Optimizers one after another: each sees what the one before made of the gradient."""

    parts: tuple[Any, ...]

    def init(self, step: Any) -> Any:
        return tuple(part.init(step) for part in self.parts)

    def update(self, gradient: Any, state: Any, progress: Rate) -> tuple[Any, Any]:
        states: list[Any] = []
        for part, inner in zip(self.parts, state, strict=True):
            gradient, inner = part.update(gradient, inner, progress)
            states.append(inner)
        return gradient, tuple(states)


adam = Adam
sgd = SGD
normalized = Normalized
clip = Clip


def chain(*parts: Any) -> Chain:
    """`chain(clip(1.0), adam(0.3))`: optimizers one after another."""
    return Chain(tuple(_part(part) for part in parts))


def as_optimizer(value: Any) -> Optimizer:
    """An optimizer of this module, a torchopt GradientTransformation, or anything with the methods of `Optimizer`."""
    made = _part(value)
    if not _descends(made):
        raise ValueError(f"{made} only passes the gradient on, and a step along it climbs: chain(clip(1.0), adam(0.3))")
    return made


def _part(value: Any) -> Any:
    if isinstance(value, type) or not (hasattr(value, "init") and hasattr(value, "update")):
        name = value.__name__ if isinstance(value, type) else type(value).__name__
        raise TypeError(f"optimizer is {name}: expected one of fnreg.optim, such as adam(0.3), or a torchopt one")
    given = type(value).__module__.partition(".")[0] == "torchopt"
    return _Given(value) if given else value


def _descends(part: Any) -> bool:
    return any(_descends(p) for p in part.parts) if isinstance(part, Chain) else not isinstance(part, Clip)


def _positive(name: str, value: Rate) -> None:
    fits: Any = (value > 0) & (value < math.inf)
    if not (bool(fits) if not isinstance(fits, Tensor) else not is_concrete(fits) or bool(fits.all())):
        raise ValueError(f"{name} is {value}: it must be positive and finite")
