"""The facts of a converted data set: a receipt for each task, and the manifest that `finalize` makes of them.

Both hold deterministic facts only (no times, hosts or paths), so the same sources and plan give the same bytes. The
manifest's last field is the SHA-256 of its own bytes with that field as 64 zeros; together with the digests it lists,
no byte below the destination can change unnoticed.
"""

import hashlib
from typing import TypeVar

import msgspec

from .errors import FormatError
from .format import FORMAT
from .plan import Recoding

RECEIPT_FORMAT = "sa1b-wds-receipt/1"
MANIFEST_NAME = "manifest.json"
PLAN_NAME = "plan.json"
KEYS_NAME = "index/keys.bin"


EXPORT_NAME = "export.json"
"""What takes the plan's place in an export of annotations."""


def exported_name(part: int) -> str:
    """The receipt of a shard of an export."""
    return f"receipts/shard-{part:06d}.json"


def receipt_name(task: int) -> str:
    return f"receipts/task-{task:06d}.json"


def quarantine_stem(task: int) -> str:
    return f"quarantine/task-{task:06d}"


def quarantine_names(task: int) -> tuple[str, str]:
    """What a task rejected: the members, and the list of them with the reasons."""
    return f"{quarantine_stem(task)}.members", f"{quarantine_stem(task)}.jsonl"


def side_names(shard: str) -> tuple[str, str, str]:
    """The files that are written with a shard: Energon's index, the rows, DALI's index."""
    stem = shard.removesuffix(".tar")
    return f"{shard}.idx", f"index/{stem}.rows", f"index/{stem}.idx"


class FileFact(msgspec.Struct, frozen=True, kw_only=True):
    """A file beside the shards, and what it must be."""

    name: str
    """Relative to the destination."""
    bytes: int
    sha256: str


class ShardFact(msgspec.Struct, frozen=True, kw_only=True):
    """A shard, and what it must be."""

    name: str
    bytes: int
    samples: int
    annotations: int
    area_mismatches: int
    """Annotations whose stated area is not that of their RLE; they are kept as the source has them."""
    stored_sources: int
    """Samples that carry their document beside the columns."""
    sha256: str
    files: list[FileFact]
    """Its side files."""


class SkippedFact(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of a damaged source that salvage passed over."""

    byte: int
    """Of the tar, inflated."""
    bytes: int
    reason: str


class SourceFact(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of a source: members = 2 · samples + quarantined + all ignored + excluded."""

    name: str
    members: int
    samples: int
    quarantined: int
    ignored: dict[str, int]
    """How many of each kind: `directory`, `hidden`, a suffix, or `other` beyond 50 kinds."""
    skipped: list[SkippedFact]
    greatest_distance: int
    """Members from the first of a pair to the second, at most."""
    excluded: int = 0
    """Of images that the plan leaves out; not written where there are none."""


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """A task is done when this exists."""

    format: str
    plan: str
    """SHA-256 of plan.json."""
    task: int
    on_damage: str
    sources: list[SourceFact]
    shards: list[ShardFact]
    quarantine: list[FileFact]

    def to_bytes(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"


class Totals(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sums over the data set."""

    shards: int
    samples: int
    annotations: int
    bytes: int
    """Of the shards."""
    members: int
    """Seen in the sources."""
    quarantined: int
    ignored: int
    skipped_bytes: int
    area_mismatches: int
    stored_sources: int
    excluded: int = 0


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The only truth about a data set."""

    format: str
    plan: str
    """SHA-256 of plan.json."""
    totals: Totals
    missing_tasks: list[int]
    """Only where it was published with `--partial`."""
    sources: list[SourceFact | None]
    """In the plan's order, which is what a row's `source` counts in; null for those of missing tasks."""
    shards: list[ShardFact]
    files: list[FileFact]
    """Every other file below the destination."""
    recoding: Recoding | None = None
    """The plan's, where photographs were made smaller; else left out."""
    members: list[str] | None = None
    """Suffixes of a sample's members, where they are not `jpg` and `safetensors`; else left out."""
    digest: str
    """SHA-256 of the manifest's bytes with this as 64 zeros."""

    @property
    def has_images(self) -> bool:
        return self.members is None

    def to_bytes(self) -> bytes:
        """The manifest as it is written, its digest filled in."""
        blank = msgspec.structs.replace(self, digest=_BLANK)
        text = msgspec.json.format(msgspec.json.encode(blank), indent=1) + b"\n"
        return _with_digest(text, hashlib.sha256(text).hexdigest())


_BLANK = "0" * 64


def _with_digest(text: bytes, digest: str) -> bytes:
    head, mark, tail = text.rpartition(b'"digest": "')
    return head + mark + digest.encode() + tail[64:]


def totals(sources: list[SourceFact], shards: list[ShardFact]) -> Totals:
    return Totals(
        shards=len(shards),
        samples=sum(s.samples for s in shards),
        annotations=sum(s.annotations for s in shards),
        bytes=sum(s.bytes for s in shards),
        members=sum(s.members for s in sources),
        quarantined=sum(s.quarantined for s in sources),
        ignored=sum(sum(s.ignored.values()) for s in sources),
        excluded=sum(s.excluded for s in sources),
        skipped_bytes=sum(k.bytes for s in sources for k in s.skipped),
        area_mismatches=sum(s.area_mismatches for s in shards),
        stored_sources=sum(s.stored_sources for s in shards),
    )


T = TypeVar("T")


def _decode(data: bytes, kind: type[T], where: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError(where, f"not a {kind.__name__.lower()} of this project: {error}") from None


def load_receipt(data: bytes, where: str) -> Receipt:
    """Raises: FormatError."""
    receipt = _decode(data, Receipt, where)
    if receipt.format != RECEIPT_FORMAT:
        raise FormatError(where, "a receipt this release does not know", RECEIPT_FORMAT, receipt.format)
    return receipt


def load_manifest(data: bytes, where: str) -> Manifest:
    """A manifest from its bytes, its digest checked and its names safe to join to a folder.

    Raises:
        FormatError: not a manifest, a version this release does not know, changed, or with a name that leads out.
    """
    manifest = _decode(data, Manifest, where)
    if manifest.format != FORMAT:
        raise FormatError(where, "a format this release does not know", FORMAT, manifest.format)
    found = hashlib.sha256(_with_digest(data, _BLANK)).hexdigest()
    if found != manifest.digest or _with_digest(data, manifest.digest) != data:
        raise FormatError(where, "its bytes have changed (digest)", manifest.digest, found)
    side_files = [f.name for s in manifest.shards for f in s.files]
    for name in (*(s.name for s in manifest.shards), *side_files, *(f.name for f in manifest.files)):
        if name.startswith("/") or ".." in name.split("/") or ":" in name or "\\" in name:
            raise FormatError(where, "a name that leads out of the data set", found=repr(name))
    return manifest
