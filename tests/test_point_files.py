"""Points from and to files: the same points in whatever world they were written, and none that is guessed."""

import json
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import fnreg
from fnreg.io import Landmarks, PointReadError, WriteError, read_points, write_points

POINTS = torch.tensor([[1.5, -2.0, 3.25], [1e-7, 1e6, -0.1], [0.0, 0.0, 0.0]], dtype=torch.float64)
NAMES = ("nose", 'a "quoted", name', "# ü")


@pytest.mark.parametrize("space", ["LPS", "RAS"])
@pytest.mark.parametrize("name", ["p.csv", "p.fcsv", "p.mrk.json", "P.CSV"])
def test_points_come_back_to_the_last_bit(tmp_path: Path, name: str, space: Any) -> None:
    write_points(tmp_path / name, Landmarks(POINTS, NAMES), space=space)
    found = read_points(tmp_path / name)
    assert torch.equal(found.points, POINTS) and found.names == NAMES
    assert torch.equal(read_points(tmp_path / name, space=space).points, POINTS)
    other = "RAS" if space == "LPS" else "LPS"
    with pytest.raises(PointReadError, match=f"says that its points are {space}, but space is '{other}'"):
        read_points(tmp_path / name, space=other)


finite = st.floats(allow_nan=False, allow_infinity=False)
letters = st.text(st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="\r\n"), max_size=8)


