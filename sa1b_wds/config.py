"""Options of every command: one schema each, from a TOML file and the command line, checked key by key.

A file has a section a command. The command line wins over the file, the file over the defaults that stand here. Two
things need saying only once: `[convert]` takes what it lacks from `[plan]` (it plans first), and a command that works
on a data set takes `out` of `[plan]` for its `dest`.

Every mistake is one line, with the file and the key:

    configs/x.toml: convert.workers: expected int >= 1, found str "four"
    configs/x.toml: convert.wrokers: unknown key, did you mean workers?
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

import msgspec
from msgspec import Meta, Struct, inspect

from .errors import ConfigError, Sa1bError, UsageError
from .limits import Limits

__all__ = [
    "SECTIONS", "Convert", "Export", "Finalize", "Plan", "Restore", "Section", "Size", "Stats", "Status", "Stream",
    "Synth", "Verify", "limits", "load", "parse_size", "section",
]  # fmt: skip

_UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
}  # fmt: skip


def parse_size(text: str | int) -> int:
    """Bytes of "512MiB", "1.5 GiB", "100MB", "4096" or 4096.

    Raises:
        ValueError: anything else; the message says what a size looks like.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", str(text).strip())
    if isinstance(text, bool) or not found or found[2] not in _UNITS or ("." in found[1] and not found[2]):
        raise ValueError(f"not a size: {text!r}; write 512MiB, 1GiB, 100MB or whole bytes")
    whole, _, part = found[1].partition(".")
    unit = _UNITS[found[2]]
    return int(whole) * unit + (int(part) * unit // 10 ** len(part) if part else 0)


class Size(int):
    """Bytes, written as `parse_size` reads them."""


Count = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]


# ---- the options -----------------------------------------------------------------------------------------------------


class Section(Struct, frozen=True, kw_only=True):
    """The options of one command."""

    SECTION: ClassVar[str] = ""


class _Planning(Section, frozen=True, kw_only=True):
    sources: list[str] = []
    """Source tars, folders of them, or names with braces; paths, URLs or `pipe:` commands."""
    links: Path | None = None
    """A links file, whose tars are sources too."""
    only: list[str] = []
    """Names of the tars to take of the links file, braces allowed; empty: all."""
    out: str | None = None
    """The data set: a folder."""
    shard_size: Size = Size(1 << 30)
    """Bytes of a shard; moved by up to a tenth so that all are as equal as possible."""
    mix: Count = 4
    """Source tars that a task reads together."""
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    """Of the grouping of sources."""
    max_side: Annotated[int, Meta(ge=16, le=65_535)] | None = None
    """Pixels: longest side of the stored photographs; None: they keep their bytes."""
    quality: Annotated[int, Meta(ge=1, le=100)] = 90
    """JPEG quality of those that are made smaller."""
    exclude: list[str] = []
    """Ids of images to leave out, or files of them."""
    assume_size: Size | None = None
    """Bytes of a source whose size cannot be asked for."""


class Plan(_Planning, frozen=True, kw_only=True):
    SECTION: ClassVar[str] = "plan"

    dry_run: bool = False
    """Print the plan and write nothing."""
    rate: Size | None = None
    """Bytes a second that one task reads, for the estimate; None: as measured, else a cautious guess."""


