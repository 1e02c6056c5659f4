"""Images in memory from and to nibabel, MONAI and TorchIO, without a file.

These three count axes (X, Y, Z) and say where voxels are by an affine to RAS; ours are (Z, Y, X) and LPS.  MONAI and
TorchIO need not be installed to read their images: what counts is the affine and the order of axes.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fnreg.image import Image
from fnreg.io.header import RAS, is_plane
from fnreg.io.simpleitk import single
from fnreg.io.stored import affine_grid
from fnreg.io.volume import ras_affine


def from_nibabel(image: Any) -> Image:
    """An Image of nibabel's: the values that it means, at the place of its affine, in mm.

    (X, Y) and (X, Y, Z) become one channel; (X, Y, Z, 1, C) and colours become C, and one slice of them becomes 2-D
    where `read_image` takes it so.  An affine in metres or micrometres, by the header, becomes millimetres.  Raises
    ValueError for a series, for axes that are not at right angles, and for integers that no float holds.
    """
    values = np.asanyarray(image.dataobj)
    plane = values.ndim == 2
    if values.dtype.names:  # colours: five axes, of which the fifth is that of channels
        colours = np.stack([values[name] for name in values.dtype.names], -1)
        values = colours.reshape(*values.shape, *(1,) * (4 - values.ndim), -1)
    if values.ndim > 3 and values.shape[3] > 1:
        raise ValueError(f"the image has shape {values.shape}: a series, take one volume by image.slicer[..., 0]")
    affine = np.diag([_unit(image)] * 3 + [1.0]) @ image.affine
    dimension = 2 if plane or (values.ndim == 5 and values.shape[2] == 1 and is_plane(affine)) else 3
    if values.ndim not in (2, 3, 4, 5) or values.dtype.kind not in "iufb":
        raise ValueError(f"the image has shape {values.shape} of {values.dtype}: expected (X, Y[, Z]) of real numbers")
    values = values.reshape(*values.shape[:dimension], -1).T  # (C, [Z,] Y, X)
    if values.dtype.kind in "iu" and values.size and (most := max(-int(values.min()), int(values.max()))) > 2**53:
        raise ValueError(f"the image holds integers up to {most}, which no float holds")
    native = np.array(values, dtype=values.dtype.newbyteorder("="), order="C")
    if native.dtype.kind == "u" and native.dtype.itemsize > 1:
        native = native.astype(np.int64 if native.dtype.itemsize > 2 else np.int32)
    data = torch.from_numpy(native if native.dtype.itemsize <= 8 else native.astype(np.float64))
    return _from_ras(data, affine, dimension, "the image of nibabel")


def _unit(image: Any) -> float:
    """Of length in mm, where the header has one that is none."""
    told = getattr(image.header, "get_xyzt_units", None)
    return 1.0 if told is None else {"meter": 1e3, "micron": 1e-3}.get(told()[0], 1.0)


def to_nibabel(image: Image) -> Any:
    """nibabel's Nifti1Image of an Image, with both forms; several channels as (X, Y, Z, 1, C).

    Its affine is ours in float64; a file keeps it in float32.  Raises ValueError for a batch.
    """
    import nibabel  # here, for it takes a while

    values = single(image)
    if image.grid.ndim not in (2, 3):
        raise ValueError(f"the image has {image.grid.ndim} axes: NIfTI holds 2 or 3")
    values = values.T  # (X, Y[, Z], C)
    if values.shape[-1] == 1:
        values = values[..., 0]
    else:
        values = values.reshape(*image.grid.size, *([1] * (4 - image.grid.ndim)), values.shape[-1])
    affine = ras_affine(image.grid)
    made: Any = nibabel.Nifti1Image(np.ascontiguousarray(values), affine)
    made.header.set_xyzt_units("mm")
    made.header.set_qform(affine, 1)
    made.header.set_sform(affine, 1)
    return made


def from_monai(tensor: Any) -> Image:
    """An Image of MONAI's MetaTensor (C, X, Y[, Z]), by its `affine`; device and history of gradients stay.

    MONAI's affine is to RAS, unless its `meta` says that its space is LPS.
    """
    data = tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor
    meta: Any = getattr(tensor, "meta", None) or {}
    space = str(getattr(meta.get("space"), "value", meta.get("space") or "RAS")).upper()
    if space not in ("RAS", "LPS"):
        raise ValueError(f"the MetaTensor is in the space {space!r}: expected RAS or LPS")
    if data.ndim not in (3, 4):
        raise ValueError(f"the MetaTensor has shape {tuple(data.shape)}: expected (C, X, Y) or (C, X, Y, Z), no batch")
    return _from_ras(_backward(data), tensor.affine, data.ndim - 1, "the MetaTensor", flip=space == "RAS")


def to_monai(image: Image) -> Any:
    """MONAI's MetaTensor (C, X, Y[, Z]) of an Image, with its affine to RAS.  Raises ImportError without MONAI."""
    made: Any = _package("monai.data", "monai")
    return made.MetaTensor(_one(image), affine=torch.from_numpy(ras_affine(image.grid)), meta={"space": "RAS"})


def from_torchio(image: Any) -> Image:
    """An Image of TorchIO's ScalarImage, whose data are (C, X, Y, Z), by its `affine` to RAS.

    TorchIO's 2-D images have one voxel along Z: the Image is 2-D where they lie as `read_image` wants it of one slice
    with channels, at z = 0 with a thickness of 1.
    """
    data, affine = image.data, np.asarray(image.affine, dtype=np.float64)
    if data.ndim != 4:
        raise ValueError(f"the image has shape {tuple(data.shape)}: expected (C, X, Y, Z)")
    flat = data.shape[-1] == 1 and is_plane(affine)
    return _from_ras(_backward(data[..., 0] if flat else data), affine, 2 if flat else 3, "the image of TorchIO")


def to_torchio(image: Image) -> Any:
    """TorchIO's ScalarImage of an Image: (C, X, Y, Z) with its affine to RAS.  Raises ImportError without TorchIO."""
    made: Any = _package("torchio", "torchio")
    data = _one(image).detach().cpu()
    return made.ScalarImage(tensor=data if data.ndim == 4 else data[..., None], affine=ras_affine(image.grid))


def _backward(data: Tensor) -> Tensor:
    """The spatial axes the other way round: (C, X, Y, Z) and (C, Z, Y, X)."""
    return data.permute(0, *range(data.ndim - 1, 0, -1))


def _one(image: Image) -> Tensor:
    single(image)
    return _backward(image.data)


def _from_ras(data: Tensor, affine: Any, dimension: int, what: str, *, flip: bool = True) -> Image:
    """Data (C, [Z,] Y, X) at the place of an affine (4, 4), or (3, 3) for two axes."""
    found = affine.detach().cpu().numpy() if isinstance(affine, Tensor) else np.asarray(affine)
    if found.shape not in ((4, 4), (dimension + 1, dimension + 1)):
        raise ValueError(f"{what} has an affine of shape {found.shape}: expected (4, 4)")
    if dimension == 2 and len(found) == 4 and np.abs(found[2, :2]).max() > 1e-4 * np.abs(found[:3, :2]).max():
        raise ValueError(
            f"{what} has two axes in a plane of the world that is not that of x and y: give it a third axis"
        )
    world = (RAS if flip else np.eye(4))[:dimension, :dimension] @ found[:dimension].astype(np.float64)
    return Image(data, affine_grid(what, tuple(data.shape[1:]), world[:, :dimension], world[:, -1]).to(data.device))


def _package(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"making an image of {name} needs it: run pip install {name}", name=name) from error
