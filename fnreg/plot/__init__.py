"""Figures of images, maps and registrations, with matplotlib of the extra `plot`.

Every function returns a matplotlib `Figure` of its own, tied to no window: `figure.savefig("overview.png")`, or let a
notebook show it.  Axes are in world coordinates, x to the right and y down, as pictures are shown; z points up.

What shows images takes 2-D and 3-D ones.  Of a 3-D image it shows the three planes x y, x z and y z of the world
through the point `at`, by default the middle of the fixed image.  With `unit="mm"` these are taken for planes of a
patient in LPS, seen as radiologists do: from the feet, the front and the left, the patient's right on the left and the
head above; letters at the edges say so.
"""

from __future__ import annotations

from fnreg.plot.course import losses, search
from fnreg.plot.ellipses import ellipses
from fnreg.plot.images import pyramid, slices
from fnreg.plot.labels import labels
from fnreg.plot.maps import flow, jacobian, quiver, warped_grid
from fnreg.plot.pairs import batch, checkerboard, difference, overlay, overview
from fnreg.plot.trade import trade_off

__all__ = [
    "overview",
    "checkerboard",
    "overlay",
    "difference",
    "batch",
    "labels",
    "slices",
    "pyramid",
    "warped_grid",
    "quiver",
    "flow",
    "jacobian",
    "ellipses",
    "losses",
    "search",
    "trade_off",
]
