"""Data sets of ragged shapes: they share batches, and every result is on the grid of its own fixed image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cohort_scenes import picture, register, results, same_tables, table, whole

import fnreg
from fnreg import Image, cli, cohort, io
from fnreg.cohort import local, solve
from fnreg.cohort.manifest import Row
from fnreg.cohort.study import StudyError
from fnreg.settings import Settings

QUICK = Settings(transform="rigid", start="center", levels=2, steps="6", lattice="auto")
SIZES = ((15, 16), (16, 13), (14, 15), (13, 16), (16, 16), (15, 14))
ALL = ("params", "xfm", "warped", "inverse", "displacement", "jacobian")
FIELD = Settings(transform="svffd:stride=4", start="header", levels=2, steps="6", penalty="bending=1", lattice="auto")


def pairs(home: Path, count: int = 5, *, masked: bool = False) -> list[Row]:
    """Pairs of which each has other shapes, with labels and points, and masks where they are asked for."""
    rows: list[Row] = []
    for number in range(count):
        files: dict[str, Path] = {}
        for side, name in enumerate(("fixed", "moving")):
            image = picture(2 * number + side, SIZES[(number + 2 * side) % len(SIZES)])
            labels = (image.data > 0.4).to(torch.int64)
            inside = torch.ones_like(image.data)
            inside[..., :2] = 0
            files |= {what: home / f"{name}{number}{end}" for what, end in (
                (name, ".nii"), (f"{name}_labels", "-labels.nii"), (f"{name}_points", ".csv"),
            )}  # fmt: skip
            io.write_image(files[name], image)
            io.write_labels(files[f"{name}_labels"], io.Labels(labels, image.grid))
            io.write_points(files[f"{name}_points"], io.Landmarks(image.grid.points()[:40:7]))
            if masked:
                files[f"{name}_mask"] = home / f"{name}{number}-mask.nii"
                io.write_image(files[f"{name}_mask"], Image(inside, image.grid))
        rows.append(Row(f"p{number:03d}", files))
    return rows


def batches_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs each batch of what follows has."""
    seen: list[int] = []

    def counted(batch: Any, *rest: Any) -> Any:
        seen.append(len(batch))
        return solve.attempt(batch, *rest)

    monkeypatch.setattr(local, "attempt", counted)
    return seen


