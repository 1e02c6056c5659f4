"""Mappings to and from files, without loss and without code: safetensors with a JSON header.

The header, under the key "fnreg", holds a schema version, the transform as `Transform.to_dict` gives it, and the
domain's grids, and a check sum of everything; the tensors are the parameters by their path, such as `rotation` or
`0.matrix`.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fnreg.grid import Grid
from fnreg.io.files import PathLike, TransformReadError, read_bytes, write_bytes
from fnreg.pytree import tree_flatten, tree_map, tree_paths, tree_unflatten
from fnreg.transforms.base import Mapping, Transform
from fnreg.transforms.domain import Domain, single

VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9_]+")


def _names(params: Any) -> list[str]:
    """The path of each leaf: `0.rotation` for what torch calls [0]['rotation']; `params` for a single tensor."""
    return [".".join(_NAME.findall(path)) or "params" for path in tree_paths(params)]


def _domain_to_plain(domain: Domain) -> Any:
    return domain.to_dict() if isinstance(domain, Grid) else [_domain_to_plain(part) for part in domain]


def _domain_from_plain(data: Any) -> Domain:
    return tuple(_domain_from_plain(part) for part in data) if isinstance(data, list) else Grid.from_dict(data)


def write_lossless(path: PathLike, mapping: Mapping) -> None:
    """Write a mapping without loss, as `.safetensors`; all of the file or nothing.

    A batch is written as one.  The same mapping gives the same bytes.  Raises WriteError.

    >>> import fnreg, os, tempfile
    >>> mapping = fnreg.Mapping(fnreg.Rigid().init(fnreg.Grid((4, 3))), fnreg.Grid((4, 3)), fnreg.Rigid())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fnreg.io.write_transform(os.path.join(folder, "a.safetensors"), mapping)
    ...     fnreg.io.read_transform(os.path.join(folder, "a.safetensors")).transform
    Rigid()
    """
    header: dict[str, Any] = {
        "version": VERSION,
        "transform": mapping.transform.to_dict(),
        "domain": _domain_to_plain(mapping.domain),
    }
    leaves: list[Tensor] = tree_flatten(mapping.params)[0]
    named = zip(_names(mapping.params), leaves, strict=True)
    tensors = {name: leaf.detach().cpu().contiguous().clone() for name, leaf in named}
    header["sha256"] = _digest(header, tensors)
    write_bytes(path, safetensors.torch.save(tensors, {"fnreg": json.dumps(header, sort_keys=True, allow_nan=False)}))


def read_lossless(path: PathLike) -> Mapping:
    """The mapping that `write_lossless` wrote, on the CPU.

    Raises TransformReadError where the file is missing, damaged, not such a file, or of a later version.
    """
    data = read_bytes(path, TransformReadError)
    try:
        header = _header(data)
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, UnicodeError, RecursionError) as problem:
        raise TransformReadError(f"{path} is not a transform of fnreg, or it is damaged: {problem}") from problem
    version = header.get("version")
    if version != VERSION:
        raise TransformReadError(f"{path} has version {version!r}: this fnreg reads version {VERSION}, update it")
    if header.pop("sha256", None) != _digest(header, tensors):
        raise TransformReadError(f"{path} is damaged: its content does not agree with its check sum")
    try:
        transform = Transform.from_dict(_renamed(header["transform"]))
        domain = _domain_from_plain(header["domain"])
        params = _params(transform, domain, tensors)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as problem:
        raise TransformReadError(f"{path} does not hold a valid transform: {problem}") from problem
    return Mapping(params, domain, transform)


def _digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the header and the parameters: safetensors itself has no check sum."""
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        leaf = tensors[name]
        found.update(f"{name} {leaf.dtype} {tuple(leaf.shape)}".encode())
        found.update(leaf.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _header(data: bytes) -> dict[str, Any]:
    """Our part of the header: its length in 8 bytes, then JSON."""
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= len(data) - 8:
        raise ValueError("it does not begin as a safetensors file")
    whole = json.loads(data[8 : 8 + length])
    told = whole.get("__metadata__", {}).get("fnreg") if isinstance(whole, dict) else None
    if not isinstance(told, str):
        raise ValueError("it has no header of fnreg")
    header = json.loads(told)
    if not isinstance(header, dict):
        raise ValueError("its header is not a table")
    return header


def _renamed(transform: Any) -> Any:
    """A transform as plain data with the names of today: the squarings of a flow were `steps` once."""
    if isinstance(transform, list):
        return [_renamed(part) for part in transform]
    if not isinstance(transform, dict):
        return transform
    flow = transform.get("type") in ("SVF", "SVFFD")
    return {"squarings" if flow and name == "steps" else name: _renamed(value) for name, value in transform.items()}


def _params(transform: Transform, domain: Domain, tensors: dict[str, Tensor]) -> Any:
    """The tensors in the structure that the transform's parameters have; ValueError where they do not fit."""
    # On a device without memory: a header of some bytes may claim a field of terabytes.
    expected = transform.init(tree_map(lambda leaf: leaf.to("meta"), single(domain)))
    names = _names(expected)
    if set(names) != set(tensors):
        raise ValueError(f"its parameters are {sorted(tensors)} but {transform} has {sorted(names)}")
    leaves, spec = tree_flatten(expected)
    for name, leaf in zip(names, leaves, strict=True):
        shape = tensors[name].shape
        if leaf.shape not in (shape, shape[1:]):
            raise ValueError(f"parameter {name} has shape {tuple(shape)}: expected {tuple(leaf.shape)}")
        if not tensors[name].dtype.is_floating_point or not bool(torch.isfinite(tensors[name]).all()):
            raise ValueError(f"parameter {name} is not made of finite numbers")
    return tree_unflatten([tensors[name] for name in names], spec)
