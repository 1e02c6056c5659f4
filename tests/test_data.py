"""The images that come with the package: what they are, that they are unchanged, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fnreg
from fnreg import data


def test_digits_are_pictures_in_unit_range() -> None:
    images = data.digits(9, count=30)
    assert len(images) == 30
    for image in images:
        assert image.data.shape == (1, 28, 28) and image.data.dtype == torch.float32
        assert float(image.data.min()) >= 0 and 0.9 < float(image.data.max()) <= 1
        assert image.grid.same_as(fnreg.Grid((28, 28)))


def test_digits_of_one_kind_differ_and_do_not_depend_on_the_count() -> None:
    first, second = data.digits(3)
    assert not torch.equal(first.data, second.data)
    assert torch.equal(data.digits(3, count=1)[0].data, first.data)


@pytest.mark.parametrize("digit", [-1, 10, 2.5, "9", True])
def test_what_is_no_digit_is_refused(digit: int) -> None:
    with pytest.raises(ValueError, match="expected one of 0 to 9"):
        data.digits(digit)


@pytest.mark.parametrize("count", [0, -1, 31])
def test_more_digits_than_there_are(count: int) -> None:
    with pytest.raises(ValueError, match="30 images of each digit"):
        data.digits(0, count=count)


def test_pairs_are_of_one_digit_and_all_different() -> None:
    fixed, moving = data.digit_pairs(1000)
    assert fixed.data.shape == moving.data.shape == (1000, 1, 28, 28)
    stored = torch.cat([torch.stack([image.data for image in data.digits(digit, count=30)]) for digit in range(10)])
    near = [torch.cdist(batch.data.flatten(1), stored.flatten(1)).argmin(1) for batch in (fixed, moving)]
    assert torch.equal(near[0] // 30, torch.arange(1000) % 10)
    assert torch.equal(near[0] // 30, near[1] // 30)
    assert not bool((near[0] == near[1]).any())
    assert len(set(zip(near[0].tolist(), near[1].tolist(), strict=True))) == 1000
    assert len(set(near[0][:300].tolist())) == 300


def test_fewer_pairs_are_the_first_of_more() -> None:
    assert torch.equal(data.digit_pairs(20)[1].data, data.digit_pairs(50)[1].data[:20])


@pytest.mark.parametrize("count", [0, 8701])
def test_more_pairs_than_there_are(count: int) -> None:
    with pytest.raises(ValueError, match="1 to 8700 pairs"):
        data.digit_pairs(count)


def test_brain_truth_maps_one_slice_onto_the_other() -> None:
    fixed, moving = data.brain()
    assert fixed.grid.size == moving.grid.size == (221, 257)
    warped = fnreg.warp(moving, data.brain_truth(), fixed.grid)
    pair = torch.stack([warped.data.flatten(), fixed.data.flatten()])
    assert float(torch.corrcoef(pair)[0, 1]) > 0.997
    angle, shift = torch.tensor(10.0).deg2rad().double(), torch.tensor([13.0, 16.0]).double()
    middle = torch.tensor([[110.5, 128.5]]).double()
    torch.testing.assert_close(data.brain_truth().map_points(middle)[0], middle[0] + shift)
    assert float(data.brain_truth().matrix()[1, 0]) == pytest.approx(float(angle.sin()))


def test_bytes_are_those_of_the_sources(data_dir: Path) -> None:
    with np.load(data_dir / "mnist" / "mnist_t10k.npz") as source:
        images, labels = source["images"], source["labels"]
    for digit in (0, 9):
        shipped = torch.stack([image.data for image in data.digits(digit, count=30)]) * 255
        assert np.array_equal(shipped.squeeze(1).round().numpy(), images[labels == digit][:30])
    names = ("BrainProtonDensitySliceBorder20.png", "BrainProtonDensitySliceR10X13Y17.png")
    for image, name in zip(data.brain(), names, strict=True):
        source = fnreg.io.read_image(data_dir / "itk_slices" / name)
        assert torch.equal((image.data * 255).round(), source.data)


def test_authors_and_licences_are_named() -> None:
    notice = (Path(data.__file__).parent / "NOTICE.md").read_text(encoding="utf-8")
    for told in ("digits.npz", "LeCun", "CC BY-SA 3.0", "brain.npz", "Insight", "Apache License 2.0"):
        assert told in notice
