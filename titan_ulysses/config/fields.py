"""The kinds of values of settings, their rules, and the base class of all sections."""

from __future__ import annotations

import math
import os
import re
import sysconfig
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import core_schema


def expand_path(path: str) -> str:
    """Expand `~`, `$VARS` and `{stdlib}` in a path.

    `{stdlib}` is the folder of Python's standard library, which is real text that every machine
    has.
    """
    return os.path.expanduser(
        os.path.expandvars(path.replace("{stdlib}", sysconfig.get_path("stdlib")))
    )


def _possible_names(path: str) -> str:
    """Return a path. Raise `ValueError` if no file system takes a name in it."""
    if any(len(name.encode(errors="replace")) > 255 for name in path.split("/")):
        raise ValueError("a file or folder must have a name of at most 255 bytes")
    return path


def below(folder: str) -> AfterValidator:
    """Return a check of a path: it stays in the folder that it begins in, on any system."""

    def check(name: str) -> str:
        parts = name.replace("\\", "/").split("/")
        is_drive = len(parts[0]) == 2 and parts[0].endswith(":")
        if is_drive or {"", ".", ".."} & {part.strip() for part in parts}:
            raise ValueError(f"needs a relative path below {folder}, without '.' and '..'")
        return name

    return AfterValidator(check)


def _printable(name: str) -> str:
    """Return a name. Raise `ValueError` if it has characters that a terminal obeys, such as ESC."""
    if any(unicodedata.category(character) == "Cc" for character in name):
        raise ValueError("must not contain control characters")
    return name


@dataclass(frozen=True, eq=False)
class NamedValues:
    """Names that may be written for values of a setting, for example "auto" for -1."""

    values: dict[str, Any]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self.value_of, handler(source))

    def value_of(self, given: Any) -> Any:
        return self.values.get(given, given) if isinstance(given, str) else given


class Switch(NamedValues):
    """Lets a setting of words also be `true`, for the word `on`, or `false`, for "off"."""

    def __init__(self, on: str) -> None:
        super().__init__({"true": on, "false": "off"})

    def value_of(self, given: Any) -> Any:
        return self.values.get(str(given).lower(), given)


class Needs:
    """A rule of a setting: what another setting must be where this one is not at its default.

    It stands in the field of that setting (see `setting`). `other` is a "section.key", or a key of
    the same table. values are what it may be; without any, it must not be at its default. text is
    the message for the user, in which `{this}` and `{other}` are the settings with their values
    (see `rules.broken_rules`). of: the values of this setting to which the rule applies, instead of
    all but its default. where: a condition on the table of this setting.
    """

    def __init__(
        self,
        other: str,
        *values: Any,
        text: str,
        of: tuple[Any, ...] | None = None,
        where: Callable[[Any], bool] = lambda table: True,
    ):
        self.other, self.values, self.text, self.of, self.where = other, values, text, of, where

    def allows(self, value: Any, default: Any) -> bool:
        """Return whether the other setting, which has this default, may have this value."""
        return value in self.values if self.values else value != default


class Excludes(Needs):
    """The same with values that the other setting must not have; none: all but its default."""

    def allows(self, value: Any, default: Any) -> bool:
        return not super().allows(value, default)


_RULES = "rules"


def setting(default: Any, *rules: Needs, **bounds: Any) -> Any:
    """Return the field of a setting, with its rules; bounds are keywords of pydantic's `Field`."""
    extra: Any = {_RULES: rules}  # pydantic's type allows only what JSON has; we write no schema
    return Field(default, json_schema_extra=extra, **bounds)


def rules_of(field: FieldInfo) -> tuple[Needs, ...]:
    """Return the rules of a setting, in their order."""
    extra: Any = field.json_schema_extra
    return extra[_RULES] if extra else ()


def _positive_or_derived(value: int) -> int:
    if value < 1 and value != -1:
        raise ValueError('must be at least 1, or "auto" (-1) to derive it')
    if value > _MOST_RANKS:
        raise ValueError(f"must be at most {_MOST_RANKS}")
    return value