class Convert(_Planning, frozen=True, kw_only=True):
    SECTION: ClassVar[str] = "convert"

    workers: Count | None = None
    """Processes; None: half the cores. With Ray the most tasks at once; None: all there is room for."""
    engine: Literal["local", "ray"] = "local"
    """What runs the tasks."""
    cpus_per_task: Count = 2
    """Cores that Ray reserves for a task."""
    on_damage: Literal["fail", "salvage"] = "fail"
    """What is done about a source that cannot be read to its end."""
    pairing_buffer: Size = Size(512 << 20)
    """Bytes of members that may wait in memory for their partner, a worker."""
    memory: Size | None = None
    """Bytes that all workers together may have; a plan that does not fit is refused. None: no limit but the machine."""
    scratch: Path | None = None
    """Folder on a local disk where more of them wait; None: $SLURM_TMPDIR, $TMPDIR or /tmp."""
    max_quarantine: Share = 0.001
    """Share of a task's members that may be unusable."""
    delete_source: bool = False
    """Delete each source when its task is done and all of it was found again in the shards."""
    replaced: list[str] = []
    """Names of tars that may be of another size than was planned."""
    log_format: Literal["text", "json"] = "text"
    """What is said while tasks run: sentences, or one JSON object a line."""
    attempts: Count | None = None
    """Requests in a row that bring nothing before giving up; None: $SA1B_WDS_ATTEMPTS, or 8."""
    first_wait: Seconds | None = None
    """Seconds: bound of the first, random pause between them, which doubles; None: $SA1B_WDS_FIRST_WAIT, or 0.25."""
    longest_wait: Seconds | None = None
    """Seconds: bound of any pause; None: $SA1B_WDS_LONGEST_WAIT, or 30."""
    stall: Seconds | None = None
    """Seconds without a byte after which a connection is dead; None: $SA1B_WDS_STALL, or 30."""
    window: Size | None = None
    """Bytes of a request while reading ahead, at most; None: $SA1B_WDS_WINDOW, or 8 MiB."""
    ahead: Size | None = None
    """Bytes read ahead of each source; None: $SA1B_WDS_AHEAD, or 32 MiB."""
    connections: Count | None = None
    """Requests of a process to one server at once; None: $SA1B_WDS_CONNECTIONS, or 32."""
    hedge: Share | None = None
    """Share of the bytes that may be asked for twice, where answers are late; None: $SA1B_WDS_HEDGE, or 0.05."""


class Status(Section, frozen=True, kw_only=True):
    SECTION: ClassVar[str] = "status"

    dest: str | None = None
    """The data set."""
    json: bool = False
    """Print JSON."""
    left: bool = False
    """Print the numbers of the tasks that are not done, as --array takes them, and nothing else."""
    watch: bool | Annotated[float, Meta(ge=0.1)] = False
    """Print again and again until all is done; a number: so many seconds apart."""


class Finalize(Section, frozen=True, kw_only=True):
    SECTION: ClassVar[str] = "finalize"

    dest: str | None = None
    """The data set."""
    partial: bool = False
    """Publish without the tasks that are missing."""


class Verify(Section, frozen=True, kw_only=True):
    SECTION: ClassVar[str] = "verify"

    dest: str | None = None
    """The data set."""
    deep: bool = False
    """Parse every member, decode every RLE."""
    against: list[str] = []
    """Source tars whose every member must be found again."""
    workers: Count = 1
    """Processes."""


class Restore(Section, frozen=True, kw_only=True):
    SECTION: ClassVar[str] = "restore"

    dest: str | None = None
    """The data set."""
    out: Path | None = None
    """Folder for the tars."""
    json_only: bool = False
    """Leave the photographs out."""


class Export(Section, frozen=True, kw_only=True):
    SECTION: ClassVar[str] = "export"

    dest: str | None = None
    """The data set."""
    out: Path | None = None
    """A folder for shards, else a file."""
    annotations_only: bool = False
    """Shards without the images."""
    parquet: bool = False
    """Numbers, one row a mask."""
    coco: bool = False
    """One COCO JSON."""
    split: str = "train"
    """Which samples, in TFDS' slice notation."""
    workers: Count = 1
    """Processes."""
    check: bool = False
    """Read every sample whole, and hold it against its CRC-32."""


class Stats(Section, frozen=True, kw_only=True):
    SECTION: ClassVar[str] = "stats"

    dest: str | None = None
    """The data set."""
    json: bool = False
    """Print JSON."""


