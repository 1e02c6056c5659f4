"""Images, points and transforms to and from files.  Every write is atomic; no file can run code."""

from fnreg.io.elastix import read_elastix as read_elastix
from fnreg.io.field import read_displacement as read_displacement
from fnreg.io.field import read_itk as read_itk
from fnreg.io.files import ImageReadError as ImageReadError
from fnreg.io.files import PointReadError as PointReadError
from fnreg.io.files import TransformReadError as TransformReadError
from fnreg.io.files import WriteError as WriteError
from fnreg.io.image import read_image as read_image
from fnreg.io.image import read_labels as read_labels
from fnreg.io.image import read_series as read_series
from fnreg.io.image import write_image as write_image
from fnreg.io.image import write_labels as write_labels
from fnreg.io.interchange import from_monai as from_monai
from fnreg.io.interchange import from_nibabel as from_nibabel
from fnreg.io.interchange import from_torchio as from_torchio
from fnreg.io.interchange import to_monai as to_monai
from fnreg.io.interchange import to_nibabel as to_nibabel
from fnreg.io.interchange import to_torchio as to_torchio
from fnreg.io.itk import write_itk as write_itk
from fnreg.io.nifti import write_displacement as write_displacement
from fnreg.io.nifti import write_map as write_map
from fnreg.io.points import Landmarks as Landmarks
from fnreg.io.points import read_points as read_points
from fnreg.io.points import write_points as write_points
from fnreg.io.simpleitk import from_sitk as from_sitk
from fnreg.io.simpleitk import to_sitk as to_sitk
from fnreg.io.stored import GeometryWarning as GeometryWarning
from fnreg.io.stored import Labels as Labels
from fnreg.io.transform import read_transform as read_transform
from fnreg.io.transform import write_transform as write_transform

__all__ = [
    "GeometryWarning",
    "ImageReadError",
    "Labels",
    "Landmarks",
    "PointReadError",
    "TransformReadError",
    "WriteError",
    "from_monai",
    "from_nibabel",
    "from_sitk",
    "from_torchio",
    "read_displacement",
    "read_elastix",
    "read_image",
    "read_itk",
    "read_labels",
    "read_points",
    "read_series",
    "read_transform",
    "to_monai",
    "to_nibabel",
    "to_sitk",
    "to_torchio",
    "write_displacement",
    "write_image",
    "write_itk",
    "write_labels",
    "write_map",
    "write_points",
    "write_transform",
]
