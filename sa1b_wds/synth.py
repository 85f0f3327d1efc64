"""Synthetic SA-1B tars in Meta's layout: for tests, benchmarks and a first look, without the licensed data.

Everything is drawn from (seed, tar, place in the tar) alone, so members can be written in any order and tars in
parallel, nothing is kept in memory, and the same call writes the same bytes with any number of workers. What is copied
from SA-1B is its layout and its statistics (sizes, qualities, masks an image, lengths and form of the RLE strings, the
form of every number in the JSON), never its content.

**Photographs.** A few large textures are made once a process. An image is a view of them at a random offset, mixed with
the gain that gives about the wanted number of bytes; the JPEG encoder is what takes the time.

**Masks.** An outline is walked column by column straight into COCO's compressed RLE string: between a diamond and a box
by its exponent, with waves and a random walk on its edges, and cut by bands that open and close (windows, leaves).
No bitmap exists at any time.

**Cost.** On one core about 11 ms an image of full size: jpg 8, json 3 (at 100 masks), then deflate; once a process
0.5 s for the textures. Bytes are the same for the same versions of libjpeg-turbo, OpenCV and ISA-L.
"""

import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Literal, Protocol, cast, get_args

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from isal import isal_zlib

from . import rle
from .errors import UsageError
from .files import translating
from .jit import inline, jit

__all__ = ["Photo", "crop_boxes", "document", "jpeg", "photo", "synthesise"]

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
Order = Literal["random", "adjacent", "jsons-first"]

_SHORT_SIDE = 1500
_SLOT, _SLOTS = 2048, 588_769
"""Annotation ids that an image owns, and how many images own some (a prime: see `photo`); together up to 1.2e9."""
_NORMAL = NormalDist()


