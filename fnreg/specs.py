"""A choice as text, a name with options such as `adam:lr=0.3`: parsed, checked, and made a value.

This module does not import torch until values are made.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from fnreg.losses.objective import Term


class SettingsError(ValueError):
    """A setting is unknown, misspelt or out of range."""


def choose(what: str, name: str, choices: Iterable[str]) -> str:
    """The name if it is one of the choices; else SettingsError that lists them and guesses what was meant."""
    known = list(choices)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, 1, 0.7)
    near = near or [one for one in known if len(name) > 2 and one.startswith(name)][:1]
    hint = f"did you mean {near[0]}? " if near else ""
    raise SettingsError(f"unknown {what} {name!r}: {hint}choose from {', '.join(known)}")


WORDY = ("similarity", "optimizer")  # whose options may be words
Option = float | bool | str | tuple[float, ...]


def parse_spec(what: str, text: str) -> tuple[str, dict[str, Option]]:
    """A name with options: `ffd:stride=4x8` gives ("ffd", {"stride": (4.0, 8.0)}), one number or one per axis, and of
    `WORDY` settings words, `lncc:window=gaussian`."""
    name, colon, rest = text.strip().partition(":")
    options: dict[str, Option] = {}
    for part in rest.split(",") if colon else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        try:
            options[key] = _option(value, words=what in WORDY)
        except ValueError:
            equals = ""
        if not (key and equals):
            raise SettingsError(
                f"{what} {text!r}: expected NAME or NAME:option=value,option=value, such as adam:lr=0.3"
            )
    return name.strip(), options


def _option(text: str, *, words: bool) -> Option:
    if text in ("true", "false"):
        return text == "true"
    if words and text.replace("-", "").isalpha() and text not in ("inf", "nan"):
        return text
    numbers = tuple(float(part) for part in text.split("x"))
    return numbers[0] if len(numbers) == 1 else numbers


def make(what: str, text: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """factory(**options), with errors that name the setting."""
    kinds = _kinds(factory)
    for name in options:
        if name not in kinds:
            told = ", ".join(kinds) if kinds else "none"
            raise SettingsError(f"{what} {text!r} has no option {name!r}: its options are {told}")
    options = {name: _of_kind(f"{what} {text!r}: {name}", value, kinds[name]) for name, value in options.items()}
    try:
        return factory(**options)
    except (TypeError, ValueError) as problem:
        raise SettingsError(f"{what} {text!r}: {problem}") from None


def _kinds(factory: Any) -> dict[str, str | tuple[str, ...]]:
    """The options of a dataclass or a term, with what each takes: its annotation, or the words to choose from."""
    if isinstance(factory, type):
        hints = get_type_hints(factory)
        fields = {field.name: str(field.type) for field in dataclasses.fields(factory)}
        return {
            name: get_args(hints[name]) if get_origin(hints[name]) is Literal else kind for name, kind in fields.items()
        }
    found: dict[str, str | tuple[str, ...]] = {}
    parameters, hints = inspect.signature(factory.function).parameters, get_type_hints(factory.function)
    for name in factory.known_options:
        hint = hints.get(name)
        if get_origin(hint) is Literal:
            found[name] = get_args(hint)
        else:
            own = name in parameters  # else it is `channel`, one or several
            found[name] = str(parameters[name].annotation) if own else "Stride"
    return found


def _of_kind(told: str, value: Option, kind: str | tuple[str, ...]) -> Any:
    """The value of an option as its annotation wants it: numbers come as floats."""
    if isinstance(kind, tuple):
        if value not in kind:
            raise SettingsError(f"{told} is {value}: choose from {', '.join(kind)}")
        return value
    kind = kind.removesuffix(" | None")
    several, switch = isinstance(value, tuple), isinstance(value, bool)
    if isinstance(value, str) or switch != (kind == "bool") or (several and kind != "Stride"):
        expected = {"bool": "true or false", "Stride": "whole numbers", "int": "a whole number"}.get(kind, "a number")
        raise SettingsError(f"{told} is {value}: expected {expected}")
    if kind not in ("int", "Stride"):
        return value
    numbers = value if isinstance(value, tuple) else (value,)
    if not all(number.is_integer() for number in map(float, numbers)):
        raise SettingsError(f"{told} is {value}: expected {'whole numbers' if kind == 'Stride' else 'a whole number'}")
    whole = tuple(int(number) for number in numbers)
    return whole if several else whole[0]


def try_term(told: str, term: Term) -> None:
    """SettingsError for options that a similarity refuses, which it does when it is called."""
    import torch

    ramp = torch.arange(16.0).reshape(1, 4, 4)
    try:
        term.function(ramp, ramp, **{name: value for name, value in term.options if name in term.own_options})
    except (TypeError, ValueError) as problem:
        raise SettingsError(f"{told}: {problem}") from None
