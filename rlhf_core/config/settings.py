"""The base class of every settings class: types and bounds are checked when an object is made.

A setting is a field of a frozen dataclass with a sentence under it. Its type hint holds its bounds, so that one place
serves the check, the error and the help:

    lr: PositiveFloat = 1e-5
    label_smoothing: Annotated[float, Bounds(least=0, below=0.5)] = 0.0
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from rlhf_core.config.renamed import RENAMED

T = TypeVar("T")


class ConfigError(ValueError):
    """An invalid setting. The message has the form `field=value: expected X`."""


def require(condition: bool, field: str, value: object, expected: str) -> None:
    """Raise ConfigError unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{field}={value!r}: expected {expected}")


def require_attributes(field: str, attributes: Sequence[str] | None, expected: str, *, values: bool = False) -> None:
    """Check the attributes of a prompt: each NAME or NAME:VALUE (only the latter with `values`), no name twice."""
    form = r"[^:,\n]+(:[^:,\n]*[^:,\s])" + "?" * (not values)
    right = all(re.fullmatch(form, one) for one in attributes or ())
    names = [one.partition(":")[0] for one in attributes or ()]
    require(right and len({*names}) == len(names), field, attributes, expected)


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """Return "; did you mean X?" with the known name nearest to `name`, or "" if none is near."""
    near = difflib.get_close_matches(str(name), [str(one) for one in known], n=1)
    return f"; did you mean {near[0]}?" if near else ""


# -------------------------------------------------------------------------------------------------- bounds at the field


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The range of a number, or of each number of a tuple: `Annotated[float, Bounds(least=0, below=1)]`."""

    above: float | None = None  # exclusive
    least: float | None = None  # inclusive
    most: float | None = None  # inclusive
    below: float | None = None  # exclusive
    words: str | None = None  # for errors and help, instead of words made from the numbers

    def include(self, number: float) -> bool:
        """Return whether `number` lies within the bounds."""
        return (
            (self.above is None or number > self.above)
            and (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    def text(self, name: str) -> str:
        """Return the bounds in words, for the setting `name`."""
        if self.words is not None:
            return self.words
        if self.most is not None and self.least is not None:
            return f"between {self.least} and {self.most}"
        if self.below is not None or self.most is not None:
            low = (
                f"{self.above} < " if self.above is not None else f"{self.least} <= " if self.least is not None else ""
            )
            return low + name + (f" < {self.below}" if self.below is not None else f" <= {self.most}")
        return f"more than {self.above}" if self.above is not None else f"{self.least} or more"


PositiveInt = Annotated[int, Bounds(above=0)]
NonNegativeInt = Annotated[int, Bounds(least=0)]
PositiveFloat = Annotated[float, Bounds(above=0)]
NonNegativeFloat = Annotated[float, Bounds(least=0)]
AtLeastTwo = Annotated[int, Bounds(least=2)]
LabelSmoothing = Annotated[float, Bounds(least=0, below=0.5)]
Fraction = Annotated[float, Bounds(least=0, most=1)]


class Kind(NamedTuple):
    """What a type hint of a setting means."""

    type: Any  # without None and bounds: int, float, bool, str, Literal[...], tuple[...] or a settings class
    optional: bool
    bounds: Bounds | None

    @property
    def is_group(self) -> bool:
        return dataclasses.is_dataclass(self.type)

    def expected(self, name: str) -> str:
        """Return the bounds of the setting `name` in words; "" if it has none."""
        return "" if self.bounds is None else self.bounds.text(name) + ", or none" * self.optional


def kind_of(hint: Any) -> Kind:
    """Split a type hint: `PositiveInt | None` is an int, optional, with bounds."""
    members = alternatives(hint)
    [kind] = [one for one in members if one is not type(None)]
    plain, bounds = _without_bounds(kind)
    if typing.get_origin(plain) is tuple:
        inner = typing.get_args(plain)
        bounds = next((found for one in inner if (found := _without_bounds(one)[1])), None)
    return Kind(plain, type(None) in members, bounds)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, `int | None` -> (int, NoneType), or a tuple of the type itself."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return typing.get_args(hint)
    return (hint,)


def _without_bounds(hint: Any) -> tuple[Any, Bounds | None]:
    if typing.get_origin(hint) is not Annotated:
        return hint, None
    plain, *notes = typing.get_args(hint)
    return plain, next((note for note in notes if isinstance(note, Bounds)), None)


_KINDS: dict[type, dict[str, Kind]] = {}


def kinds_of(cls: type) -> dict[str, Kind]:
    """Return the kind of every setting of a settings class, by name.

    A field that only changes the default of a base class's field, `batch_size: int = 8`, keeps the bounds of that.
    """
    if cls not in _KINDS:
        inherited = {name: kind for base in reversed(cls.__mro__[1:]) for name, kind in _inherited(base).items()}
        hints = typing.get_type_hints(cls, include_extras=True)
        kinds = {field.name: kind_of(hints[field.name]) for field in dataclasses.fields(cls)}
        for name, kind in kinds.items():
            if kind.bounds is None and name in inherited and inherited[name].type == kind.type:
                kinds[name] = kind._replace(bounds=inherited[name].bounds)
        _KINDS[cls] = kinds
    return _KINDS[cls]


def _inherited(base: type) -> dict[str, Kind]:
    return kinds_of(base) if dataclasses.is_dataclass(base) else {}


# ---------------------------------------------------------------------------------------------------------- the classes


class Settings:
    """Base class of settings. Making an object converts each field to its type and checks its bounds.

    A group that has a `path` may be given as that path alone. A group given as a dictionary replaces only the fields
    it names; the job's defaults of the others stay.
    """

    def __new__(cls, *args: Any, **values: Any) -> Self:
        _check_names(cls, values)  # before __init__, whose TypeError for an old name would not tell the new one
        return super().__new__(cls)

    def __post_init__(self) -> None:
        kinds = kinds_of(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, field.name)
            if isinstance(field.default, Settings):
                value = _as_dict(field.default, value)
            object.__setattr__(self, field.name, _convert(kinds[field.name], value, field.name))


def to_dict(config: Any) -> dict[str, Any]:
    """Return a settings object as nested plain values, as YAML and JSON hold them."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Make a settings object from nested plain values.

    Raises ConfigError for an unknown, renamed or missing name and for a value of the wrong type or out of bounds.
    """
    _check_names(cls, values)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.name not in values:
            raise ConfigError(f"{field.name} is missing")
    return cls(**values)


def _check_names(cls: type, values: Iterable[str]) -> None:
    """Raise ConfigError for a name that is not, or no longer, a setting of the class."""
    kinds = kinds_of(cls)
    for name in values:
        if name not in kinds:
            target = new_name(cls, name)
            reason = f"renamed to {target}" if target else f"no setting of that name{did_you_mean(name, kinds)}"
            raise ConfigError(f"{name}: {reason}")


def new_name(cls: type, name: object) -> str | None:
    """Return what a setting of this name was renamed to in the class; None if it was not."""
    target = RENAMED.get(str(name))
    if target is None:
        return None
    group, *fields = re.split(r"[=,]", target)[0].split(".")
    kind = kinds_of(cls).get(group)
    known = kind is not None and (not fields or (kind.is_group and fields[0] in kinds_of(kind.type)))
    return target if known else None


# ----------------------------------------------------------------------------------------------------------- conversion


def _as_dict(default: Settings, value: Any) -> Any:
    """Return a group that was given in part as a dictionary, with the job's own defaults for the rest."""
    if "path" in kinds_of(type(default)) and (value is None or isinstance(value, str | Path)):
        value = {"path": value}
    return to_dict(default) | value if isinstance(value, dict) else value


