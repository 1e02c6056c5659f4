"""Linear mappings as ITK's text files, which ITK, SimpleITK, ANTs, Slicer and elastix read.

Their world is ours: LPS, and from fixed to moving points.
"""

from __future__ import annotations

import torch

from fnreg.io.files import PathLike, write_bytes
from fnreg.transforms.base import Mapping, first_domain


def write_itk(path: PathLike, mapping: Mapping) -> None:
    """Write a linear mapping as an affine transform of ITK, in text, usually `.tfm`; all of the file or nothing.

    T(p) = A (p - c) + c + t with the middle of the domain as centre c; 17 digits, so no bit is lost.  Raises ValueError
    for a batch and for a map that is not linear, WriteError where the file cannot be written.
    """
    matrix = mapping.matrix().detach().cpu()
    dimension = first_domain(mapping.domain).ndim
    if matrix.ndim != 2 or dimension not in (2, 3):
        raise ValueError(
            f"the mapping's matrix has shape {tuple(matrix.shape)}: ITK's text holds one map of 2 or 3 axes"
        )
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("the mapping's matrix is not finite: ITK could not read it")
    center = first_domain(mapping.domain).center.detach().cpu()
    linear, offset = matrix[:-1, :-1], matrix[:-1, -1]
    translation = offset - center + linear @ center
    parameters = [*linear.flatten().tolist(), *translation.tolist()]
    lines = [
        "#Insight Transform File V1.0",
        "#Transform 0",
        f"Transform: AffineTransform_double_{dimension}_{dimension}",
        "Parameters: " + " ".join(repr(value) for value in parameters),
        "FixedParameters: " + " ".join(repr(value) for value in center.tolist()),
    ]
    write_bytes(path, ("\n".join(lines) + "\n").encode("ascii"))