# ---- one image -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One image before it is drawn: what its jpg and its json must agree on."""

    image_id: int
    """The id in `sa_<id>.jpg` and `sa_<id>.json`."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    quality: int
    """JPEG quality, 95 or 75."""
    jpg_bytes: float
    """Wanted length of the jpg; the real one is near it."""
    masks: int
    """Number of annotations."""
    first_annotation: int
    """The smallest annotation id this image may use; 2,048 ids from there are its own."""
    stream: str
    """Seeds everything else that is drawn for this image."""


def photo(
    seed: int,
    tar: int,
    place: int,
    samples: int,
    *,
    masks: int | None = None,
    image: tuple[int, int] | None = None,
    short_side: int = _SHORT_SIDE,
) -> Photo:
    """Draw the outer facts of image `place` of tar `tar`, in a set whose tars hold `samples` images each.

    Ids run on over the tars and leave a few holes. The last image of the first tar has no annotations, unless `masks`
    says otherwise or the tar has fewer than four images.
    """
    stream = f"{seed}/{tar}/{place}"
    draw = random.Random(stream)
    long_side, portrait = _format(draw)
    height, width = (long_side, _SHORT_SIDE) if portrait else (_SHORT_SIDE, long_side)
    height, width = (max(1, round(side * short_side / _SHORT_SIDE)) for side in (height, width))
    height, width = image or (height, width)
    fine = draw.random() < 2 / 3
    wanted = _lognormal(draw, 1.26e6, 0.25) if fine else _lognormal(draw, 0.53e6, 0.35)
    drawn = min(400, max(3, round(_lognormal(draw, 80, 0.64))))
    if tar == 0 and place == samples - 1 and samples >= 4:
        drawn = 0
    holes = _holes(seed, tar, samples)
    return Photo(
        image_id=1 + tar * (samples + len(holes)) + place + sum(hole <= place for hole in holes),
        height=height,
        width=width,
        quality=95 if fine else 75,
        jpg_bytes=wanted * height * width / (1500 * 2250),
        masks=drawn if masks is None else masks,
        # A step through a prime number of slots visits all of them: ids are neither dense nor in the order of images.
        first_annotation=1 + ((tar * samples + place) * 377_123 + seed) % _SLOTS * _SLOT,
        stream=stream,
    )


def _format(draw: random.Random) -> tuple[int, bool]:
    """Long side in pixels for a short side of 1500, and whether the image stands upright."""
    kind = draw.random()
    if kind < 0.62:
        return 2250, False
    if kind < 0.91:
        return 2000 + _below(draw, 348), False
    return (2250 if draw.random() < 0.6 else 2000 + _below(draw, 348)), True


@functools.lru_cache(maxsize=64)
def _holes(seed: int, tar: int, samples: int) -> tuple[int, ...]:
    draw = random.Random(f"{seed}/{tar}/holes")
    return tuple(_below(draw, samples + 1) for _ in range(max(1, samples // 500)))


# Only `random()` is promised to be the same in every release of Python, so the other draws are made from it.


def _below(draw: random.Random, limit: int) -> int:
    return int(draw.random() * limit)


def _lognormal(draw: random.Random, median: float, sigma: float) -> float:
    return median * math.exp(sigma * _NORMAL.inv_cdf(max(draw.random(), 1e-12)))


# ---- annotations -----------------------------------------------------------------------------------------------------


def crop_boxes(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """The 21 crops x, y, w, h (pixels) of SAM's mask generator: the image, then 2 × 2, then 4 × 4 overlapping ones.

    As `generate_crop_boxes` of segment-anything does it with 2 layers and an overlap ratio of 512 / 1500.
    """
    boxes = [(0, 0, width, height)]
    for side in (2, 4):
        overlap = int(512 / 1500 * min(height, width) * (2 / side))
        w, h = (math.ceil((overlap * (side - 1) + length) / side) for length in (width, height))
        for i, j in itertools.product(range(side), repeat=2):
            x, y = (w - overlap) * i, (h - overlap) * j
            boxes.append((x, y, min(x + w, width) - x, min(y + h, height) - y))
    return boxes


def document(image: Photo) -> bytes:
    """The json of one image: `json.dumps` with default separators, keys and forms of numbers as in SA-1B."""
    draw = random.Random(f"{image.stream}/document")
    int_crops = draw.random() < 0.1
    crops = crop_boxes(image.height, image.width)
    covers_corner, covers_all = draw.random() < 0.2, draw.random() < 0.1
    spare = _SLOT - 1 - image.masks  # ids that may be left out
    annotation_id = image.first_annotation
    annotations = []
    for number in range(image.masks):
        shape = _Shape.draw(draw, crops)
        if number == 0 and covers_corner:
            shape = shape.at_corner()
        elif number == 1 and covers_all:
            shape = shape.over_all(draw, crops[0])
        counts, area, bbox = shape.encode(image.height, image.width)
        skipped = 0 if draw.random() < 0.8 else min(spare, 1 + _below(draw, 8))
        spare -= skipped
        annotation_id += 1 + skipped
        annotations.append(
            {
                "bbox": bbox if draw.random() < 0.05 else [float(side) for side in bbox],
                "area": area,
                "segmentation": {"size": [image.height, image.width], "counts": counts},
                "predicted_iou": _single(1.0 - 0.1199 * draw.random()),
                "point_coords": [list(shape.point)],
                "crop_box": list(shape.crop) if int_crops else [float(side) for side in shape.crop],
                "id": annotation_id,
                "stability_score": _single(0.9999 - 0.0498 * draw.random() ** 1.5),
            }
        )
    head = {
        "image_id": image.image_id,
        "width": image.width,
        "height": image.height,
        "file_name": f"sa_{image.image_id}.jpg",
    }
    return json.dumps({"image": head, "annotations": annotations}).encode()


def _single(value: float) -> float:
    """A float32 as the double that Python prints."""
    return float(np.float32(value))


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """What an outline is walked from; all lengths in pixels."""

    crop: tuple[int, int, int, int]
    point: tuple[float, float]
    centre: tuple[float, float]
    half: tuple[float, float]
    exponent: float
    """1 is a diamond, 2 an ellipse, 8 nearly a box."""
    wave: float
    """Height of the waves on its edges, as a part of `half`."""
    rough: float
    """Step of the random walk on its edges."""
    bands: int
    """How many bands may cut it."""
    seed: int

    @classmethod
    def draw(cls, draw: random.Random, crops: list[tuple[int, int, int, int]]) -> "_Shape":
        scale = min(crops[0][2:]) / _SHORT_SIDE
        width = max(5.0, _lognormal(draw, 130, 0.78)) * scale
        height = max(5.0, width / scale * _lognormal(draw, 1.05, 0.4)) * scale
        layer = 0 if draw.random() < 0.35 else 1 if draw.random() < 0.5 else 2
        while layer and (width > 0.6 * crops[-1][2] * (1, 2)[layer == 1] or height > 0.6 * crops[-1][3]):
            layer -= 1
        first, count, side = ((0, 1, 32), (1, 4, 16), (5, 16, 8))[layer]
        crop = crops[first + _below(draw, count)]
        x = crop[0] + (_below(draw, side) + 0.5) / side * crop[2]
        y = crop[1] + (_below(draw, side) + 0.5) / side * crop[3]
        kind = draw.random()
        bands = 0 if kind < 0.95 else 1 + _below(draw, 3) if kind < 0.986 else 4 + _below(draw, 7)
        if width > 300 * scale and draw.random() < 0.02:
            bands = 10 + _below(draw, 31)
        return cls(
            crop=crop,
            point=(x, y),
            centre=(x + (draw.random() - 0.5) * 0.4 * width, y + (draw.random() - 0.5) * 0.4 * height),
            half=(width / 2, height / 2),
            exponent=1.2 + 5 * draw.random() ** 2,
            wave=0.05 + 0.3 * draw.random(),
            rough=0.3 + 1.8 * draw.random() ** 2,
            bands=bands,
            seed=_below(draw, 2**53),
        )

    def at_corner(self) -> "_Shape":
        """One that covers pixel 0, 0, so that its first run is 0."""
        return replace(self, centre=(0.0, 0.0), half=(max(self.half[0], 4.0), max(self.half[1], 8.0)), bands=0)

    def over_all(self, draw: random.Random, crop: tuple[int, int, int, int]) -> "_Shape":
        """Something like the sky or the floor: up to 95 % of the image."""
        x, y, w, h = crop
        half = (w * (0.3 + 0.22 * draw.random()), h * (0.3 + 0.22 * draw.random()))
        point = (x + 16.5 / 32 * w, y + 16.5 / 32 * h)
        return replace(self, crop=crop, point=point, centre=(w / 2, h / 2), half=half, exponent=8.0, wave=0.05)

    def encode(self, height: int, width: int) -> tuple[str, int, list[int]]:
        """The RLE string, the area in pixels, and x, y, xmax − xmin, ymax − ymin."""
        x, y, w, h = self.crop
        columns = min(w, int(2 * self.half[0]) + 3)
        runs = np.empty(2 * columns * (self.bands + 1) + 2, np.int64)
        n, area, left, top, right, bottom = _walk(
            runs, height, width, x, y, x + w, y + h, *self.centre, *self.half,
            self.exponent, self.wave, self.rough, self.bands, self.seed,
        )  # fmt: skip
        return rle.encode_runs(runs[:n]).decode("ascii"), area, [left, top, right - left, bottom - top]


@inline
def _uniform(state: npt.NDArray[np.uint64]) -> float:
    """The next number in [0, 1) of splitmix64 (Steele, Lea, Flood 2014)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.float64(z >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@jit
def _walk(
    runs: I64, height: int, width: int, x0: int, y0: int, x1: int, y1: int, cx: float, cy: float, hx: float, hy: float,
    exponent: float, wave: float, rough: float, bands: int, seed: int,
) -> tuple[int, int, int, int, int, int]:  # fmt: skip
    """Walk one outline inside the crop [x0, x1) × [y0, y1); the number of runs, the area, and the edges of its box."""
    state = np.empty(1, np.uint64)
    state[0] = np.uint64(seed)
    turn = np.empty((bands + 1, 3))
    for i in range(bands + 1):
        for j in range(3):
            turn[i, j] = 6.283185307179586 * _uniform(state)
    first = min(max(int(cx - hx), x0), x1 - 1)
    last = max(min(int(cx + hx), x1 - 1), first)
    n = area = 0
    end = 0  # one behind the last pixel of the mask so far, in column-major order
    start = -1  # first pixel of the run of ones that is still open
    top, bottom = height, -1
    upper = lower = 0.0
    for x in range(first, last + 1):
        u = min(1.0, abs((x + 0.5 - cx) / hx))
        edge = hy * (1.0 - u**exponent) ** (1.0 / exponent)
        v = (x - cx) / hx * 3.0
        # The walks are drawn back to 0, else an outline would drift away from its place.
        upper = 0.9 * upper + rough * (_uniform(state) - 0.5)
        lower = 0.9 * lower + rough * (_uniform(state) - 0.5)
        high = cy - edge * (1.0 + wave * math.sin(v + turn[0, 0])) + upper
        low = cy + edge * (1.0 + wave * math.sin(1.3 * v + turn[0, 1])) + lower
        y = min(max(int(high), y0), y1 - 1)
        stop = min(max(int(low) + 1, y + 1), y1)
        part = (low - high) / (bands + 1)
        for i in range(bands + 1):
            span_end = next_y = stop
            if i < bands:
                # A band lies about the border of two parts of the column and is never wider than they are.
                middle = high + part * (i + 1 + 0.1 * math.sin(2.0 * v + turn[i + 1, 0]))
                wide = part * (0.3 * math.sin((1.0 + turn[i + 1, 2]) * v + turn[i + 1, 1]) - 0.05)
                if wide < 0.5:
                    continue
                span_end = min(max(int(middle - wide), y + 1), stop)
                next_y = min(max(int(middle + wide) + 1, span_end), stop)
            if y >= stop:
                break
            here = x * height + y
            area += span_end - y
            top = min(top, y)
            bottom = max(bottom, span_end - 1)
            # The bottom of a column and the top of the next are neighbours: then the run of ones goes on.
            if here != end or start < 0:
                if start >= 0:
                    runs[n] = end - start
                    n += 1
                runs[n] = here - end
                n += 1
                start = here
            end = x * height + span_end
            y = next_y
    runs[n] = end - start
    n += 1
    if end < height * width:
        runs[n] = height * width - end
        n += 1
    return n, area, first, top, last, bottom


# ---- photographs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Textures:
    """What photographs are mixed from. The same in every process, whatever the seed: images differ by view and mix."""

    shapes: U8
    """Large, soft forms with some hard borders."""
    detail: U8
    """Fine structure about 128; flat in places, as skies are."""
    colour: U8
    """Soft forms at half the resolution, for both colour planes."""
    sizes: dict[int, npt.NDArray[np.float64]]
    """By quality: bytes a pixel of a jpg mixed with each of `_GAINS`."""


_GAINS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0)
_ROOM = 384
"""How far a view may be shifted each way, in pixels."""


