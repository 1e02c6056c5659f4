"""A head slice onto one of another contrast: mutual information inside the mask, beside elastix' own result.

The pair and the registered image are those that elastix ships (rigid, then a B-spline).  Rigid by mutual information of
the whole images, then a dense transform by mutual information inside the mask of the fixed image, after which the rigid
map acts.  Every image, elastix' too, is judged by the same `mi` inside that mask, with three numbers of bins, of which
the registration saw one.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from benchmarks.images import folder
from benchmarks.measure import Options, Table, peer
from fnreg import SVFFD, Diffeomorphism, Image, Rigid, Subject, adam, bending, fields, mi, register

BINS = (16, 32, 64)
LEVELS = 4
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SVFFD(stride=8) + 0.01 bending": (SVFFD(stride=8), {"objective": mi + 0.01 * bending}),
    "Diffeomorphism": (Diffeomorphism(), {"objective": mi, "optimizer": adam(0.5)}),
}


def slice_of(name: str) -> Image:
    """An image of the set, pixels of 1 mm."""
    itk = peer("SimpleITK")
    image = itk.ReadImage(str(folder("ct_head2d") / f"{name}.mha"))
    values = itk.GetArrayFromImage(image).astype(np.float32)
    return Image.from_array(values, spacing=image.GetSpacing(), origin=image.GetOrigin())


def information(fixed: Subject, image: Image) -> list[float]:
    """Mutual information in nats with the fixed image inside its mask, by numbers of bins."""
    seen = {"warped": image.data, "fixed": fixed.image.data, "weights": fixed.mask}
    return [-float(mi(bins=bins).value(seen)) for bins in BINS]


def run(options: Options) -> list[Table]:
    """One table: nothing, elastix, rigid and the dense transforms."""
    fixed, moving = slice_of("CT_2D_head_fixed"), slice_of("CT_2D_head_moving")
    known = Subject(fixed, slice_of("CT_2D_head_fixed_mask").data)
    columns = ("method", *(f"MI, {bins} bins" for bins in BINS), "folds", "J least", "J most", "seconds")
    table = Table("Mutual information inside the mask", columns)
    table.rows.append(("none", *information(known, moving), *(None,) * 4))
    peers = slice_of("peer_elastix_result_rigid_bspline")
    table.rows.append(("elastix, rigid and B-spline", *information(known, peers), *(None,) * 4))
    begin = time.perf_counter()
    rigid = register(fixed, moving, Rigid(), objective=mi, levels=LEVELS)
    taken = time.perf_counter() - begin
    table.rows.append(("fnreg Rigid", *information(known, rigid.warp(moving)), *(None,) * 3, taken))
    for name, (transform, given) in list(METHODS.items())[: 1 if options.quick else None]:
        begin = time.perf_counter()
        result = register(known, moving, transform, then=rigid.mapping, levels=LEVELS, **given)
        taken = time.perf_counter() - begin
        jacobian = result.jacobian().data[known.mask > 0] if known.mask is not None else result.jacobian().data
        folds = int(fields.folds(result.mapping.displacement(fixed.grid), fixed.grid))
        told = (folds, float(jacobian.min()), float(jacobian.max()), taken)
        table.rows.append((f"fnreg {name}", *information(known, result.warp(moving)), *told))
    table.notes = (f"{torch.get_num_threads()} threads, one run; nats; J inside the mask, folds anywhere",)
    return [table]