def _convert(kind: Kind, value: Any, name: str) -> Any:
    """Convert a value from Python, YAML or the command line to the field's type; ConfigError if it is invalid."""
    alone = value.get("path") if isinstance(value, dict) else value  # --eval-data none switches off a file's group
    if kind.optional and (value is None or alone in ("none", "None", "null")):
        return None
    if kind.is_group:
        return _convert_group(kind.type, value, name)
    origin = typing.get_origin(kind.type)
    if origin is Literal:
        choices = typing.get_args(kind.type)
        require(value in choices, name, value, "one of " + ", ".join(map(str, choices)))
        return value
    converted = _convert_tuple(kind.type, value, name) if origin is tuple else _convert_plain(kind.type, value, name)
    if kind.bounds is not None:
        numbers = converted if isinstance(converted, tuple) else (converted,)
        require(all(map(kind.bounds.include, numbers)), name, converted, kind.expected(name))
    return converted


def _convert_group(cls: type, value: Any, name: str) -> Any:
    if isinstance(value, cls):
        return value
    if isinstance(value, str | Path) and "path" in kinds_of(cls):
        value = {"path": value}
    if isinstance(value, str) and RENAMED.get(name, "").startswith(f"{name}."):
        raise ConfigError(f"{name}={value!r}: renamed to {RENAMED[name]}")
    require(isinstance(value, dict), name, value, "a group of settings")
    try:
        return from_dict(cls, value)
    except ConfigError as error:
        raise ConfigError(f"{name}.{error}") from None


def _convert_tuple(hint: Any, value: Any, name: str) -> tuple[Any, ...]:
    items = split_list(value) if isinstance(value, str) else value
    inner = typing.get_args(hint)
    if inner[-1] is Ellipsis:  # any number of items; one may stand alone
        items = items if isinstance(items, list | tuple) else [items]
        require(len(items) > 0, name, value, "one or more, separated by commas")
        inner = inner[:1] * len(items)
    require(isinstance(items, list | tuple) and len(items) == len(inner), name, value, f"{len(inner)} numbers")
    return tuple(_convert_plain(_without_bounds(one)[0], item, name) for one, item in zip(inner, items, strict=True))


def _convert_plain(kind: type, value: Any, name: str) -> bool | str | int | float:
    if kind is bool:
        require(isinstance(value, bool), name, value, "true or false")
        return bool(value)
    if kind is str:
        require(isinstance(value, str | int | float | Path) and not isinstance(value, bool), name, value, "a text")
        return str(value)
    try:  # YAML reads 5e-6 as a text
        number = float("nan" if isinstance(value, bool) else value)
        if not math.isfinite(number) or (kind is int and not number.is_integer()):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name}={value!r}: expected {'a whole' if kind is int else 'a finite'} number") from None
    if kind is float:
        return number
    return int(value) if isinstance(value, int) or str(value).isdecimal() else int(number)  # a float holds 53 bits


def split_list(text: str) -> list[str]:
    """Split at commas. A backslash before a comma makes it part of an item."""
    return [part.replace("\\,", ",") for part in re.split(r"(?<!\\),", text)]