def _noise(stream: int, side: int, cell: int) -> npt.NDArray[np.float32]:
    """Smooth noise in [0, 1], a value every `cell` pixels."""
    grid = side // cell + 2
    # Raw bits of PCG64, the one output that numpy promises never to change.
    bits = np.random.PCG64([stream, cell]).random_raw((grid * grid + 7) // 8).view(np.uint8)[: grid * grid]
    values = bits.reshape(grid, grid).astype(np.float32) / 255
    if cell == 1:
        return np.ascontiguousarray(values[:side, :side])
    grown = cv2.resize(values, (grid * cell, grid * cell), interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(grown[cell // 2 :, cell // 2 :][:side, :side], dtype=np.float32)


def _octaves(stream: int, side: int, cells: dict[int, float]) -> npt.NDArray[np.float32]:
    total = np.zeros((side, side), np.float32)
    for cell, weight in cells.items():
        total += weight * (_noise(stream, side, cell) - 0.5)
    return total


@functools.lru_cache(maxsize=2)
def _textures(long_side: int) -> _Textures:
    cv2.setNumThreads(1)
    side = (long_side + _ROOM + 1) // 2 * 2
    soft = _octaves(1, side, {512: 1.0, 192: 0.5, 64: 0.25, 24: 0.12})
    # Steps of a smooth field are patches with curved borders.
    steps = np.floor(_octaves(2, side, {256: 1.0, 64: 0.3}) * 9) / 9
    shapes = 128 + 130 * soft + 90 * steps
    detail = _octaves(3, side, {8: 0.7, 4: 0.9, 2: 1.0, 1: 0.7})
    where = np.clip(_octaves(4, side, {200: 2.2, 40: 0.8}) + 0.45, 0.02, 1.0)
    colour = _octaves(5, side // 2, {256: 1.0, 64: 0.35, 12: 0.12, 3: 0.05})
    planes = [
        np.clip(plane, 0, 255).astype(np.uint8) for plane in (shapes, 128 + 160 * detail * where, 128 + 60 * colour)
    ]
    textures = _Textures(shapes=planes[0], detail=planes[1], colour=planes[2], sizes={})
    height, width = long_side * 5 // 8 // 2 * 2, long_side // 2 * 2
    for quality in (75, 95):
        views = (_mix(textures, height, width, gain, _ROOM // 2, _ROOM // 2, 0.8) for gain in _GAINS)
        sizes = [len(_compress(planes, quality)) / (height * width) for planes in views]
        textures.sizes[quality] = np.maximum.accumulate(np.array(sizes))
    return textures


def _mix(
    textures: _Textures, height: int, width: int, gain: float, x: int, y: int, contrast: float
) -> tuple[U8, U8, U8]:
    """One view of an even size as Y, U and V planes, the last two of half the size."""
    shapes = textures.shapes[y : y + height, x : x + width]
    detail = textures.detail[-height - x or None :, -width - y or None :][:height, :width]
    luma = cv2.addWeighted(shapes, contrast, detail, gain, 128 * (1 - contrast - gain))
    h, w = height // 2, width // 2
    chroma = [
        np.ascontiguousarray(textures.colour[i : i + h, j : j + w]) for i, j in ((y // 2, x // 2), (x // 2, y // 2))
    ]
    return np.asarray(luma, np.uint8), chroma[0], chroma[1]


def _compress(planes: tuple[U8, U8, U8], quality: int) -> bytes:
    return bytes(simplejpeg.encode_jpeg_yuv_planes(*planes, quality, fastdct=True))


def jpeg(image: Photo) -> bytes:
    """The jpg of one image: baseline, 4:2:0, JFIF without EXIF, of about the wanted length."""
    side = 75
    while side < max(image.height, image.width):
        side *= 2  # 2,400 serves all of SA-1B
    textures = _textures(side)
    draw = random.Random(f"{image.stream}/jpeg")
    sizes = textures.sizes[image.quality]
    gain = float(np.interp(image.jpg_bytes / (image.height * image.width), sizes, _GAINS))
    x, y = _below(draw, _ROOM + 1), _below(draw, _ROOM + 1)
    # simplejpeg (1.9) reads memory behind the planes of an odd size. Encode the next even one, which has the same
    # blocks of 16 × 16, and write the size into the header: jpg decoders cut the last block there.
    height, width = image.height + image.height % 2, image.width + image.width % 2
    data = _compress(_mix(textures, height, width, gain, x, y, 0.55 + 0.5 * draw.random()), image.quality)
    frame = data.index(b"\xff\xc0\x00\x11\x08") + 5
    return data[:frame] + struct.pack(">HH", image.height, image.width) + data[frame + 4 :]


# ---- tars ------------------------------------------------------------------------------------------------------------


def synthesise(
    out: Path,
    *,
    tars: int = 2,
    samples: int = 100,
    plain: bool = False,
    seed: int = 0,
    masks: int | None = None,
    image: tuple[int, int] | None = None,
    short_side: int = _SHORT_SIDE,
    order: Order = "random",
    gzip_members: int = 1,
    level: int = 1,
    first: int = 0,
    workers: int = 1,
    progress: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Write `tars` tars of `samples` images each into `out`: `sa_000000.tar`, … ; returns their paths in order.

    A tar stands under its name only when it is whole; one that is there already is replaced.

    Args:
        out: a folder; made if it is missing.
        plain: no gzip. Meta's are gzip streams in spite of their name.
        masks: so many in every image, instead of SA-1B's distribution (lognormal, mean 98, 3 to 400).
        image: (height, width) in pixels of every image, instead of SA-1B's formats.
        short_side: the formats of SA-1B, and lengths of jpgs and outlines with them, scaled from 1500 to this.
        order: of the members. `random` over the whole tar is the worst that may be met; `adjacent` pairs in random
            order; `jsons-first` all jsons, then all jpgs.
        gzip_members: the stream is cut into so many gzip members, in the middle of tar members.
        level: 0 to 3 are ISA-L's (fast); 4 to 9 are zlib's (22 ms a MB), which stores most of a jpg as it is.
        first: number of the first tar. Tars of one seed and size go together, whatever calls wrote them.
        workers: processes; tars are shared among them.
        progress: called with the path of every tar that is done.

    Raises:
        UsageError: a number out of its range.
        StorageError: a tar that cannot be written; nothing of it is left behind.
    """
    limits = (
        ("tars", tars, 1, 1_000_000), ("samples", samples, 1, 1_000_000), ("masks", masks or 0, 0, _SLOT - 1),
        ("short_side", short_side, 8, 65_535), ("height", image[0] if image else 8, 8, 65_535),
        ("width", image[1] if image else 8, 8, 65_535), ("gzip_members", gzip_members, 1, 2 * samples),
        ("level", level, 0, 9), ("first", first, 0, 999_999), ("workers", workers, 1, 4096),
    )  # fmt: skip
    for name, value, least, most in limits:
        if not least <= value <= most:
            raise UsageError("synth", f"{name} is out of range", f"{least:,} to {most:,}", value)
    if order not in get_args(Order):
        raise UsageError("synth", "unknown order", ", ".join(get_args(Order)), order)
    jobs = [
        _Job(
            path=out / f"sa_{number:06d}.tar", seed=seed, tar=number, samples=samples, masks=masks, image=image,
            short_side=short_side, order=order, pieces=0 if plain else gzip_members, level=level,
        )
        for number in range(first, first + tars)
    ]  # fmt: skip
    with translating(str(out)):
        out.mkdir(parents=True, exist_ok=True)
    if workers == 1 or len(jobs) == 1:
        return [_report(_write(job), progress) for job in jobs]
    # Spawned, not forked: the caller may have threads.
    with ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn")) as pool:
        return [_report(path, progress) for path in pool.map(_write, jobs)]


def _report(path: Path, progress: Callable[[Path], None] | None) -> Path:
    if progress:
        progress(path)
    return path


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One tar, as it goes to a process."""

    path: Path
    seed: int
    tar: int
    samples: int
    masks: int | None
    image: tuple[int, int] | None
    short_side: int
    order: Order
    pieces: int
    """Gzip members; 0 for a plain tar."""
    level: int

    def photo(self, place: int) -> Photo:
        return photo(
            self.seed, self.tar, place, self.samples, masks=self.masks, image=self.image, short_side=self.short_side
        )

    def members(self) -> list[tuple[int, bool]]:
        """(place of the image, whether it is the jpg), in the order of the tar."""
        draw = random.Random(f"{self.seed}/{self.tar}/order")
        pairs = [(place, jpg) for place in range(self.samples) for jpg in (True, False)]
        if self.order == "random":
            return sorted(pairs, key=lambda _: draw.random())
        ranks = [draw.random() for _ in range(self.samples)]
        if self.order == "adjacent":
            return sorted(pairs, key=lambda pair: ranks[pair[0]])
        return sorted(pairs, key=lambda pair: (pair[1], ranks[pair[0]]))

    def chunks(self) -> Iterator[bytes]:
        """The tar, a member at a time, as GNU tar writes it: `./` first, zeros up to a record of 10,240 at the end."""
        draw = random.Random(f"{self.seed}/{self.tar}/headers")
        written = 0
        folder = self._header("./", 0, draw)
        yield folder
        written += len(folder)
        for place, jpg in self.members():
            image = self.photo(place)
            data = jpeg(image) if jpg else document(image)
            header = self._header(f"./sa_{image.image_id}.{'jpg' if jpg else 'json'}", len(data), draw)
            chunk = b"".join((header, data, bytes(-len(data) % 512)))
            written += len(chunk)
            yield chunk
        yield bytes(1024 + -(written + 1024) % 10240)

    def _header(self, name: str, size: int, draw: random.Random) -> bytes:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.uid, info.gid, info.uname, info.gname = size, 0o644, 198_033, 100, "sa1b", "users"
        info.mtime = 1_680_000_000 + _below(draw, 500_000)
        if name.endswith("/"):
            info.type, info.mode = tarfile.DIRTYPE, 0o755
        return bytes(info.tobuf(tarfile.GNU_FORMAT))


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


def _compressor(level: int) -> _Compressor:
    if level <= 3:
        return cast(_Compressor, isal_zlib.compressobj(level, isal_zlib.DEFLATED, 31))
    return zlib.compressobj(level, zlib.DEFLATED, 31)


def _gzip(chunks: Iterator[bytes], pieces: int, members: int, level: int) -> Iterator[bytes]:
    cuts = {1 + members * piece // pieces for piece in range(1, pieces)}
    stream = _compressor(level)
    for number, chunk in enumerate(chunks):
        at = 0
        if number in cuts:
            at = len(chunk) // 2
            yield stream.compress(chunk[:at]) + stream.flush()
            stream = _compressor(level)
        yield stream.compress(chunk[at:])
    yield stream.flush()


def _write(job: _Job) -> Path:
    chunks = job.chunks()
    if job.pieces:
        chunks = _gzip(chunks, job.pieces, 2 * job.samples, job.level)
    temporary = job.path.with_name(f".{job.path.name}.{os.getpid()}.tmp")
    with translating(str(job.path)):
        try:
            with temporary.open("wb") as file:
                file.writelines(chunks)
            temporary.replace(job.path)
        finally:
            temporary.unlink(missing_ok=True)
    return job.path
