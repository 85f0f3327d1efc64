"""Options from a TOML file: `--config FILE` of every command.

A file has a table for each command. Decoding is validation: an unknown key or a wrong type is one line that names the
file, the key's path, what was expected and what was found. What stands on the command line wins.
"""

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from .errors import ConfigError

_UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}

Size = str | int
Count = Annotated[int, msgspec.Meta(ge=1)]
Seed = Annotated[int, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Synth(_Section):
    """[synth]"""

    out: str | None = None
    tars: Count | None = None
    samples: Count | None = None
    plain: bool | None = None
    seed: Seed | None = None
    workers: Count | None = None


class Plan(_Section):
    """[plan]; `convert` takes these too, so they are written once."""

    sources: list[str] | None = None
    out: str | None = None
    shard_size: Size | None = None
    mix: Annotated[int, msgspec.Meta(ge=1, le=64)] | None = None
    seed: Seed | None = None
    assume_size: Size | None = None


class Convert(_Section):
    """[convert]"""

    workers: Count | None = None
    engine: Literal["local"] | None = None
    on_damage: Literal["fail", "salvage"] | None = None
    pairing_buffer: Size | None = None
    scratch: str | None = None
    max_quarantine: Share | None = None


class Finalize(_Section):
    """[finalize]"""

    partial: bool | None = None


class Verify(_Section):
    """[verify]"""

    deep: bool | None = None
    against: list[str] | None = None
    workers: Count | None = None


class Restore(_Section):
    """[restore]"""

    out: str | None = None


class Stats(_Section):
    """[stats]"""

    json: bool | None = None


class Status(_Section):
    """[status]"""

    json: bool | None = None


class File(_Section):
    """A config file."""

    synth: Synth = msgspec.field(default_factory=Synth)
    plan: Plan = msgspec.field(default_factory=Plan)
    convert: Convert = msgspec.field(default_factory=Convert)
    finalize: Finalize = msgspec.field(default_factory=Finalize)
    verify: Verify = msgspec.field(default_factory=Verify)
    restore: Restore = msgspec.field(default_factory=Restore)
    stats: Stats = msgspec.field(default_factory=Stats)
    status: Status = msgspec.field(default_factory=Status)


def load(path: Path) -> File:
    """A config file, checked.

    Raises:
        ConfigError: it cannot be read, is no TOML, or has an unknown key or a wrong type.
    """
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigError(str(path), (error.strerror or "cannot be read").lower()) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"not TOML: {error}") from None
    _check_names(path, values)
    try:
        loaded = msgspec.convert(values, File)
    except msgspec.ValidationError as error:
        what, _, at = str(error).partition(" - at `$")
        key = at.strip("`").lstrip(".")
        raise ConfigError(f"{path}: {key}" if key else str(path), what[0].lower() + what[1:]) from None
    for name, value in _sizes(values):
        try:
            parse_size(value)
        except ValueError as error:
            raise ConfigError(f"{path}: {name}", str(error)) from None
    return loaded


def section(path: Path, *names: str) -> dict[str, Any]:
    """The options that stand in one or more tables of a file, by name; later tables win.

    Raises:
        ConfigError: see `load`.
    """
    file, found = load(path), {}
    for name in names:
        found |= {k: v for k, v in msgspec.structs.asdict(getattr(file, name)).items() if v is not None}
    return found


def parse_size(text: str | int) -> int:
    """Bytes of `1GiB`, `512MiB`, `10MB` or a plain number; ValueError says what is wrong."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(text), re.ASCII)
    if not match or match[2] not in _UNITS:
        raise ValueError(f'not a size: expected something like "512MiB", found {text!r}')
    size = float(match[1]) * _UNITS[match[2]]
    if size < 1 or size != int(size):
        raise ValueError(f"not a size: expected a whole number of bytes, at least 1, found {text!r}")
    return int(size)


def _check_names(path: Path, values: dict[str, Any]) -> None:
    tables = {f.name: f.type for f in msgspec.structs.fields(File)}
    for table, content in values.items():
        if table not in tables:
            raise ConfigError(f"{path}: {table}", f"unknown key{_like(table, list(tables))}")
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: {table}", "expected a table", f"[{table}]", repr(content))
        known = [f.name for f in msgspec.structs.fields(tables[table])]
        for key in content:
            if key not in known:
                raise ConfigError(f"{path}: {table}.{key}", f"unknown key{_like(key, known)}")


def _like(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f", did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"


def _sizes(values: dict[str, Any]) -> list[tuple[str, Any]]:
    names = ("shard_size", "assume_size", "pairing_buffer")
    return [(f"{t}.{k}", v) for t, content in values.items() for k, v in content.items() if k in names]
