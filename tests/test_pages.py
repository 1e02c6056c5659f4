"""What the pages show and the build does not run: the program of docs/how-to/viewers.md; no page is left out."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from scenes import uniform
from torch.testing import assert_close

from fnreg import SVFFD, Affine, Grid, Image, Mapping, Sequential, cli, io, warp
from fnreg.commands.base import ENVIRONMENT, FAILED, INTERRUPTED, OK, REFUSED, USAGE
from fnreg.settings import Settings

DOCS = Path(__file__).parents[1] / "docs"


def test_every_page_is_in_the_contents() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = {line for block in re.findall(r"```\{toctree\}\n(.*?)```", index, re.S) for line in block.splitlines()}
    pages = {str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md") if "_build" not in path.parts}
    assert pages - listed == {"index"}


def test_links_between_pages_lead_somewhere() -> None:
    """Sphinx checks them too; this tells without a build, and also those of the README."""
    found = 0
    for page in [*DOCS.rglob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(([\w./-]+\.md)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
            found += 1
            assert (page.parent / target).is_file(), f"{page.name} links to {target}"
    assert found > 50


def test_simpleitk_resamples_with_our_file_as_we_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sitk = pytest.importorskip("SimpleITK")
    text = (DOCS / "how-to" / "viewers.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)

    turn = torch.tensor([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]).double()
    fixed = Grid((24, 28, 18), spacing=(2.0, 1.5, 3.0), center=(10.0, -40.0, 5.0), direction=turn)
    place = Grid((30, 26, 22), spacing=(1.9, 2.0, 2.8), center=(12.0, -38.0, 4.0))
    moving = Image(1 + uniform(1, 22, 26, 30, seed=1).float(), place).gaussian(2.0)
    bend, stretch = SVFFD(6), Affine()
    step = {"coefficients": 1.5 * uniform(*bend.init(fixed)["coefficients"].shape, seed=2)}
    whole = Sequential((bend, stretch))
    matrix = torch.tensor([[1.05, 0.1, 0.0], [-0.08, 0.97, 0.02], [0.0, 0.03, 1.02]]).double()
    linear = {"matrix": matrix, "translation": torch.tensor([1.0, -2.0, 0.5]).double()}
    mapping = Mapping((bend.retract(bend.init(fixed), step, fixed), linear), (fixed, fixed), whole)

    monkeypatch.chdir(tmp_path)
    io.write_image("fixed.nii.gz", Image(torch.zeros(1, 18, 28, 24), fixed))
    io.write_image("moving.nii.gz", moving)
    io.write_transform("transform.h5", mapping)
    scope: dict[str, object] = {}
    exec(compile(program, "viewers.md", "exec"), scope)

    theirs = io.read_image("warped_by_itk.nii.gz").data
    ours = warp(moving, mapping, fixed).data
    inside = place.world_to_index(mapping.map_points(fixed.points()))
    room = torch.tensor(place.size) - 1
    kept = ((inside > 0.01) & (inside < room - 0.01)).all(1).reshape(fixed.shape)
    assert 0.5 < float(kept.double().mean()) < 1
    assert_close(ours[0][kept], theirs[0][kept], atol=2e-4, rtol=0)

    landmark = torch.tensor([scope["landmark"]]).double()
    there = scope["transform"].TransformPoint(scope["landmark"])  # type: ignore[attr-defined]
    assert_close(mapping.map_points(landmark)[0], torch.tensor(there).double(), atol=1e-3, rtol=0)
    assert float((mapping.map_points(landmark) - landmark).norm()) > 1
    assert sitk.Version.MajorVersion() >= 2


def test_the_page_on_the_command_line_has_every_command_and_default() -> None:
    text = (DOCS / "command-line.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \| (.*?) ?\|", text, re.M)
    first = [name for row, _ in rows for name in re.findall(r"`([a-z]+)`", row)]
    commands = {name for name in cli.app if not name.startswith("-")}
    assert commands <= set(first)
    told = {
        name: default.strip("`")
        for row, defaults in rows
        for name, default in zip(re.findall(r"`([a-z]+)`", row), defaults.split(", "), strict=False)
    }
    for field in dataclasses.fields(Settings):
        assert told[field.name] == str(field.default).lower(), field.name
    for code in (OK, FAILED, USAGE, REFUSED, ENVIRONMENT, INTERRUPTED):
        assert f"\n| {code} | " in text