class Synth(Section, frozen=True, kw_only=True):
    SECTION: ClassVar[str] = "synth"

    out: Path | None = None
    """Folder for the tars."""
    tars: Count = 2
    """How many."""
    samples: Count = 100
    """Images a tar."""
    plain: bool = False
    """No gzip."""
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    """The same seed gives the same bytes."""
    workers: Count = 1
    """Processes."""


class Stream(Section, frozen=True, kw_only=True):
    SECTION: ClassVar[str] = "stream"

    dest: str | None = None
    """The data set."""
    batch_size: Count = 8
    """Images a batch and rank."""
    image_size: Count = 1024
    """Longest side of an image, in pixels."""
    mask_size: Count = 256
    """Side of a mask, in pixels."""
    masks_per_image: Count | None = 64
    """Masks drawn of an image; None: all."""
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    """Of the order and of the choice of masks."""
    threads: Count | None = None
    """Decode threads; None: one a core."""
    drop_last: bool = True
    """Leave out the last, incomplete batch."""
    attempts: Count | None = None
    """Requests in a row that bring nothing before giving up; None: $SA1B_WDS_ATTEMPTS, or 8."""
    first_wait: Seconds | None = None
    """Seconds: bound of the first, random pause between them, which doubles; None: $SA1B_WDS_FIRST_WAIT, or 0.25."""
    longest_wait: Seconds | None = None
    """Seconds: bound of any pause; None: $SA1B_WDS_LONGEST_WAIT, or 30."""
    stall: Seconds | None = None
    """Seconds without a byte after which a connection is dead; None: $SA1B_WDS_STALL, or 30."""
    connections: Count | None = None
    """Requests of a process to one server at once; None: $SA1B_WDS_CONNECTIONS, or 32."""
    hedge: Share | None = None
    """Share of the bytes that may be asked for twice, where answers are late; None: $SA1B_WDS_HEDGE, or 0.05."""
    cache: Path | None = None
    """Folder on the node's own disk that keeps what was read from far away; None: nothing is kept."""
    cache_size: Size | None = None
    """Bytes that this folder may take."""


SECTIONS: dict[str, type[Section]] = {
    schema.SECTION: schema
    for schema in (Plan, Convert, Status, Finalize, Verify, Restore, Export, Stats, Synth, Stream)
}
"""By name: every section that a file may have."""

NETWORK = tuple(field.name for field in fields(Limits))
"""The options of how the network is used."""


def limits(options: Convert | Stream, environment: Mapping[str, str]) -> Limits:
    """How objects are read, by these options, where they say nothing by the environment's, else by the defaults.

    Raises:
        ConfigError: a variable that is no positive number.
    """
    return Limits.of(environment, **{name: getattr(options, name, None) for name in NETWORK})


S = TypeVar("S", bound=Section)


# ---- reading them ----------------------------------------------------------------------------------------------------


def load(file: Path | None, schema: type[S], /, **given: object) -> S:
    """All options of one command.

    Args:
        file: a TOML file, or None.
        schema: `Convert`, `Verify`, …
        given: what the command line says; None where it says nothing.

    Raises:
        ConfigError: the file cannot be read, or a key in any of its sections is unknown or of the wrong type.
        UsageError: a value of `given` is of the wrong type; names the option (`--shard-size`).
    """
    values = section(file, schema.SECTION) if file is not None else {}
    types = _types(schema)
    for key, value in given.items():
        if value is not None:
            values[key] = _checked(value, types[key], lambda _, key=key: ("--" + key.replace("_", "-"), ""), UsageError)
    return schema(**values)


def section(file: Path, name: str) -> dict[str, Any]:
    """What the file says for one command: the keys that are there, checked and in the types of the schema.

    Raises:
        ConfigError: as `load`. All sections are checked, not this one alone.
    """
    tables = {key: _table(file, key, table) for key, table in _parse(file).items()}
    fields = SECTIONS[name].__struct_fields__
    planned = tables.get("plan", {})
    found = {key: planned[key] for key in fields if key in planned} if name == "convert" else {}
    if "dest" in fields and "out" in planned:
        found["dest"] = planned["out"]
    return found | tables.get(name, {})


