"""Images that nearly all differ in shape, through `cohort.run` from files to files: as they are and on a lattice.

All 132 ordered pairs of the twelve hippocampi, whose crops have 28 to 52 voxels along an axis: an affine map, then a
field, both by correlation in windows, from where the centres of the crops meet.  Dice is that of the study's table, by
nearest neighbours at the voxels of each fixed image.  Rows take turns in one process.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.images import folder
from benchmarks.measure import Options, Table
from fnreg import cohort, io
from fnreg.lattice import Lattice
from fnreg.settings import Settings

KINDS = {
    "affine": Settings(transform="affine", similarity="lncc:radius=3,flat=0.1", start="center", steps="50x30x10"),
    "affine, diffeomorphism": Settings(
        transform="affine+diffeomorphism:gradient=1,smooth=1",
        similarity="lncc:radius=3,flat=0.1",
        start="center",
        optimizer="adam:lr=0.5,b2=0.99,decay=1,relative=3",
        steps="50x30x10",
    ),
}
LATTICES = ("none", "auto", "44x52x44")  # the last one is large enough for all


def rows_of(count: int | None) -> list[cohort.Row]:
    """Ordered pairs of the first `count` people, or of all, with their labels."""
    people = sorted(folder("hippocampus").glob("*_img.nii.gz"))[:count]

    def files(fixed: Path, moving: Path) -> dict[str, Path]:
        sides = {"fixed": fixed, "moving": moving}
        known = {f"{side}_labels": path.with_name(path.name.replace("_img", "_lab")) for side, path in sides.items()}
        return sides | known

    return [cohort.Row(f"pair{n:03d}", files(*pair)) for n, pair in enumerate(itertools.permutations(people, 2))]


def shapes(rows: list[cohort.Row], lattice: str) -> tuple[int, float]:
    """How many kinds of shapes pairs have, and by how much the fixed images grow."""
    size = Settings(lattice=lattice).lattice_size()
    sizes = {path: io.read_image(path).grid.size for row in rows for path in row.files.values()}
    pairs = [(sizes[row.files["fixed"]], sizes[row.files["moving"]]) for row in rows]
    placed = pairs if size is None else [Lattice(size or None).sizes(*pair) for pair in pairs]
    own, whole = (sum(math.prod(fixed) for fixed, _ in each) for each in (pairs, placed))
    return len(Counter(placed)), whole / own


def run(options: Options) -> list[Table]:
    """One table."""
    rows, steps = rows_of(3 if options.quick else None), "2x1x1" if options.quick else ""
    found = Table(
        f"{len(rows)} pairs of ragged shapes, from files to files",
        (
            "transform",
            "lattice",
            "shapes",
            "fixed voxels",
            "seconds",
            "pairs a second",
            "Dice",
            "largest folds",
        ),
    )
    with tempfile.TemporaryDirectory() as name:
        for (kind, settings), lattice in itertools.product(KINDS.items(), LATTICES):
            given = vars(settings) | {"lattice": lattice} | ({"steps": steps} if steps else {})
            begin = time.perf_counter()
            records = list(cohort.run(rows, Settings(**given), output=Path(name) / f"{kind}-{lattice}"))
            taken = time.perf_counter() - begin
            dice = sum(record["dice_mean"] for record in records) / len(records)
            count, grown = shapes(rows, lattice)
            folds = max(record["folds"] for record in records)
            found.rows.append((kind, lattice, count, grown, taken, len(rows) / taken, dice, folds))
    return [found]
