"""Small sources for tests: jpgs, documents in Meta's form, and tars of any dialect, order and damage."""

import gzip
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import simplejpeg

from sa1b_wds import rle

BLOCK = 512
END = bytes(2 * BLOCK)
Dialect = Literal["ustar", "gnu", "pax", "v7"]
Document = dict[str, Any]


# -------------------------------------------------------------------------------------------------- images, documents


@cache
def jpg(height: int = 24, width: int = 32, seed: int = 0, quality: int = 60) -> bytes:
    """A valid JPEG of noise."""
    pixels = np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, 3), np.uint8)
    encoded: bytes = simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB")
    return encoded


def mask(height: int, width: int, seed: int) -> npt.NDArray[np.uint8]:
    """A rectangle or two somewhere in the image, now and then with pixel (0, 0) in it: 0/1."""
    random = np.random.default_rng([seed, height, width])
    out = np.zeros((height, width), np.uint8)
    for _ in range(int(random.integers(1, 3))):
        y, x = int(random.integers(height)), int(random.integers(width))
        out[y : y + int(random.integers(1, height + 1)), x : x + int(random.integers(1, width + 1))] = 1
    return out


def annotation(seed: int, height: int, width: int, *, ints: bool = False) -> Document:
    """One annotation with a valid RLE, key order and number forms as Meta has them."""
    random = np.random.default_rng([seed, 1])
    drawn = mask(height, width, seed)
    rows, columns = np.nonzero(drawn.any(axis=1))[0], np.nonzero(drawn.any(axis=0))[0]
    box = [columns[0], rows[0], columns[-1] - columns[0], rows[-1] - rows[0]]
    kind = int if ints else float
    return {
        "bbox": [kind(v) for v in box],
        "area": int(drawn.sum()),
        "segmentation": {"size": [height, width], "counts": rle.encode(drawn).decode()},
        "predicted_iou": float(np.float32(random.uniform(0.88, 1.0))),
        "point_coords": [[float(np.float32(random.uniform(0, width))), float(np.float32(random.uniform(0, height)))]],
        "crop_box": [0.0, 0.0, float(width), float(height)],
        "id": int(random.integers(1 << 30)),
        "stability_score": float(np.float32(random.uniform(0.95, 1.0))),
    }


def document(image_id: int, *, height: int = 24, width: int = 32, annotations: int = 3, seed: int = 0) -> Document:
    """A document of SA-1B, as a dict in Meta's key order; one annotation in four has int boxes."""
    base = image_id * 1000 + seed
    return {
        "image": {"image_id": image_id, "width": width, "height": height, "file_name": f"sa_{image_id}.jpg"},
        "annotations": [annotation(base + i, height, width, ints=i % 4 == 3) for i in range(annotations)],
    }


def text(value: Document) -> bytes:
    """A document as Meta wrote it: one line, json.dumps' own separators."""
    return json.dumps(value).encode()


# --------------------------------------------------------------------------------------------------------------- tars


@dataclass(frozen=True)
class Member:
    """A member of a tar; `raw`, where given, stands there instead of everything else."""

    name: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    link: str = ""
    raw: bytes | None = None

    @property
    def key(self) -> str:
        return self.name.rpartition("/")[2].partition(".")[0]


def pair(image_id: int, *, folder: str = "./", annotations: int = 3, height: int = 24, width: int = 32) -> list[Member]:
    """The jpg and the json of an image, that fit each other."""
    made = document(image_id, height=height, width=width, annotations=annotations)
    return [
        Member(f"{folder}sa_{image_id}.jpg", jpg(height, width, image_id % 7)),
        Member(f"{folder}sa_{image_id}.json", text(made)),
    ]


def pairs(ids: Iterable[int], **options: Any) -> list[Member]:
    """The members of many images, each image's two adjacent; sizes differ from image to image."""
    out = []
    for i in ids:
        out += pair(i, **{"annotations": i % 5, "height": 16 + i % 9, "width": 24 + i % 11, **options})
    return out


def header(member: Member, dialect: Dialect = "gnu") -> bytes:
    """Everything that stands before a member's data."""
    information = tarfile.TarInfo(member.name)
    information.size = len(member.data)
    information.type, information.linkname = member.kind, member.link
    information.uid, information.gid, information.mtime = 1234, 100, 1_680_000_000
    if dialect == "pax":
        information.pax_headers = {"comment": "x" * 30}  # or tarfile would write a plain ustar header
    forms: dict[str, Literal[1, 2]] = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
    block = information.tobuf(forms.get(dialect, tarfile.USTAR_FORMAT), "utf-8", "surrogateescape")
    return rewritten(block, {257: bytes(255)}) if dialect == "v7" else block


def rewritten(block: bytes, changes: dict[int, bytes]) -> bytes:
    """A header block with fields replaced (place → bytes), its checksum right again."""
    out = bytearray(block)
    for at, value in changes.items():
        out[at : at + len(value)] = value
    out[148:156] = b" " * 8
    out[148:156] = b"%06o\0 " % sum(out[:BLOCK])
    return bytes(out)


def packed(member: Member, dialect: Dialect = "gnu") -> bytes:
    """A member's headers, data and padding."""
    if member.raw is not None:
        return member.raw
    return header(member, dialect) + member.data + bytes(-len(member.data) % BLOCK)


def tar(
    members: Sequence[Member], *, dialect: Dialect = "gnu", directory: str | None = "./", end: bytes = END
) -> bytes:
    """A tar of these members, with Meta's directory entry in front unless `directory` is None."""
    front = [Member(directory, kind=tarfile.DIRTYPE)] if directory is not None else []
    return b"".join(packed(m, dialect) for m in [*front, *members]) + end


def offsets(members: Sequence[Member], *, dialect: Dialect = "gnu", directory: str | None = "./") -> dict[str, int]:
    """name → byte of its first header in `tar(members, …)`; of two with one name, the last."""
    out, at = {}, len(packed(Member(directory, kind=tarfile.DIRTYPE), dialect)) if directory is not None else 0
    for member in members:
        out[member.name] = at
        at += len(packed(member, dialect))
    return out


def gzipped(data: bytes, *, members: int = 1, level: int = 1) -> bytes:
    """A gzip stream of these bytes, in several gzip members if asked for."""
    step = -(-len(data) // members)
    return b"".join(gzip.compress(data[i : i + step], level, mtime=0) for i in range(0, len(data), step))


def read_tar(data: bytes) -> list[tuple[str, bytes]]:
    """(name, bytes) of the files of a tar, by tarfile."""
    out = []
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for information in archive:
            file = archive.extractfile(information)
            out.append((information.name, b"" if file is None else file.read()))
    return out