def _seconds_or_derived(value: float) -> float:
    if value < LEAST_TIMEOUT and value != -1:
        raise ValueError(f'must be at least {LEAST_TIMEOUT}, or "auto" (-1) to derive it')
    return value


def _interval(value: Any) -> int | float | str:
    """Return steps as an int, a share of the run as a float, or "epoch" or "0.5 epoch"."""
    shown = str(value).strip()
    number = shown.removesuffix("epoch").strip()
    try:
        found = 1.0 if not number and shown else float(number)
    except ValueError:
        found = 0.0
    if shown.endswith("epoch") and 0 < found <= 1e6:
        return shown
    if isinstance(value, bool) or not (0 < found < 1 or (found >= 1 and found == int(found))):
        raise ValueError(
            'needs a number of steps, a share of the run such as 0.1, "epoch", or "0.5 epoch"'
        )
    if found > 1e9:
        raise ValueError("must be at most 1000000000")
    return found if found < 1 else int(found)


def _core_name(name: str) -> str:
    if name not in CORES and not _FUNCTION.fullmatch(name):
        raise ValueError(f"needs one of {', '.join(CORES)}, or package.module:function")
    return name


_MOST_RANKS = 2**20
LEAST_TIMEOUT = 3
"""Seconds. A rank gives a sign of life every second: less would end runs that are well."""
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
"""package.module:function"""
CORES = ("auto", "varlen", "flash", "flex", "sdpa")
"""Names of the attention cores, which are functions in ulysses/cores.py.

"auto" takes the first of the others that can run this model here, and flex only for soft-caps,
because its block mask grows with the square of the length.
"""
CoreName = Annotated[str, AfterValidator(_core_name)]
PathText = Annotated[str, AfterValidator(expand_path), AfterValidator(_possible_names)]
FolderName = Annotated[str, AfterValidator(_possible_names), AfterValidator(_printable)]
FolderOfRun = Annotated[FolderName, below("the run's folder")]
TileTokens = Annotated[int, Field(ge=-1, le=2**31 - 1), NamedValues({"auto": 0, "all": -1})]
ChunkTokens = Annotated[int, Field(ge=-1, le=2**31 - 1), NamedValues({"auto": 0, "off": -1})]
PositiveOrDerived = Annotated[int, AfterValidator(_positive_or_derived), NamedValues({"auto": -1})]
SecondsOrDerived = Annotated[float, AfterValidator(_seconds_or_derived), NamedValues({"auto": -1})]
Interval = Annotated[Any, BeforeValidator(_interval)]
"""Steps (int), a share of the run (float), or "epoch": steps alone once they are counted."""
Beta = Annotated[float, Field(strict=True, ge=0, lt=1)]
Dtype = Literal["float64", "float32", "bfloat16"]


def _problem_of_text(value: Any) -> str | None:
    """Return why a text, or one in a list, can be no path, name or pattern; None if it can."""
    if isinstance(value, list):
        return next(filter(None, map(_problem_of_text, value)), None)
    if not isinstance(value, str):
        return None
    if "\0" in value:
        return "must not contain the character NUL"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return "must be text that can be written in UTF-8"
    return None


def finite(table: dict[str, Any]) -> dict[str, Any]:
    """Return a table. Raise `ValueError` if a number in it, or in a list in it, is inf or nan."""
    for key, value in table.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"needs finite numbers, and {key} is {number}")
    return table


class Section(BaseModel):
    """Base class of all sections.

    Unknown keys are refused, and values cannot change once they are read. inf and nan are refused
    unless a field allows them. The docstring of a field is its description in `--help`.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for field in cls.model_fields.values():
            field.description = " ".join((field.description or "").split())

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: Any) -> Any:
        # pydantic would read true as 1, so that `steps = true` would mean one step.
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in (int, float):
            raise ValueError("needs a number, not true or false")
        if problem := _problem_of_text(value):
            raise ValueError(problem)
        return value
