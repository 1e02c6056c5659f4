"""Other programs resample images through our files as we do: greedy, and where they are there ANTs and transformix."""

from __future__ import annotations

import io as stream
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from scenes import intensity, orientation, random_params, smooth_mapping, tensor

import fnreg
from fnreg import FFD, SVFFD, Affine, Grid, Image, Mapping, io
from fnreg.convert import convert

pytestmark = pytest.mark.peer

EXTENT = 24.0


def grid_of(turn: tuple[float, ...], size: tuple[int, ...], spacing: tuple[float, ...]) -> Grid:
    return Grid(size, spacing=spacing, center=(30.0, -20.0, 10.0), direction=orientation(3, tensor(turn)))


FIXED = grid_of((0.4, -0.3, 0.6), (24, 22, 18), (1.2, 1.5, 2.0))
MOVING = grid_of((0.1, 0.0, 0.2), (34, 33, 30), (1.1, 1.3, 1.5))
AFFINE = Mapping(random_params(Affine(), FIXED, 1, 0.4), FIXED, Affine())
BENT = smooth_mapping(SVFFD(4), FIXED, 2, 1.0, 2.0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, grid in (("fixed", FIXED), ("moving", MOVING)):
        values = intensity(grid.points() - grid.center, EXTENT).reshape(1, *grid.shape).float()
        io.write_image(Path(f"{name}.nii.gz"), Image(values, grid))
    io.write_transform("affine.tfm", AFFINE)
    io.write_transform("affine.mat", AFFINE)
    io.write_transform("warp.nii.gz", BENT)
    io.write_transform("both.safetensors", AFFINE @ BENT)
    return tmp_path


def same(name: str, mapping: Mapping) -> None:
    """The image of a file is ours in the interior, and neither the moving image as it lies nor the other order's."""
    found = io.read_image(Path(name)).data
    fixed, moving = (io.read_image(Path(f"{side}.nii.gz")) for side in ("fixed", "moving"))
    inner = (slice(None), *(slice(3, -3),) * 3)
    spread = float(fixed.data.max() - fixed.data.min())

    def apart(other: torch.Tensor) -> float:
        return float((found - other)[inner].abs().max()) / spread

    assert apart(fnreg.warp(moving, mapping, fixed.grid).data) < 1e-4
    assert apart(moving.resample(fixed.grid, padding="zeros").data) > 0.01
    if mapping.transform.linear or len(getattr(mapping.transform, "transforms", ())) < 2:
        return
    assert apart(fnreg.warp(moving, BENT @ AFFINE, fixed.grid).data) > 1e-3


CHAINS: dict[str, tuple[list[str], Mapping]] = {
    "affine": (["affine.tfm"], AFFINE),
    "displacement": (["warp.nii.gz"], BENT),
    "both": (["warp.nii.gz", "affine.tfm"], AFFINE @ BENT),  # the first acts first on fixed points
}


@pytest.mark.parametrize("case", CHAINS)
def test_greedy(folder: Path, case: str) -> None:
    greedy: Any = pytest.importorskip("picsl_greedy").Greedy3D()
    names, mapping = CHAINS[case]
    files = "-rf fixed.nii.gz -rm moving.nii.gz out.nii.gz -r " + " ".join(names)
    greedy.execute(f"-d 3 -V 0 -threads 1 {files}", out=stream.StringIO(), err=stream.StringIO())
    same("out.nii.gz", mapping)


@pytest.mark.parametrize("case", CHAINS)
def test_ants(folder: Path, case: str) -> None:
    ants: Any = pytest.importorskip("ants")
    names, mapping = CHAINS[case]
    images = {side: ants.image_read(f"{side}.nii.gz") for side in ("fixed", "moving")}
    made = ants.apply_transforms(**images, transformlist=[n.replace(".tfm", ".mat") for n in names])
    ants.image_write(made, "out.nii.gz")
    same("out.nii.gz", mapping)


def test_transformix(folder: Path) -> None:
    if shutil.which("transformix") is None:
        pytest.skip("transformix, of elastix, is not on the path")
    free = smooth_mapping(FFD(4), FIXED, 2, 1.0, 2.0)
    io.write_transform("free.safetensors", AFFINE @ free)
    convert(Path("free.safetensors"), Path("elastix"), to="elastix")
    (folder / "out").mkdir()
    command = ["transformix", "-in", "../moving.nii.gz", "-tp", "TransformParameters.1.txt", "-out", "../out"]
    subprocess.run(command, cwd=folder / "elastix", check=True, capture_output=True)
    same("out/result.nii.gz", AFFINE @ free)
