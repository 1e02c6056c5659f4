"""The terms that the package has: similarities of images, of labels and of points, and penalties."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fnreg.losses import consistency, descriptors, functional, information, local, overlap, penalties, points
from fnreg.losses.features import Feature
from fnreg.losses.objective import Term, term

mse = term(functional.mse, residuals=functional.mse_residuals)
mae = term(functional.mae)
huber = term(functional.huber)
ncc = term(functional.ncc, residuals=functional.ncc_residuals)
lncc = term(local.lncc)

mi = term(information.mi)
nmi = term(information.nmi)
correlation_ratio = term(information.correlation_ratio)

charbonnier = term(functional.charbonnier)
ngf = term(descriptors.ngf)
mind = term(descriptors.mind)


SIMILARITIES: dict[str, Term] = {
    made.name: made for made in (mse, mae, huber, ncc, lncc, charbonnier, mi, nmi, correlation_ratio, ngf, mind)
}

dice = term(overlap.dice)
tversky = term(overlap.tversky)
cross_entropy = term(overlap.cross_entropy)
landmarks = term(points.landmarks)
closest_points = term(points.closest_points)
chamfer = term(points.chamfer)

bending = term(penalties.bending)
diffusion = term(penalties.diffusion)
curvature = term(penalties.curvature)
elasticity = term(penalties.elasticity)
divergence = term(penalties.divergence)
total_variation = term(penalties.total_variation)
folding = term(penalties.folding)
log_jacobian = term(penalties.log_jacobian)
inverse_consistency = term(consistency.inverse_consistency)  # of the map itself, not of a field

PENALTIES: dict[str, Term] = {
    made.name: made
    for made in (
        bending,
        diffusion,
        curvature,
        elasticity,
        divergence,
        total_variation,
        folding,
        log_jacobian,
        inverse_consistency,
    )
}


def feature(function: Callable[[Tensor], Tensor]) -> Term:
    """A similarity of features, mean |f(warped) - f(fixed)|^2, in [0, inf).

    function : f, from an image (C, [Z,] Y, X) to a tensor, pure, so that torch.func can map and differentiate it; for a
        network a call of `torch.func.functional_call` with detached parameters, in evaluation mode

    Weights count where features have the images' axes, (F, [Z,] Y, X) of any size: they are resized to it.  What is
    hidden by them may still reach features nearby, as far as f looks.  f(fixed) is computed anew in every step.
    Raises TypeError for what cannot be called, ValueError where both features differ in shape.

    >>> import torch, fnreg
    >>> from torch.func import functional_call
    >>> network = torch.nn.Conv2d(1, 8, kernel_size=5)
    >>> params = {name: value.detach() for name, value in network.named_parameters()}
    >>> term = fnreg.feature(lambda image: functional_call(network, params, image))
    >>> image = torch.rand(1, 16, 16)
    >>> float(term.value({"warped": image, "fixed": image, "weights": None}))
    0.0
    """
    if not callable(function):
        raise TypeError(f"feature takes a function of an image, not {type(function).__name__}")
    return term(Feature(function))
