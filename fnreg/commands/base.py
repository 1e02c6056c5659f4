"""What all commands share: the application, exit codes, options that several have, and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter

from fnreg import __version__

OK, FAILED, USAGE, REFUSED, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 4, 130

app = cyclopts.App(
    name="fnreg",
    help="Image registration as pure functions on PyTorch.",
    help_epilogue=(
        "A transform maps fixed points to moving points: that resamples the moving image onto the fixed grid.\n\n"
        "Exit codes: 0 all ok; 1 finished but the pair failed; 2 usage; 3 input or output refused; 4 environment; "
        "130 interrupted."
    ),
    version=__version__,
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(negative="", show_default=False),
)


def option(text: str, *names: str) -> Any:
    """The help of an option, and its names where they are not those of the argument."""
    return Parameter(help=text, name=names or None)


Verbose = Annotated[bool, option("Say more, and show where an error came from.", "--verbose", "-v")]
Json = Annotated[bool, option("Print JSON.", "--json")]
File = Annotated[Path, option("File for the result.", "--output", "-o")]
Overwrite = Annotated[bool, option("Replace a file of this name.")]
Like = Annotated[Path | None, option("Image whose grid the result has. [default: the grid of the transform]")]


def print_table(found: dict[str, Any], as_json: bool) -> None:
    """Names and values, one a line; what is not known is None, in JSON null, which also stands for what is no finite
    number."""
    if as_json:
        told = json.loads(json.dumps(found), parse_constant=lambda _: None)
        print(json.dumps(told, indent=2, allow_nan=False))
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {'unknown' if value is None else value}")
