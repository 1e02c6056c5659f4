"""Images and transforms to and from files.  Every write is atomic; no file can run code."""

from fnreg.io.elastix import read_elastix as read_elastix
from fnreg.io.field import read_displacement as read_displacement
from fnreg.io.field import read_itk as read_itk
from fnreg.io.files import ImageReadError as ImageReadError
from fnreg.io.files import TransformReadError as TransformReadError
from fnreg.io.files import WriteError as WriteError
from fnreg.io.image import read_image as read_image
from fnreg.io.image import write_image as write_image
from fnreg.io.itk import write_itk as write_itk
from fnreg.io.nifti import write_displacement as write_displacement
from fnreg.io.nifti import write_map as write_map
from fnreg.io.transform import read_transform as read_transform
from fnreg.io.transform import write_transform as write_transform

__all__ = [
    "ImageReadError",
    "TransformReadError",
    "WriteError",
    "read_displacement",
    "read_elastix",
    "read_image",
    "read_itk",
    "read_transform",
    "write_displacement",
    "write_image",
    "write_itk",
    "write_map",
    "write_transform",
]