# -- what comes out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("settings", [QUICK, FIELD], ids=["rigid", "svffd"])
def test_pairs_of_other_shapes_share_batches_and_change_nothing(
    settings: Settings, masked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, settings = pairs(tmp_path, masked=masked), Settings(**vars(settings) | {"lattice": "16x16"})
    seen = batches_of(monkeypatch)
    together = register(rows, tmp_path / "together", settings, batch_size=8)
    assert seen == [5]
    register(rows, tmp_path / "alone", settings, batch_size=1)
    assert seen[1:] == [1] * 5
    same_tables(tmp_path / "together", tmp_path / "alone")
    whole(tmp_path / "together", rows)
    assert {record["status"] for record in together.values()} <= {"ok", "warn"}
    assert 'lattice = "16x16"\n' in (tmp_path / "together" / "settings.toml").read_text()


def test_shapes_of_their_own_keep_pairs_apart_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = batches_of(monkeypatch)
    register(pairs(tmp_path), tmp_path / "study", Settings(**vars(QUICK) | {"lattice": "none"}), batch_size=8)
    assert seen == [1] * 5
    register(pairs(tmp_path), tmp_path / "auto", QUICK, batch_size=8)
    assert sorted(seen[5:]) == [2, 3]  # sizes of this few voxels are not rounded, but both images of a pair share one


@pytest.mark.parametrize("settings", [QUICK, FIELD], ids=["rigid", "svffd"])
def test_everything_is_on_the_grid_of_the_fixed_image(settings: Settings, tmp_path: Path) -> None:
    rows = pairs(tmp_path)
    found = register(rows, tmp_path / "study", settings, save="+".join(ALL))
    for row in rows:
        place, record = tmp_path / "study" / "pairs" / row.pair_id, found[row.pair_id]
        fixed, moving = (io.read_image(row.files[side]) for side in ("fixed", "moving"))
        mapping = io.read_transform(place / "transform.safetensors")
        warped = io.read_image(place / "warped.nii")
        assert warped.grid.same_as(fixed.grid)
        assert torch.allclose(warped.data, fnreg.warp(moving, mapping, fixed.grid).data, atol=1e-5)
        jacobian, displacement = (io.read_image(place / f"{name}.nii.gz") for name in ("jacobian", "displacement"))
        assert jacobian.grid.size == fixed.grid.size == displacement.grid.size
        points = fixed.grid.points()
        by_field = io.read_transform(place / "displacement.nii.gz").map_points(points)
        assert torch.allclose(by_field, mapping.map_points(points), atol=1e-4)
        back = io.read_transform(place / "inverse.safetensors")
        inner = fixed.grid.crop(4).points()
        assert float((back.map_points(mapping.map_points(inner)) - inner).norm(dim=1).max()) < 0.05
        # Labels, points and statistics, by other means.
        labels = [io.read_labels(row.files[f"{side}_labels"]) for side in ("fixed", "moving")]
        moved = fnreg.warp(Image(labels[1].data, labels[1].grid), mapping, fixed.grid, interpolation="nearest").data > 0
        both = 2 * float((moved & (labels[0].data > 0)).sum()) / float(moved.sum() + labels[0].data.sum())
        assert record["dice_mean"] == pytest.approx(both)
        sides = [io.read_points(row.files[f"{side}_points"]).points for side in ("fixed", "moving")]
        away = (mapping.map_points(sides[0]) - sides[1]).norm(dim=1)
        assert record["tre_mean"] == pytest.approx(float(away.mean()), rel=1e-5)
        if mapping.transform.linear:
            assert mapping.domain.same_as(fixed.grid)
            itk = io.read_transform(place / "transform.tfm")
            assert torch.allclose(itk.map_points(points), mapping.map_points(points), atol=1e-9)
            continue
        told = fnreg.fields.statistics(mapping.displacement(fixed.grid), fixed.grid)
        for name, value in (
            ("folds", told.folds),
            ("sdlogj", told.sd_log_determinant),
            ("jac_min", told.min_determinant),
        ):
            assert record[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6)
        assert float(jacobian.data.min()) == pytest.approx(record["jac_min"], rel=1e-4)


def test_results_are_near_those_without(tmp_path: Path) -> None:
    rows = pairs(tmp_path, 3)
    steps = {"steps": "60", "levels": 1, "transform": "translation"}
    found = register(rows, tmp_path / "a", Settings(**vars(QUICK) | steps))
    plain = register(rows, tmp_path / "b", Settings(**vars(QUICK) | steps | {"lattice": "none"}))
    for row in rows:
        maps = [io.read_transform(tmp_path / s / "pairs" / row.pair_id / "transform.safetensors") for s in "ab"]
        points = io.read_image(row.files["fixed"]).grid.points()
        apart = (maps[0].map_points(points) - maps[1].map_points(points)).norm(dim=1)
        assert float(apart.max()) < 0.1
        assert found[row.pair_id]["value_before"] == pytest.approx(plain[row.pair_id]["value_before"], rel=0.02)


def test_a_transform_goes_on_from_a_file(tmp_path: Path) -> None:
    rows = pairs(tmp_path, 1)
    register(rows, tmp_path / "a", FIELD)
    path = tmp_path / "a" / "pairs" / "p000" / "transform.safetensors"
    found = register(rows, tmp_path / "b", Settings(**vars(FIELD) | {"start": str(path), "levels": 1, "steps": "0"}))
    assert results(tmp_path / "b") == results(tmp_path / "a")
    assert found["p000"]["status"] in ("ok", "warn")


# -- bad values ----------------------------------------------------------------------------------------------------


def test_images_that_a_lattice_does_not_hold_are_told(tmp_path: Path) -> None:
    rows = pairs(tmp_path, 3)
    found = register(rows, tmp_path / "study", Settings(**vars(QUICK) | {"lattice": "16x15"}))
    bad = {name for name, record in found.items() if record["status"] == "invalid_input"}
    for number, row in enumerate(rows):
        large = SIZES[number % 6][1] > 15 or SIZES[(number + 2) % 6][1] > 15
        assert (row.pair_id in bad) == large
        if large:
            assert "lattice 16x15 is smaller than the" in found[row.pair_id]["reason"]
    wrong = register(rows, tmp_path / "axes", Settings(**vars(QUICK) | {"lattice": "16x16x16"}))
    assert all("has 3 axes but the fixed image has 2" in record["reason"] for record in wrong.values())


def test_the_lattice_belongs_to_a_study(tmp_path: Path) -> None:
    rows = pairs(tmp_path, 1)
    register(rows, tmp_path / "study", QUICK)
    with pytest.raises(StudyError, match="lattice was 'auto' and is 'none'"):
        list(cohort.run(rows, Settings(**vars(QUICK) | {"lattice": "none"}), output=tmp_path / "study"))


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One pair by `fnreg register` with the same lattice is the pair of the study."""
    monkeypatch.chdir(tmp_path)
    rows = pairs(tmp_path, 2)
    options = ["--transform", "svffd:stride=4", "--penalty", "bending=1", "--levels", "1", "--steps", "5"]
    options += ["--start", "header", "--lattice", "auto", "--save", "params"]
    names = [str(row.files["moving"]) for row in rows]
    fixed = str(rows[0].files["fixed"])
    Path("pairs.csv").write_text("fixed,moving\n" + "".join(f"{fixed},{name}\n" for name in names))
    assert cli.main(["run", "pairs.csv", "-o", "study", "--figures", "none", *options]) == 0
    for place, name in zip(sorted(Path("study/pairs").iterdir()), names, strict=True):
        assert cli.main(["register", fixed, name, "-o", "alone", "--overwrite", *options]) == 0
        maps = [io.read_transform(path / "transform.safetensors") for path in (place, Path("alone"))]
        points = io.read_image(fixed).grid.points()
        assert torch.allclose(maps[0].map_points(points), maps[1].map_points(points), atol=1e-4)
    file = "alone/transform.safetensors"
    assert cli.main(["apply", names[1], file, "--like", fixed, "-o", "w.nii"]) == 0
    assert io.read_image("w.nii").grid.same_as(io.read_image(fixed).grid)
    assert cli.main(["invert", file, "-o", "back.safetensors"]) == 0
    assert cli.main(["convert", file, "--to", "displacement", "-o", "field.nii.gz", "--like", fixed]) == 0
    capsys.readouterr()
    for text, told in (
        ("0x8", "size of at least 1"),
        ("atuo", "did you mean auto"),
        ("8x8", "is smaller than the fixed"),
    ):
        given = [*options, "--lattice", text]
        del given[given.index("--lattice") : given.index("--lattice") + 2]
        assert cli.main(["register", fixed, names[0], "-o", "bad", *given]) == 2
        assert told in capsys.readouterr().err and not Path("bad").exists()
    Path("settings.toml").write_text('lattice = "10x"\n')
    assert cli.main(["run", "pairs.csv", "-o", "bad", "--settings", "settings.toml"]) == 2
    assert "settings.toml, line 1" in capsys.readouterr().err
    assert table(Path("study"))