@pytest.mark.parametrize("name", ["p.csv", "p.fcsv", "p.mrk.json"])
@hypothesis.given(rows=st.lists(st.tuples(finite, finite, finite, letters), min_size=1, max_size=5), ras=st.booleans())
def test_any_points_and_names_come_back(
    tmp_path_factory: pytest.TempPathFactory, name: str, rows: list[tuple[float, float, float, str]], ras: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    points = torch.tensor([row[:3] for row in rows], dtype=torch.float64)
    names = tuple(row[3] for row in rows)
    write_points(path, Landmarks(points, names), space="RAS" if ras else "LPS")
    found = read_points(path)
    assert torch.equal(found.points, points)
    assert found.names == (names if any(names) else ())


def test_points_of_two_axes_and_of_none(tmp_path: Path) -> None:
    write_points(tmp_path / "p.csv", Landmarks(POINTS[:, :2]), space="RAS")
    found = read_points(tmp_path / "p.csv")
    assert torch.equal(found.points, POINTS[:, :2]) and found.names == ()
    write_points(tmp_path / "none.csv", Landmarks(POINTS[:0]))
    with pytest.raises(PointReadError, match="holds no points"):
        read_points(tmp_path / "none.csv")


def test_what_slicer_wrote(tmp_path: Path) -> None:
    """As Slicer 4.6, 4.13 and 5 write the point 1, 2, 3 in RAS."""
    row = "vtkMRMLMarkupsFiducialNode_0,1,2,3,0,0,0,1,1,1,0,F-1,,vtkMRMLScalarVolumeNode1\n"
    columns = "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n"
    for told in ("0", "RAS"):
        (tmp_path / "a.fcsv").write_text(
            f"# Markups fiducial file version = 4.6\n# CoordinateSystem = {told}\n{columns}{row}"
        )
        found = read_points(tmp_path / "a.fcsv")
        assert found.points.tolist() == [[-1, -2, 3]] and found.names == ("F-1",)
    for told in ("1", "LPS"):
        (tmp_path / "a.fcsv").write_text(f"# CoordinateSystem = {told}\n{columns}{row}")
        assert read_points(tmp_path / "a.fcsv").points.tolist() == [[1, 2, 3]]
    control = {"id": "1", "label": "F-1", "description": "", "associatedNodeID": "", "position": [1.0, 2.0, 3.0],
               "orientation": [-1, 0, 0, 0, -1, 0, 0, 0, 1], "selected": True, "positionStatus": "defined"}  # fmt: skip
    markups = {"type": "Fiducial", "coordinateSystem": "RAS", "coordinateUnits": "mm", "controlPoints": [control]}
    (tmp_path / "a.mrk.json").write_text(json.dumps({"@schema": "...", "markups": [markups]}))
    assert read_points(tmp_path / "a.mrk.json").points.tolist() == [[-1, -2, 3]]


def test_csv_of_others(tmp_path: Path) -> None:
    """The columns of ANTs, LPS, with marks that spreadsheets leave."""
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfx,y,z,t,label,comment\r\n1,2,3,0,5,none\r\n\r\n4, 5 ,6e1,0,6,\r\n")
    found = read_points(tmp_path / "a.csv", space="LPS")
    assert found.points.tolist() == [[1, 2, 3], [4, 5, 60]] and found.names == ("5", "6")


def test_indices_of_voxels(tmp_path: Path, data_dir: Path) -> None:
    path = data_dir / "histology" / "Izd2-29-041-w35_HE.csv"
    picture = fnreg.io.read_image(path.with_suffix(".jpg"))
    found = read_points(path, space="voxel", grid=picture.grid)
    theirs = np.loadtxt(path, delimiter=",", skiprows=1)[:, 1:]
    np.testing.assert_array_equal(found.points, theirs)  # spacing 1, origin 0
    grid = fnreg.Grid((5, 4), spacing=(2.0, 3.0), origin=(10.0, 20.0))
    (tmp_path / "a.csv").write_text("# space = voxel\nX,Y\n1,2\n")
    assert read_points(tmp_path / "a.csv", space="voxel", grid=grid).points.tolist() == [[12, 26]]


BAD = {
    "missing": ("a.csv", None, "does not exist"),
    "empty": ("a.csv", b"", "is empty"),
    "no space": ("a.csv", b"x,y,z\n1,2,3\n", 'give space="LPS", "RAS", or "voxel" with grid='),
    "unknown space": ("a.csv", b"# space = MNI\nx,y,z\n1,2,3\n", "the unknown space 'MNI'"),
    "voxels": ("a.csv", b"# space = voxel\nx,y,z\n1,2,3\n", 'give space="voxel" and grid='),
    "no columns": ("a.csv", b"# space = LPS\n1,2,3\n4,5,6\n", "has the columns 1, 2, 3: expected x, y"),
    "only x": ("a.csv", b"# space = LPS\nx,name\n1,2\n", "expected x, y"),
    "twice": ("a.csv", b"# space = LPS\nx,y,x\n1,2,3\n", "two columns of one name"),
    "short": ("a.csv", b"# space = LPS\nx,y,z\n1,2,3\n4,5\n", "no point in line 4: '4,5'"),
    "words": ("a.csv", b"# space = LPS\nx,y,z\n1,two,3\n", "no point in line 3"),
    "underscore": ("a.csv", b"# space = LPS\nx,y,z\n1,1_0,3\n", "no point in line 3"),
    "not finite": ("a.csv", b"# space = LPS\nx,y,z\n1,2,3\n1,nan,3\n", "a point that is not finite, number 2"),
    "quote": ("a.csv", b'# space = LPS\nx,y,z,name\n1,2,3,"open\n', "is damaged"),
    "no text": ("a.csv", b"\x89PNG\r\n\x1a\n\xff\xfe", "is not text"),
    "nothing": ("a.csv", b"# space = LPS\n", "not even the names of columns"),
    "suffix": ("a.txt", b"1 2 3", "points are read from .csv, .fcsv, .mrk.json"),
    "image": ("a.nii.gz", b"?", "points are read from .csv"),
    "fcsv without": ("a.fcsv", b"1,2,3\n", "does not say its CoordinateSystem"),
    "fcsv in voxels": ("a.fcsv", b"# CoordinateSystem = 2\n1,1,2,3,0,0,0,1,1,1,0,F,,\n", "the unknown space '2'"),
    "json": ("a.mrk.json", b"{", "is damaged"),
    "json, deep": ("a.mrk.json", b"[" * 100000, "is damaged"),
    "json, list": ("a.mrk.json", b"[1]", "is not one list of Slicer's markups"),
    "json, two": ("a.mrk.json", b'{"markups": [{}, {}]}', "is not one list"),
    "json, no space": ("a.mrk.json", b'{"markups": [{"controlPoints": []}]}', "does not say its coordinateSystem"),
    "json, unit": ("a.mrk.json", b'{"markups": [{"coordinateUnits": "um"}]}', "has points in um: expected millimetres"),
    "json, unplaced": (
        "a.mrk.json",
        b'{"markups": [{"coordinateSystem": "LPS", "controlPoints": [{"position": [0,0,0], "positionStatus": "no"}]}]}',
        "a point without a place, number 1",
    ),
    "json, words": (
        "a.mrk.json",
        b'{"markups": [{"coordinateSystem": "LPS", "controlPoints": [{"position": [0, "1", 0]}]}]}',
        "a point that is no three numbers",
    ),
    "json, huge": (
        "a.mrk.json",
        b'{"markups": [{"coordinateSystem": "LPS", "controlPoints": [{"position": [0, 1' + b"0" * 400 + b", 0]}]}]}",
        "is damaged",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_error(tmp_path: Path, case: str) -> None:
    name, data, told = BAD[case]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(PointReadError) as caught:
        read_points(tmp_path / name)
    assert told in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


@hypothesis.given(
    data=st.binary(max_size=60), cut=st.integers(0, 500), name=st.sampled_from(["p.csv", "p.fcsv", "p.mrk.json"])
)
def test_damage_is_an_error_or_finite_points(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, cut: int, name: str
) -> None:
    """Text has no check sum: a digit that is lost is not seen, but nothing else than points comes of it."""
    path = tmp_path_factory.getbasetemp() / name
    write_points(path, Landmarks(POINTS, NAMES))
    whole = path.read_bytes()
    path.write_bytes(whole[:cut] + data + whole[cut + len(data) :])
    try:
        found = read_points(path)
    except PointReadError as problem:
        assert "\n" not in str(problem)
    else:
        assert found.points.shape[1] in (2, 3) and bool(torch.isfinite(found.points).all())


def test_arguments(tmp_path: Path) -> None:
    grid = fnreg.Grid((5, 4))
    write_points(tmp_path / "p.csv", Landmarks(POINTS))
    for options, told in (
        ({"space": "MNI"}, "choose LPS, RAS or voxel"),
        ({"space": "voxel"}, "need their grid"),
        ({"grid": grid}, "need their grid"),
    ):
        with pytest.raises(ValueError, match=told):
            read_points(tmp_path / "p.csv", **options)
    (tmp_path / "q.csv").write_text("x,y,z\n1,2,3\n")
    with pytest.raises(PointReadError, match="has points of 3 axes, but the grid has 2"):
        read_points(tmp_path / "q.csv", space="voxel", grid=grid)


def test_what_is_not_written(tmp_path: Path) -> None:
    bad: list[tuple[str, Any, type[Exception], str]] = [
        ("p.csv", POINTS, TypeError, "wrap points in Landmarks"),
        ("p.csv", fnreg.data.digits(9)[0], TypeError, "expected Landmarks, got Image"),
        ("p.csv", Landmarks(POINTS[0]), ValueError, r"points have shape \(3,\)"),
        ("p.fcsv", Landmarks(POINTS[:, :2]), ValueError, r"expected \(N, 3\)"),
        ("p.csv", Landmarks(POINTS * torch.nan), ValueError, "not finite"),
        ("p.csv", Landmarks(POINTS, ("one",)), ValueError, "1 names for 3 points"),
        ("p.csv", Landmarks(POINTS, ("a\nb", "", "")), ValueError, "a name has a line break"),
        ("p.txt", Landmarks(POINTS), WriteError, "points are written as"),
        ("none/p.csv", Landmarks(POINTS), WriteError, "does not exist"),
    ]
    for name, landmarks, kind, told in bad:
        with pytest.raises(kind, match=told):
            write_points(tmp_path / name, landmarks)
    with pytest.raises(ValueError, match="choose LPS or RAS"):
        write_points(tmp_path / "p.csv", Landmarks(POINTS), space="voxel")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
