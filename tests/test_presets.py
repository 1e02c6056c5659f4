"""Presets: plain data that print as the Python that makes them, in Python and on the command line."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from scenes import equal_bits

import fnreg
from fnreg import cli, presets
from fnreg.filters import gaussian
from fnreg.settings import OF_PRESETS, PRESETS, Settings
from fnreg.specs import SettingsError

every_preset = pytest.mark.parametrize("name", presets.PRESETS)


def brains() -> tuple[fnreg.Image, fnreg.Image]:
    """Two blobs with something inside, on 24 x 24 x 24 voxels."""
    noise = torch.randn(1, 24, 24, 24, generator=torch.Generator().manual_seed(0))
    texture = gaussian(noise, 1.5) * 5
    away = (fnreg.Grid((24, 24, 24)).points() - 11.5).norm(dim=1).reshape(1, 24, 24, 24)
    image = fnreg.Image(torch.where(away < 9, texture + 2, 0.0)).gaussian(0.7)
    return image, fnreg.Image(2 * image.data + 1, origin=(1.0, -1.0, 0.5))


@every_preset
def test_a_preset_prints_as_the_python_that_makes_it(name: str) -> None:
    preset = presets.PRESETS[name]
    made = eval(repr(preset), {key: getattr(fnreg, key) for key in fnreg.__all__} | vars(fnreg.optim))
    assert repr(made) == repr(preset)
    assert getattr(presets, name) is preset


@every_preset
def test_settings_know_its_transforms(name: str) -> None:
    stages = presets.PRESETS[name]["transform"]
    assert PRESETS[name] == "+".join(type(stage.transform).__name__.lower() for stage in stages)
    assert set(PRESETS) == set(presets.PRESETS)


def test_it_registers_in_python() -> None:
    fixed, moving = brains()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so small an image has fewer levels, which is told
        result = fnreg.register(fixed, moving, **fnreg.presets.brain)
    warped = result.warp(moving)
    assert float(fnreg.functional.ncc(warped.data, fixed.data)) < 0.02
    assert float(result.jacobian().data.min()) > 0


@pytest.mark.parametrize("key", OF_PRESETS)
def test_what_a_preset_decides_is_not_given_beside_it(key: str) -> None:
    given: dict[str, Any] = {"preset": "brain", key: {"symmetric": True, "levels": 2}.get(key, "x")}
    with pytest.raises(SettingsError, match=f"preset brain decides about {key}: give one of the two"):
        Settings.gather(given)


def test_settings_made_by_hand_are_checked_too() -> None:
    with pytest.raises(SettingsError, match="unknown preset 'brian'"):
        Settings(preset="brian").check()
    with pytest.raises(SettingsError, match="preset brain decides about similarity: give one of the two"):
        Settings(preset="brain", transform=PRESETS["brain"], similarity="ncc").check()
    Settings.gather({"preset": "brain"}).check()


def test_advice_that_can_be_followed() -> None:
    from fnreg.results import _of_folds  # pyright: ignore[reportPrivateUsage]

    told = _of_folds(0.1, 0.5, Settings.gather({"preset": "brain"}))
    assert "in place of preset brain" in told and "--penalty" not in told


def test_an_unknown_one_is_named() -> None:
    with pytest.raises(SettingsError, match="unknown preset 'brian': did you mean brain"):
        Settings.gather({"preset": "brian"})


def test_it_registers_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image as Picture

    fixed, _ = (image.data[0, 12] for image in brains())
    for name, image in (("a", fixed), ("b", fixed.roll(1, 0))):
        scaled = torch.nn.functional.interpolate(image[None, None], scale_factor=4, mode="bicubic")[0, 0]
        Picture.fromarray((scaled.clamp(0, 6) * 40).to(torch.uint8).numpy()).save(tmp_path / f"{name}.png")
    files = [str(tmp_path / "a.png"), str(tmp_path / "b.png"), "-o", str(tmp_path / "out"), "--save", "params"]
    assert cli.main(["register", *files, "--preset", "brain"]) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    others = {"start": "auto", "lattice": "none", "save": "params", "seed": 0, "threads": 0, "device": "cpu"}
    assert record["settings"] == {"preset": "brain", "transform": PRESETS["brain"], **others}
    for told, stage in zip(record["stages"], presets.brain["transform"], strict=True):
        assert repr(stage.transform) in told and repr(stage.objective) in told
    assert not any("deprecated" in note for note in record["warnings"])
    assert "lncc" in record["objective"] and "Adam(lr=0.8" in record["solver"]
    assert record["terms_after"]["lncc"] < record["terms_before"]["lncc"]
    assert "affine+diffeomorphism" in capsys.readouterr().out


def test_twice_is_the_same() -> None:
    fixed, moving = brains()
    small = [dataclasses.replace(stage, levels=1, steps=5) for stage in presets.brain["transform"]]
    first, second = (fnreg.register(fixed, moving, **presets.brain | {"transform": small}) for _ in "ab")
    assert equal_bits(first.mapping.params, second.mapping.params)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lncc:window=gaussian", fnreg.lncc(window="gaussian")),
        ("mi:samples=5000,seed=7", fnreg.mi(samples=5000, seed=7)),
        ("mse:channel=2", fnreg.mse(channel=2)),
        ("ngf:channel=0x2,edge=0.5", fnreg.ngf(channel=(0, 2), edge=0.5)),
        ("mind:radius=0,dilation=2", fnreg.mind(radius=0, dilation=2)),
        ("lncc:squared=false", fnreg.lncc(squared=False)),
    ],
)
def test_options_of_a_similarity_on_the_command_line(text: str, expected: fnreg.Term) -> None:
    made = Settings.gather({"similarity": text}).measure()
    assert repr(made) == repr(expected) and made.options == expected.options


def test_whole_numbers_of_a_similarity_on_the_command_line() -> None:
    made = Settings.gather({"similarity": "lncc:radius=3,flat=0.1,squared=false"}).measure()
    assert repr(made) == "lncc(flat=0.1, radius=3, squared=False)"
    image = torch.rand(1, 9, 9)
    assert float(made.value({"warped": image, "fixed": image, "weights": None})) < 1e-5
    assert repr(Settings.gather({"similarity": "mi:bins=16"}).measure()) == "mi(bins=16)"