def _parse(file: Path) -> dict[str, object]:
    try:
        return tomllib.loads(file.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ConfigError(str(file), f"cannot be read: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(file), f"is not UTF-8, at byte {error.start:,}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(file), f"is not TOML: {' '.join(str(error).split())}") from error


def _table(file: Path, name: str, table: object) -> dict[str, Any]:
    if name not in SECTIONS:
        if not isinstance(table, dict):
            homes = _homes(name)
            raise ConfigError(
                str(file), f"{name}: stands in no section" + (f"; it belongs in {homes}" if homes else "")
            )
        raise ConfigError(str(file), f"[{name}]: unknown section, {_hint(name, SECTIONS)}")
    if not isinstance(table, dict):
        raise ConfigError(str(file), name, "a section", _shown(table))
    types = _types(SECTIONS[name])
    found = {}
    for key, value in table.items():
        if key not in types:
            homes = _homes(key)
            what = f"unknown key; it belongs in {homes}" if homes else f"unknown key, {_hint(key, types)}"
            raise ConfigError(str(file), f"{name}.{key}: {what}")
        found[key] = _checked(value, types[key], lambda path, key=key: (str(file), f"{name}.{key}{path}"), ConfigError)
    return found


def _types(schema: type[Section]) -> dict[str, Any]:
    hints = get_type_hints(schema, include_extras=True)
    return {name: hints[name] for name in schema.__struct_fields__}


def _homes(key: str) -> str:
    return " or ".join(f"[{name}]" for name, schema in SECTIONS.items() if key in schema.__struct_fields__)


def _hint(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"


def _checked(value: Any, kind: Any, place: Any, error: type[Sa1bError]) -> Any:
    try:
        return msgspec.convert(value, kind, dec_hook=_special)
    except msgspec.ValidationError as problem:
        path = str(problem).partition(" - at `$")[2].rstrip("`")
        for step in re.findall(r"\[(\d+)\]", path):
            value, kind = value[int(step)], inspect.type_info(kind)
            kind = kind.item_type
        where, what = place(path)
        raise error(where, what or "wrong value", _expected(kind), _shown(value)) from problem


def _special(kind: type, value: object) -> object:
    if kind is Size and isinstance(value, str | int):
        size = parse_size(value)
        if size > 0:
            return Size(size)
    if kind is Path and isinstance(value, str | Path) and value != "":  # "" would be the folder one is in
        return Path(value)
    raise ValueError("of another type")


def _expected(kind: Any) -> str:
    """A type as a user would say it."""
    match info := kind if isinstance(kind, inspect.Type) else inspect.type_info(kind):
        case inspect.UnionType():
            return " or ".join(_expected(part) for part in info.types if not isinstance(part, inspect.NoneType))
        case inspect.CustomType():
            return "a path" if info.cls is Path else "a size such as 512MiB"
        case inspect.LiteralType():
            return " or ".join(json.dumps(value) for value in info.values)
        case inspect.ListType():
            return f"list of {_expected(info.item_type)}"
        case inspect.IntType() | inspect.FloatType():
            name = "int" if isinstance(info, inspect.IntType) else "float"
            limits = ((">=", info.ge), (">", info.gt), ("<=", info.le))
            return " ".join(
                [name, " and ".join(f"{sign} {limit:,}" for sign, limit in limits if limit is not None)]
            ).strip()
        case inspect.StrType():
            return "str"
        case inspect.BoolType():
            return "bool"
    raise TypeError(f"no word for {kind}")


def _shown(value: object) -> str:
    """A value with its type, as TOML has it."""
    if isinstance(value, str | bool | int | float):
        return f"{type(value).__name__} {json.dumps(value, ensure_ascii=False)}"
    return {"dict": "a section", "list": "a list"}.get(type(value).__name__, f"{type(value).__name__} {value}")
