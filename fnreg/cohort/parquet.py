"""Tables as Parquet, with pyarrow of the extra `cohort`: text by column in, typed columns out."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fnreg.extras import present, require


class ParquetError(ValueError):
    """A file is not a Parquet table, or it is damaged."""


def is_there() -> bool:
    """Whether pyarrow is installed."""
    return all(present("cohort").values())


def read_parquet(path: Path, content: bytes) -> list[dict[str, Any]]:
    """The rows of the table at a path, of its bytes.  Raises ParquetError, MissingExtraError."""
    arrow: Any = require("pyarrow", "cohort", f"reading {path}")
    parquet: Any = require("pyarrow.parquet", "cohort", f"reading {path}")
    try:
        # Not by its path, of which pyarrow would take names of folders for columns.
        found = parquet.ParquetFile(arrow.BufferReader(content), page_checksum_verification=True).read()
        names: list[str] = found.column_names
        twice = sorted({name for name in names if names.count(name) > 1})
        rows: list[dict[str, Any]] = [] if twice else found.to_pylist()
    except (OSError, ValueError, arrow.ArrowException) as problem:
        raise ParquetError(f"{path} is not a Parquet table, or it is damaged: {problem}") from problem
    if twice:
        raise ParquetError(f"{path} has columns of the same name: {', '.join(map(repr, twice))}")
    return rows


def parquet_bytes(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as a table: columns of whole numbers, of numbers, or of text; null for what is not there or not finite.

    Raises MissingExtraError.
    """
    arrow: Any = require("pyarrow", "cohort", "writing Parquet")
    parquet: Any = require("pyarrow.parquet", "cohort", "writing Parquet")
    made: dict[str, Any] = {}
    for name in columns:
        values = [_finite(row.get(name)) for row in rows]
        known = {type(value) for value in values if value is not None}
        if known <= {int}:
            kind = arrow.int64()
        elif known <= {int, float}:
            kind = arrow.float64()
        else:
            kind = arrow.string()
            values = [None if value is None else str(value) for value in values]
        made[name] = arrow.array(values, kind)
    stream = io.BytesIO()
    parquet.write_table(arrow.table(made), stream, write_page_checksum=True)
    return stream.getvalue()


def _finite(value: Any) -> Any:
    return None if value == "" or (isinstance(value, float) and not math.isfinite(value)) else value
