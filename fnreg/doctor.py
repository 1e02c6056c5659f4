"""What fnreg finds on this machine: versions, devices, the compiled kernels and the extras."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

import fnreg
from fnreg import extras, native

_PACKAGES = ("torch", "torchopt", "numpy", "safetensors", "nibabel", "cyclopts", "matplotlib", "pillow", "SimpleITK")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def report() -> dict[str, str]:
    """Everything by name, in reading order."""
    kernels = native.kernels()
    found = {
        "fnreg": fnreg.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **{package: _version(package) for package in _PACKAGES},
        "cpu": f"{torch.get_num_threads()} threads of {os.cpu_count()} processors",
    }
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            found[f"cuda:{number}"] = torch.cuda.get_device_name(number)
    else:
        found["cuda"] = "no device" if torch.version.cuda else "this build of torch has no CUDA"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    found["compiled kernels"] = f"{'in use' if kernels.library else 'not in use'}: {kernels.reason}"
    for extra in extras.EXTRAS:
        missing = [module for module, there in extras.present(extra).items() if not there]
        fault = f'{", ".join(missing)} missing: pip install "fnreg[{extra}]"'
        found[f"extra {extra}"] = fault if missing else "present"
    return found
