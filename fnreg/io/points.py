"""Points and their names from and to files, in the world: CSV, and Slicer's .fcsv and .mrk.json.

A file of numbers alone does not say which world they are of: RAS and LPS differ in the signs of x and y.  So it must
be stated, by the file or by whoever reads it; points are never guessed.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fnreg.grid import Grid
from fnreg.io.files import PathLike, PointReadError, SpaceNeededError, WriteError, read_bytes, write_bytes
from fnreg.io.markups import READERS, SPACES, WRITERS, Refused

Space = Literal["LPS", "RAS", "voxel"]
SUFFIXES = tuple(READERS)


class Landmarks(NamedTuple):
    """Points of one image.

    points : (N, D) float64, world, LPS, in the order of the file; names : one for each, or none at all
    """

    points: Tensor
    names: tuple[str, ...] = ()


def read_points(path: PathLike, *, space: Space | None = None, grid: Grid | None = None) -> Landmarks:
    """Read points as world points (N, D), LPS.

    path : .csv with columns named x, y and, for three axes, z, and name, label or id where there are names; a line
        `# space = LPS` may lead.  Or Slicer's .fcsv and .mrk.json, which say their space themselves
    space : "LPS" or "RAS", in millimetres, or "voxel", indices of `grid` from 0; needed where a CSV does not say it

    Raises PointReadError where the file is missing, damaged, holds no points or points that are not finite, does not
    say its space, or says another one; ValueError for a space without its grid.

    >>> import tempfile, torch
    >>> from fnreg.io import Landmarks, read_points, write_points
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_points(f"{folder}/a.csv", Landmarks(torch.tensor([[1.0, -2.0, 3.0]]), ("nose",)), space="RAS")
    ...     read_points(f"{folder}/a.csv")
    Landmarks(points=tensor([[ 1., -2.,  3.]], dtype=torch.float64), names=('nose',))
    """
    if space is not None and space not in SPACES.values():
        raise ValueError(f"unknown space {space!r}: choose LPS, RAS or voxel")
    if (space == "voxel") != (grid is not None):
        raise ValueError('indices of voxels need their grid, and only they: space="voxel", grid=image.grid')
    kind = _kind(path)
    data = read_bytes(path, PointReadError)
    try:
        stated, names, numbers = READERS[kind](data.decode("utf-8-sig"))
    except UnicodeDecodeError as problem:
        raise PointReadError(f"{path} is not text: expected points as {', '.join(SUFFIXES)}") from problem
    except Refused as problem:
        raise PointReadError(f"{path} {problem}") from None
    except (csv.Error, ValueError, OverflowError, RecursionError) as problem:  # of what is no CSV, JSON or number
        raise PointReadError(f"{path} is damaged: {' '.join(str(problem).split())}") from problem
    if stated is not None and space is not None and stated != space:
        raise PointReadError(f"{path} says that its points are {stated}, but space is {space!r}: leave it out")
    where = stated or space
    if where is None:
        raise SpaceNeededError(
            f"{path} does not say the space of its points", 'give space="LPS", "RAS", or "voxel" with grid='
        )
    values = np.array(numbers, dtype=np.float64)
    if not values.size:
        raise PointReadError(f"{path} holds no points")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).any(1).argmax())
        raise PointReadError(f"{path} has a point that is not finite, number {bad + 1}: {values[bad].tolist()}")
    return Landmarks(_to_world(path, torch.from_numpy(values), where, grid), names if any(names) else ())


def write_points(path: PathLike, landmarks: Landmarks, *, space: Literal["LPS", "RAS"] = "LPS") -> None:
    """Write world points with their names, in full precision; all of the file or nothing.

    path : .csv, or for three axes Slicer's .fcsv or .mrk.json
    space : in which they are written; the file says it

    Raises TypeError for what is no `Landmarks`, ValueError for shapes and values that do not fit, WriteError.
    """
    if not isinstance(landmarks, Landmarks):
        raise TypeError(f"expected Landmarks, got {type(landmarks).__name__}: wrap points in Landmarks(points, names)")
    if space not in ("LPS", "RAS"):
        raise ValueError(f"unknown space {space!r}: choose LPS or RAS")
    if not str(path).lower().endswith(SUFFIXES):
        raise WriteError(f"{path}: points are written as {', '.join(SUFFIXES)}")
    kind = _kind(path)
    points = landmarks.points.detach().cpu().to(torch.float64)
    if points.ndim != 2 or points.shape[1] not in (2, 3) or (kind != ".csv" and points.shape[1] != 3):
        raise ValueError(f"points have shape {tuple(points.shape)}: expected (N, 3), or for CSV also (N, 2)")
    if not bool(torch.isfinite(points).all()):
        raise ValueError("points are not finite: a file of points says where they are")
    names = landmarks.names or ("",) * len(points)
    if len(names) != len(points):
        raise ValueError(f"there are {len(names)} names for {len(points)} points: give one for each, or none")
    if any(ord(letter) < 32 for name in names for letter in name):
        raise ValueError("a name has a line break or another control character: a name is one line")
    rows = (_flip(points) if space == "RAS" else points).tolist()
    write_bytes(path, WRITERS[kind](rows, names, space).encode())


def _kind(path: PathLike) -> str:
    name = Path(path).name.lower()
    kind = next((end for end in SUFFIXES if name.endswith(end)), None)
    if kind is None:
        raise PointReadError(f"{path}: points are read from {', '.join(SUFFIXES)}")
    return kind


def _flip(points: Tensor) -> Tensor:
    """From LPS to RAS, and back."""
    return points * points.new_tensor([-1.0, -1.0, 1.0])[: points.shape[-1]] + 0.0  # no negative zeros


def _to_world(path: PathLike, points: Tensor, space: str, grid: Grid | None) -> Tensor:
    if space == "voxel":
        if grid is None:
            raise SpaceNeededError(f"{path} holds indices of voxels", 'give space="voxel" and grid= of their image')
        if grid.ndim != points.shape[1]:
            raise PointReadError(f"{path} has points of {points.shape[1]} axes, but the grid has {grid.ndim}")
        return grid.to("cpu").index_to_world(points)
    return _flip(points) if space == "RAS" else points
