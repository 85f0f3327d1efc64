"""Samples at the edges of what SA-1B's form allows, each convertible: what readers and rebuilders must get right."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg

from sa1b_wds import rle

from . import making
from .making import Member

SHARED = Path(__file__).parents[2] / "shared" / "data"
FIRST_ID = 9_000_000


def _encoded(height: int, width: int, *, gray: bool = False, progressive: bool = False, chroma: str = "420") -> bytes:
    pixels = np.random.default_rng(height).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC)  # smooth: what decoders differ in
    if progressive:
        done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])
        assert done
        return bytes(data.tobytes())
    if gray:
        encoded: bytes = simplejpeg.encode_jpeg(pixels[:, :, :1].copy(), quality=90, colorspace="GRAY")
    else:
        encoded = simplejpeg.encode_jpeg(pixels, quality=90, colorspace="RGB", colorsubsampling=chroma)
    return encoded


def _real() -> list[tuple[bytes, int, int, int]]:
    """(document, id, height, width) of real documents, where they lie beside the project; never part of it."""
    found = []
    for path in sorted((SHARED / "real_json").glob("sa_*.json")):
        image = json.loads(path.read_bytes())["image"]
        if image["image_id"] < 100:  # an id of synthetic tars
            continue
        found.append((path.read_bytes(), image["image_id"], image["height"], image["width"]))
    return found


def members(*, tfds: bool = True) -> list[Member]:
    """Pairs of a jpg and a json, in the order jpg, json; with `tfds` only what TFDS' builder takes as well."""
    out: list[Member] = []
    number = FIRST_ID

    def add(jpg: bytes, text: bytes, image_id: int) -> None:
        out.extend([Member(f"./sa_{image_id}.jpg", jpg), Member(f"./sa_{image_id}.json", text)])

    def changed(change: Any = None, *, jpg: bytes | None = None, n: int = 3, image_id: int | None = None) -> None:
        nonlocal number
        number += 1
        i = number if image_id is None else image_id
        document = making.document(i, height=48, width=72, annotations=n)
        text = None
        if change is not None:
            text = change(document)
        add(jpg or _encoded(48, 72), text or making.text(document), i)

    def numbers(d: making.Document) -> None:
        for a in d["annotations"]:
            a.update(predicted_iou=0.1, stability_score=1, point_coords=[[0.1, 47.300000000000004]])
            a["bbox"] = [0.1, 0.2, 71.9, 47.8]

    def ints(d: making.Document) -> None:
        d["annotations"][0].update(bbox=[1, 2, 3, 4], crop_box=[0, 0, 72, 48], point_coords=[[3, 4]])
        d["annotations"][1].update(bbox=[1, 2.0, 3, 4.5])  # ints and floats in one field

    def whole(d: making.Document) -> None:
        full = np.ones((48, 72), np.uint8)
        counts = rle.encode(full).decode()
        d["annotations"][0].update(segmentation={"size": [48, 72], "counts": counts}, area=full.size)

    def other_size(d: making.Document) -> None:
        counts = rle.encode(making.mask(24, 36, 5)).decode()
        d["annotations"][0].update(segmentation={"size": [24, 36], "counts": counts})

    def spaced(d: making.Document) -> bytes:
        return json.dumps({"annotations": d["annotations"], "image": d["image"]}, indent=1).encode()

    def unknown(d: making.Document) -> None:
        d["image"]["note"] = "é"

    def points(d: making.Document) -> None:
        for a in d["annotations"]:
            a["point_coords"] *= 2

    changed(n=0)
    changed(image_id=(1 << 40) + 1)
    changed(numbers)
    changed(ints)
    changed(whole)
    changed(other_size)
    changed(spaced)
    if not tfds:  # its builder has features for the known fields alone, and for one point
        changed(unknown)
        changed(points)
    changed(jpg=_encoded(48, 72, gray=True))
    changed(jpg=_encoded(48, 72, progressive=True))
    changed(jpg=_encoded(48, 72, chroma="444"))
    changed(jpg=_encoded(48, 72, chroma="422"))
    changed(n=400)
    for text, image_id, height, width in _real():
        add(_encoded(height, width), text, image_id)
    return out


def photographs() -> list[Member]:
    """Pairs of a real photograph and a made up document, where photographs lie beside the project."""
    out = []
    for number, path in enumerate(sorted((SHARED / "real_jpg").glob("*.jpg"))):
        image_id = FIRST_ID + 1000 + number
        height, width, *_ = simplejpeg.decode_jpeg_header(path.read_bytes())
        text = making.text(making.document(image_id, height=height, width=width, annotations=5))
        out += [Member(f"./sa_{image_id}.jpg", path.read_bytes()), Member(f"./sa_{image_id}.json", text)]
    return out
