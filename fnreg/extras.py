"""Optional packages: imported on use, and an error that says how to install what is missing."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

EXTRAS: dict[str, tuple[str, ...]] = {
    "plot": ("matplotlib", "PIL"),
    "itk": ("SimpleITK",),
    "cohort": ("pyarrow",),
    "ray": ("ray",),
}


class MissingExtraError(ImportError):
    """A package of one of fnreg's extras is not installed."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """The module; MissingExtraError with the command that installs it, where it is missing.

    module : to import, such as "PIL.Image"; extra : fnreg's extra that holds it; purpose : what it is needed for
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is there, but something of its own is missing
        raise MissingExtraError(
            f'{purpose} needs {package}, which is not installed: run pip install "fnreg[{extra}]"', name=package
        ) from None


def present(extra: str) -> dict[str, bool]:
    """Which modules of an extra are installed."""
    return {module: importlib.util.find_spec(module) is not None for module in EXTRAS[extra]}
