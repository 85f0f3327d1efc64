"""The annotations of one image: Meta's JSON ⇄ columns ⇄ the packed safetensors member (format version 1).

    pack      JSON → member   `Packer`: one walk in a GIL-free kernel over documents in Meta's own form; everything
                              else takes the general path (msgspec, typed). Both give the same member.
    unpack    member → `Annotations`: views on the member's bytes, nothing copied, every limit checked
    restore   `Annotations` → JSON, byte for byte

The promise is that `restore(unpack(pack(document))) == document` for every document. The general path proves it by
doing it, and stores the document itself (`source.json`) where the columns alone would not give its bytes. The kernel
proves it without rebuilding anything, since it accepts only text that json.dumps would have written:

- every literal (keys, separators, brackets) is compared byte for byte;
- an integer has no leading zero, no plus sign, and is not −0;
- a decimal with at most 15 significant digits and no trailing zero is the shortest text of its double, because two
  such decimals never share a double (DBL_DIG); so `861.0` and `1434.25` need no check;
- a decimal with 16 or 17 digits (float32 values printed as doubles) is parsed and printed again by orjson, all of a
  document at once, and compared;
- exponents, escapes other than `\\\\`, and anything unknown go the general way.

The walk also decodes every RLE: its runs must be non-negative and add up to height · width.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, cast

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from . import rle
from .errors import FormatError, SampleRejected
from .format import FORMAT, MEMBER_LIMIT, PIXEL_LIMIT, SIDE_LIMIT
from .jit import inline, jit
from .plan import Recoding

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Buffer

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]

# Bits of `json_form` [n]: the field was written with ints throughout.
INT_BBOX, INT_CROP_BOX, INT_POINTS, INT_IOU, INT_STABILITY = 1, 2, 4, 8, 16

_I64 = ("annotations.area", "annotations.id", "annotations.segmentation.offsets", "annotations.segmentation.size")
_IMAGE = ("image.height", "image.image_id", "image.stored_height", "image.stored_width", "image.width")
_STORED = _IMAGE[2:4]
_F64 = (
    "annotations.bbox",
    "annotations.crop_box",
    "annotations.point_coords",
    "annotations.predicted_iou",
    "annotations.stability_score",
)
_U8 = ("annotations.json_form", "annotations.segmentation.counts", "source.json")
_WIDTH = {"I64": 8, "F64": 8, "U8": 1}
_OPTIONAL = {"annotations.segmentation.size", "source.json", *_STORED}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Annotations:
    """All annotations of one image as columns; arrays are read-only views where they come from a member."""

    image_id: int
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    id: I64
    """[n]"""
    area: I64
    """[n] pixels, as the source states it."""
    bbox: F64
    """[n, 4] x, y, w, h in pixels, with w = xmax − xmin (SA-1B's convention, one less than COCO's)."""
    crop_box: F64
    """[n, 4] x, y, w, h in pixels."""
    point_coords: F64
    """[n, p, 2] x, y in pixels."""
    predicted_iou: F64
    """[n]"""
    stability_score: F64
    """[n]"""
    counts: U8
    """[bytes] COCO's compressed RLE strings, end to end."""
    offsets: I64
    """[n + 1] where each string starts in `counts`."""
    size: I64 | None
    """[n, 2] h, w of each RLE, only where one differs from the image's."""
    json_form: U8
    """[n] bits, or [n, k] one 0/1 a number (bbox, crop_box, points, iou, stability): what JSON wrote as ints."""
    source_json: bytes | None
    """The document itself, only where the columns would not give its bytes."""
    stored_size: tuple[int, int] | None = None
    """h, w of the jpg, only where it was made smaller (`--max-side`); everything else is in pixels of the original."""

    @property
    def jpg_size(self) -> tuple[int, int]:
        """h, w of the jpg."""
        return self.stored_size or (self.height, self.width)

    def __len__(self) -> int:
        return len(self.id)

    @property
    def file_name(self) -> str:
        return f"sa_{self.image_id}.jpg"

    def rle(self, i: int) -> "Mapping[str, Any]":
        """Annotation i as pycocotools takes it: {"size": [h, w], "counts": bytes}."""
        n = len(self)
        i = range(n)[i]
        size = [self.height, self.width] if self.size is None else self.size[i].tolist()
        return {"size": size, "counts": self.counts[self.offsets[i] : self.offsets[i + 1]].tobytes()}

    def masks(self, size: tuple[int, int] | None = None, index: Sequence[int] | I64 | None = None) -> U8:
        """The masks (k, height, width) uint8 0/1, rasterised straight at `size` (default: the image's own).

        Bit-equal to decoding at full size and taking source row ⌊(2i+1)·h / 2H⌋ for row i, columns alike.
        """
        n = len(self)
        chosen = np.arange(n) if index is None else np.asarray(index, np.int64).reshape(-1)
        if chosen.size and (chosen.min() < -n or chosen.max() >= n):
            raise IndexError(f"{self.file_name} has {n} annotations, no index {chosen.tolist()}")
        chosen = np.where(chosen < 0, chosen + n, chosen)
        source, target = (self.height, self.width), size or (self.height, self.width)
        if self.size is None:
            return cast(U8, rle.decode(self.counts, self.offsets, source, target, index=chosen))
        out = np.empty((len(chosen), *target), np.uint8)
        for k, i in enumerate(chosen):  # strings of other sizes: one at a time
            own = (int(self.size[i, 0]), int(self.size[i, 1]))
            rle.decode(self.counts, self.offsets, own, target, index=np.asarray([i]), out=out[k : k + 1])
        return out


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """One packed member and what the converter needs to know of it."""

    member: memoryview
    image_id: int
    height: int
    width: int
    annotations: int
    area_mismatches: int
    """Annotations whose `area` is not the area of their RLE."""
    stored_source: bool
    """Whether the document itself had to be stored."""


# ---------------------------------------------------------------------------------------------------------------- pack


def _literal(text: str) -> U8:
    return np.frombuffer(text.encode(), np.uint8)


_L_HEAD = _literal('{"image": {"image_id": ')
_L_WIDTH = _literal(', "width": ')
_L_HEIGHT = _literal(', "height": ')
_L_FILE = _literal(', "file_name": "sa_')
_L_LIST = _literal('.jpg"}, "annotations": [')
_L_BBOX = _literal('{"bbox": [')
_L_AREA = _literal('], "area": ')
_L_SIZE = _literal(', "segmentation": {"size": [')
_L_COUNTS = _literal('], "counts": "')
_L_IOU = _literal('"}, "predicted_iou": ')
_L_POINTS = _literal(', "point_coords": [[')
_L_CROP = _literal(']], "crop_box": [')
_L_ID = _literal('], "id": ')
_L_STABILITY = _literal(', "stability_score": ')
_L_COMMA = _literal(", ")
_L_END = _literal("]}")


@inline
def _match(text: U8, at: int, literal: U8) -> int:
    """The place behind `literal` at `at`, or −1."""
    if at < 0 or at + literal.size > text.size:
        return -1
    for i in range(literal.size):
        if text[at + i] != literal[i]:
            return -1
    return at + literal.size


@inline
def _integer(text: U8, at: int) -> tuple[int, int]:
    """(value, place behind) of a canonical integer of at most 18 digits, or (0, −1)."""
    end = text.size
    if at < 0 or at >= end:
        return 0, -1
    negative = text[at] == 45
    if negative:
        at += 1
    begin = at
    value: Any = 0
    while at < end and 48 <= text[at] <= 57:
        if at - begin >= 18:
            return 0, -1
        value = value * 10 + (np.int64(text[at]) - 48)
        at += 1
    if at == begin or (text[begin] == 48 and (at - begin > 1 or negative)):
        return 0, -1
    return (-value if negative else value), at


@inline
def _number(text: U8, at: int, out: F64, row: int, tokens: U8, long: I64, state: I64) -> tuple[int, int]:
    """Read a number into out[row]; (place behind, 1 if it was an int), or (−1, 0).

    A decimal of 16 or 17 digits is copied to `tokens`, with a comma behind, and its row noted in `long`; state[0]
    counts them, state[2] the bytes of `tokens`.
    """
    end = text.size
    if at < 0 or at >= end:
        return -1, 0
    begin = at
    negative = text[at] == 45
    if negative:
        at += 1
    first = at
    value: Any = 0
    while at < end and 48 <= text[at] <= 57:
        if at - first >= 17:
            return -1, 0
        value = value * 10 + (np.int64(text[at]) - 48)
        at += 1
    if at == first or (text[first] == 48 and at - first > 1):
        return -1, 0
    if at >= end or text[at] != 46:
        if (negative and value == 0) or value > (1 << 53):
            return -1, 0
        if at < end and (text[at] == 101 or text[at] == 69):
            return -1, 0
        out[row] = -value if negative else value
        return at, 1
    at += 1
    point = at
    while at < end and 48 <= text[at] <= 57:
        if value >= 10**17 or at - point >= 21:
            return -1, 0
        value = value * 10 + (np.int64(text[at]) - 48)
        at += 1
    decimals = at - point
    if decimals == 0 or (text[at - 1] == 48 and decimals > 1):
        return -1, 0
    if at < end and (text[at] == 101 or text[at] == 69):
        return -1, 0
    if value >= 10**15:
        k, used = state[0], state[2]
        if value >= 10**17 or k >= long.size:
            return -1, 0
        for i in range(begin, at):
            tokens[used + i - begin] = text[i]
        used += at - begin
        tokens[used] = 44
        long[k] = row
        state[0], state[2] = k + 1, used + 1
        return at, 0
    scale = 1.0
    for _ in range(decimals):
        scale *= 10.0  # exact up to 10²²: so the division below is the correctly rounded value
    x = value / scale
    if value != 0 and x < 1e-4:
        return -1, 0  # repr writes an exponent
    out[row] = -x if negative else x
    return at, 0


@inline
def _numbers(text: U8, at: int, out: F64, row: int, count: int, tokens: U8, long: I64, state: I64) -> tuple[int, int]:
    """`count` numbers with ", " between them into out[row:]; (place behind, how many were ints), or (−1, 0)."""
    ints = 0
    for i in range(count):
        if i:
            at = _match(text, at, _L_COMMA)
        at, is_int = _number(text, at, out, row + i, tokens, long, state)
        if at < 0:
            return -1, 0
        ints += is_int
    return at, ints


@jit
def _walk(
    text: U8,
    image: I64,
    ids: I64,
    area: I64,
    floats: F64,
    counts: U8,
    offsets: I64,
    form: U8,
    tokens: U8,
    long: I64,
    state: I64,
) -> int:
    """Parse a document in Meta's form into the columns; the number of annotations, or −1 for the general path.

    image gets image_id, width, height; state the number of long decimals, of area mismatches, of bytes in `tokens`.
    With room for m = len(ids) annotations, `floats` has 12 · m places: 4 · m for bbox, 4 · m for crop_box, 2 · m for
    one point each, m for predicted_iou, m for stability_score. `counts` and `tokens` have room for len(text) bytes.
    """
    m4 = 4 * ids.size
    at = _match(text, 0, _L_HEAD)
    image[0], at = _integer(text, at)
    at = _match(text, at, _L_WIDTH)
    image[1], at = _integer(text, at)
    at = _match(text, at, _L_HEIGHT)
    image[2], at = _integer(text, at)
    at = _match(text, at, _L_FILE)
    name, at = _integer(text, at)
    at = _match(text, at, _L_LIST)
    if at < 0 or name != image[0] or name < 0:
        return -1
    width, height = image[1], image[2]
    if not (1 <= width <= 65535 and 1 <= height <= 65535 and width * height <= 1 << 28):
        return -1
    pixels = width * height
    state[0] = state[1] = state[2] = 0
    n, end = 0, text.size
    used: Any = 0
    offsets[0] = 0
    while at < end and text[at] != 93:
        if n >= ids.size:
            return -1
        if n:
            at = _match(text, at, _L_COMMA)
        at = _match(text, at, _L_BBOX)
        at, ints = _numbers(text, at, floats, 4 * n, 4, tokens, long, state)
        bits = 0
        if ints:
            if ints != 4:
                return -1
            bits |= 1
        at = _match(text, at, _L_AREA)
        area[n], at = _integer(text, at)
        at = _match(text, at, _L_SIZE)
        h, at = _integer(text, at)
        at = _match(text, at, _L_COMMA)
        w, at = _integer(text, at)
        at = _match(text, at, _L_COUNTS)
        if at < 0 or h != height or w != width:
            return -1
        # COCO's compressed counts (cocoapi, common/maskApi.c, rleFrString), runs summed on the way
        total, inside, run, shift, m = np.int64(0), np.int64(0), np.int64(0), 0, 0
        one, two = np.int64(0), np.int64(0)  # the run before, and the one before that
        closed = False
        while at < end:
            c = np.int64(text[at])
            at += 1
            if c == 34:
                closed = True
                break
            if c == 92:  # a backslash is written twice
                if at >= end or text[at] != 92:
                    return -1
                at += 1
            if c < 48 or c > 111 or shift > 25:  # rle.MAX_DIGITS
                return -1
            counts[used] = c
            used += 1
            c -= 48
            run |= (c & 0x1F) << shift
            shift += 5
            if c & 0x20 == 0:
                if c & 0x10:
                    run |= np.int64(-1) << shift
                if m > 2:
                    run += two
                if run < 0 or run > pixels:
                    return -1
                total += run
                if m & 1:
                    inside += run
                two, one = one, run
                run, shift, m = np.int64(0), 0, m + 1
        if not closed or shift or total != pixels:
            return -1
        if inside != area[n]:
            state[1] += 1
        at = _match(text, at - 1, _L_IOU)
        at, ints = _number(text, at, floats, 10 * ids.size + n, tokens, long, state)
        bits |= ints << 3
        at = _match(text, at, _L_POINTS)
        at, ints = _numbers(text, at, floats, 2 * m4 + 2 * n, 2, tokens, long, state)
        if ints:
            if ints != 2:
                return -1
            bits |= 4
        at = _match(text, at, _L_CROP)
        at, ints = _numbers(text, at, floats, m4 + 4 * n, 4, tokens, long, state)
        if ints:
            if ints != 4:
                return -1
            bits |= 2
        at = _match(text, at, _L_ID)
        ids[n], at = _integer(text, at)
        at = _match(text, at, _L_STABILITY)
        at, ints = _number(text, at, floats, 11 * ids.size + n, tokens, long, state)
        bits |= ints << 4
        if at < 0 or at >= end or text[at] != 125:
            return -1
        at += 1
        form[n] = bits
        n += 1
        offsets[n] = used
    at = _match(text, at, _L_END)
    return n if at == end else -1


class _Image(msgspec.Struct):
    image_id: int
    width: int
    height: int
    file_name: str


_Number = int | float


class _Segmentation(msgspec.Struct):
    size: tuple[int, int]
    counts: str


class _Annotation(msgspec.Struct):
    bbox: tuple[_Number, _Number, _Number, _Number]
    area: int
    segmentation: _Segmentation
    predicted_iou: _Number
    point_coords: Annotated[list[tuple[_Number, _Number]], msgspec.Meta(min_length=1)]
    crop_box: tuple[_Number, _Number, _Number, _Number]
    id: int
    stability_score: _Number


class _Document(msgspec.Struct):
    image: _Image
    annotations: list[_Annotation]


_DECODER = msgspec.json.Decoder(_Document)
_SMALLEST_ANNOTATION = 100
"""No annotation in Meta's form is shorter (its literals alone have more bytes), so a document's length bounds n."""


Allocate = Callable[[int], memoryview]


def _fresh(length: int) -> memoryview:
    return memoryview(bytearray(length))


class Packer:
    """Packs documents into members; holds the kernel's scratch columns, so it belongs to one thread."""

    def __init__(self, recoding: Recoding | None = None) -> None:
        """`recoding`: how the photographs are made smaller, whose stored size members then state."""
        self._recoding = recoding
        self._grow(1 << 20)

    def _grow(self, document: int) -> None:
        m = document // _SMALLEST_ANNOTATION + 1
        self._room, self._most = document, m
        self._image, self._state = np.zeros(3, np.int64), np.zeros(3, np.int64)
        self._ids, self._area, self._offsets = np.empty(m, np.int64), np.empty(m, np.int64), np.empty(m + 1, np.int64)
        self._floats, self._long = np.empty(12 * m), np.empty(12 * m, np.int64)
        self._counts, self._form, self._tokens = (np.empty(k, np.uint8) for k in (document, m, document + 1))

    def pack(self, document: "Buffer", key: str, allocate: Allocate = _fresh) -> Packed:
        """The packed member of a JSON document.

        Args:
            document: the bytes of `<key>.json`.
            key: the sample's key, `sa_<id>`.
            allocate: gives the memory that the member is written to, a writable view of exactly so many bytes.

        Raises:
            SampleRejected: for whatever must go to quarantine: broken JSON, a missing field, a wrong type, a key that
                disagrees with image_id or file_name, a number that does not fit its column, an RLE whose runs do not
                add up to h·w, a size beyond the limits.
        """
        text = np.frombuffer(memoryview(document), np.uint8)
        if text.size > self._room:
            if text.size > MEMBER_LIMIT:
                raise SampleRejected(f"{key}.json", "too large", f"at most {MEMBER_LIMIT:,} bytes", f"{text.size:,}")
            self._grow(text.size)
        return self._fast(text, key, allocate) or pack_any(bytes(text), key, allocate, self._recoding)

    def _fast(self, text: U8, key: str, allocate: Allocate = _fresh) -> Packed | None:
        columns = (self._ids, self._area, self._floats, self._counts, self._offsets, self._form)
        n = _walk(text, self._image, *columns, self._tokens, self._long, self._state)
        image_id, width, height = self._image.tolist()
        if n < 0 or key != f"sa_{image_id}":
            return None
        long, mismatches, used = self._state.tolist()
        if long and not self._long_decimals(self._tokens[: used - 1], self._long[:long]):
            return None
        used, m, f = int(self._offsets[n]), self._most, self._floats
        stored = self._recoding.size(height, width) if self._recoding is not None else None
        tensors: list[npt.NDArray[Any]] = [
            self._area[:n],
            self._ids[:n],
            self._offsets[: n + 1],
            _image_column(height, image_id, width, stored),
            f[: 4 * n],
            f[4 * m : 4 * m + 4 * n],
            f[8 * m : 8 * m + 2 * n],
            f[10 * m : 10 * m + n],
            f[11 * m : 11 * m + n],
            self._form[:n],
            self._counts[:used],
        ]
        return Packed(
            member=_join(_header(n, 1, used, False, 0, -1, stored is not None), tensors, allocate),
            image_id=image_id,
            height=height,
            width=width,
            annotations=n,
            area_mismatches=mismatches,
            stored_source=False,
        )

    def _long_decimals(self, tokens: U8, long: I64) -> bool:
        """Fill in the decimals of 16 and 17 digits; False if one is not the shortest text of its double."""
        text = b"".join((b"[", tokens.data, b"]"))
        values = orjson.loads(text)
        # orjson and repr agree on the digits; they differ in exponents, of which there are none here.
        if orjson.dumps(values) != text:
            return False
        array = np.array(values)
        size = np.abs(array)
        if size.min() < 1e-4 or size.max() >= 1e16:
            return False
        self._floats[long] = array
        return True


def _header(n: int, p: int, counts: int, sizes: bool, form_width: int, source: int, smaller: bool) -> bytes:
    """The safetensors header, with its length in front, padded with blanks to 8 bytes as the library pads it."""
    shapes: dict[str, tuple[str, list[int]]] = dict.fromkeys(_I64[:2], ("I64", [n]))
    shapes[_I64[2]] = ("I64", [n + 1])
    if sizes:
        shapes[_I64[3]] = ("I64", [n, 2])
    shapes |= {name: ("I64", []) for name in _IMAGE if smaller or name not in _STORED}
    shapes |= dict.fromkeys(_F64[:2], ("F64", [n, 4]))
    shapes[_F64[2]] = ("F64", [n, p, 2])
    shapes |= dict.fromkeys(_F64[3:], ("F64", [n]))
    shapes[_U8[0]] = ("U8", [n, form_width] if form_width else [n])
    shapes[_U8[1]] = ("U8", [counts])
    if source >= 0:
        shapes[_U8[2]] = ("U8", [source])
    entries, at = {"__metadata__": {"format": FORMAT}}, 0
    for name, (dtype, shape) in shapes.items():
        length = _WIDTH[dtype] * math.prod(shape)
        entries[name] = cast(Any, {"dtype": dtype, "shape": shape, "data_offsets": [at, at + length]})
        at += length
    text = orjson.dumps(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _image_column(height: int, image_id: int, width: int, stored: tuple[int, int] | None) -> I64:
    """The scalars of `_IMAGE`, end to end."""
    return np.array([height, image_id, *(stored or ()), width], np.int64)


def _join(header: bytes, tensors: list[npt.NDArray[Any]], allocate: Allocate) -> memoryview:
    member = allocate(len(header) + sum(t.nbytes for t in tensors))
    out = np.frombuffer(member, np.uint8)
    out[: len(header)] = np.frombuffer(header, np.uint8)
    at = len(header)
    for tensor in tensors:
        out[at : at + tensor.nbytes] = tensor.reshape(-1).view(np.uint8)
        at += tensor.nbytes
    return member


def pack_any(document: bytes, key: str, allocate: Allocate = _fresh, recoding: Recoding | None = None) -> Packed:
    """What `Packer.pack` does, for any document, without the kernel: the general path, and the kernel's oracle."""
    where = f"{key}.json"
    try:
        parsed = _DECODER.decode(document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SampleRejected(where, f"not a valid SA-1B document: {error}") from None
    image, annotations = parsed.image, parsed.annotations
    if key != f"sa_{image.image_id}":
        raise SampleRejected(where, "image_id disagrees with the key", key, f"sa_{image.image_id}")
    if image.file_name != f"{key}.jpg":
        raise SampleRejected(where, "file_name disagrees with the key", f"{key}.jpg", repr(image.file_name)[:200])
    _fits("$.image.image_id", where, image.image_id)
    _check_size(f"{where}: $.image", image.height, image.width)
    n = len(annotations)
    p = len(annotations[0].point_coords) if n else 1
    for i, a in enumerate(annotations):
        if len(a.point_coords) != p:
            raise SampleRejected(
                f"{where}: $.annotations[{i}].point_coords", "points differ in number", p, len(a.point_coords)
            )
        _fits(f"$.annotations[{i}].id", where, a.id)
        _fits(f"$.annotations[{i}].area", where, a.area)
    rows = [_numbers_of(a) for a in annotations]
    for i, row in enumerate(rows):
        for x in row:
            if isinstance(x, int) and (abs(x) > 1 << 1023 or int(float(x)) != x):
                what = "an integer that float64 cannot hold"
                raise SampleRejected(f"{where}: $.annotations[{i}]", what, found=_shown(x))
    ints = np.array([[isinstance(x, int) for x in row] for row in rows], np.uint8).reshape(n, 10 + 2 * p)
    values = np.array(rows, np.float64).reshape(n, 10 + 2 * p)
    strings = [a.segmentation.counts for a in annotations]
    if not all(s.isascii() for s in strings):
        i = [s.isascii() for s in strings].index(False)
        raise SampleRejected(f"{where}: $.annotations[{i}].segmentation.counts", "not an RLE string")
    counts = np.frombuffer("".join(strings).encode(), np.uint8)
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in strings], dtype=np.int64)]).astype(np.int64)
    sizes = np.zeros((n, 2), np.int64)
    for i, a in enumerate(annotations):
        _check_size(f"{where}: $.annotations[{i}].segmentation.size", *a.segmentation.size)
        sizes[i] = a.segmentation.size
    own = bool(np.any(sizes != [image.height, image.width]))
    area = np.array([a.area for a in annotations], np.int64)
    mismatches = int(np.sum(_areas(where, counts, offsets, sizes, own, image) != area))
    columns = Annotations(
        image_id=image.image_id,
        height=image.height,
        width=image.width,
        id=np.array([a.id for a in annotations], np.int64),
        area=area,
        bbox=values[:, :4],
        crop_box=values[:, 4:8],
        point_coords=values[:, 8 : 8 + 2 * p].reshape(n, p, 2),
        predicted_iou=values[:, 8 + 2 * p],
        stability_score=values[:, 9 + 2 * p],
        counts=counts,
        offsets=offsets,
        size=sizes if own else None,
        json_form=_json_form(ints, p),
        source_json=None,
        stored_size=recoding.size(image.height, image.width) if recoding is not None else None,
    )
    source = None if restore(columns) == document else document
    return Packed(
        member=_member(columns, source, where, allocate),
        image_id=image.image_id,
        height=image.height,
        width=image.width,
        annotations=n,
        area_mismatches=mismatches,
        stored_source=source is not None,
    )


def _numbers_of(a: _Annotation) -> list[_Number]:
    points = [x for point in a.point_coords for x in point]
    return [*a.bbox, *a.crop_box, *points, a.predicted_iou, a.stability_score]


def _fits(field: str, where: str, value: int) -> None:
    if not -(1 << 63) <= value < 1 << 63:
        raise SampleRejected(f"{where}: {field}", "does not fit a signed 64-bit integer", found=_shown(value))


def _shown(value: int) -> str:
    """An integer of any size, for a message."""
    return str(value) if value.bit_length() <= 128 else f"one of {value.bit_length():,} bits"


def _check_size(where: str, height: int, width: int) -> None:
    if not (1 <= height <= SIDE_LIMIT and 1 <= width <= SIDE_LIMIT and height * width <= PIXEL_LIMIT):
        limit = f"1 to {SIDE_LIMIT:,} a side and at most {PIXEL_LIMIT:,} pixels"
        raise SampleRejected(where, "size beyond the limits", limit, f"{height} x {width}")


def areas(a: Annotations, where: str) -> I64:
    """[n] pixels of each mask, from its RLE.

    Raises:
        FormatError: a string that is no RLE, or one whose runs do not add up to its size.
    """
    sizes = np.empty((0, 2), np.int64) if a.size is None else a.size
    try:
        return _areas(where, a.counts, a.offsets, sizes, a.size is not None, a)
    except SampleRejected as error:
        raise FormatError(error.where, error.what, error.expected, error.found) from None


def _areas(where: str, counts: U8, offsets: I64, sizes: I64, own: bool, image: _Image | Annotations) -> I64:
    """Areas of all RLEs, each checked."""
    if not own:
        try:
            return rle.check(counts, offsets, image.height, image.width)
        except SampleRejected as error:
            raise SampleRejected(f"{where}: $.{error.where}", error.what, error.expected, error.found) from None
    out = np.empty(len(sizes), np.int64)
    for i, (h, w) in enumerate(sizes.tolist()):
        try:
            out[i] = rle.check(counts[offsets[i] : offsets[i + 1]], offsets[i : i + 2] - offsets[i], h, w)[0]
        except SampleRejected as error:
            at = error.where.replace("annotations[0]", f"annotations[{i}]", 1)
            raise SampleRejected(f"{where}: $.{at}", error.what, error.expected, error.found) from None
    return out


def _json_form(ints: U8, p: int) -> U8:
    """`json_form` of one 0/1 a number: bits [n] where each field is all ints or all floats, else all numbers [n, k]."""
    bits = np.zeros(len(ints), np.uint8)
    for bit, (begin, end) in _fields(p).items():
        of = ints[:, begin:end]
        if np.any(of.any(axis=1) != of.all(axis=1)):
            return ints
        bits |= (of.all(axis=1) * bit).astype(np.uint8)
    return bits


def _fields(p: int) -> dict[int, tuple[int, int]]:
    return {
        INT_BBOX: (0, 4),
        INT_CROP_BOX: (4, 8),
        INT_POINTS: (8, 8 + 2 * p),
        INT_IOU: (8 + 2 * p, 9 + 2 * p),
        INT_STABILITY: (9 + 2 * p, 10 + 2 * p),
    }


def _member(a: Annotations, source: bytes | None, where: str, allocate: Allocate) -> memoryview:
    form_width = a.json_form.shape[1] if a.json_form.ndim == 2 else 0
    n, p = a.point_coords.shape[:2]
    source_size = -1 if source is None else len(source)
    smaller = a.stored_size is not None
    header = _header(n, p, a.counts.size, a.size is not None, form_width, source_size, smaller)
    tensors: list[npt.NDArray[Any]] = [a.area, a.id, a.offsets]
    if a.size is not None:
        tensors.append(a.size)
    tensors += [_image_column(a.height, a.image_id, a.width, a.stored_size)]
    tensors += [a.bbox, a.crop_box, a.point_coords, a.predicted_iou, a.stability_score, a.json_form, a.counts]
    if source is not None:
        tensors.append(np.frombuffer(source, np.uint8))
    length = len(header) + sum(t.nbytes for t in tensors)
    if length > MEMBER_LIMIT:
        raise SampleRejected(where, "too large", f"at most {MEMBER_LIMIT:,} bytes packed", f"{length:,}")
    return _join(header, [np.ascontiguousarray(t) for t in tensors], allocate)


# -------------------------------------------------------------------------------------------------------------- unpack

_HEADER_LIMIT = 1 << 16
_ENTRY = re.compile(
    rb'"([a-z_.]+)":\{"dtype":"(I64|F64|U8)","shape":\[([0-9,]*)\],"data_offsets":\[([0-9]+),([0-9]+)\]\}'
)


@lru_cache(4096)
def _layout(header: bytes) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """name → (dtype, shape, begin, end) of a safetensors header; ValueError with the reason where it is wrong."""
    try:
        entries = msgspec.json.decode(header.rstrip(b" "))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not a safetensors header: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError("not a safetensors header")  # noqa: TRY004  one kind of error for all that is malformed
    metadata = entries.pop("__metadata__", None)
    if metadata != {"format": FORMAT}:
        raise ValueError(f"format {metadata!r} is not known to this release, which reads {FORMAT!r}")
    layout, at = {}, 0
    for name, entry in entries.items():
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)], **rest} if (
                not rest
            ):
                pass
            case _:
                raise ValueError(f"tensor {name}: malformed entry")
        if dtype not in _WIDTH or not all(isinstance(s, int) and 0 <= s <= MEMBER_LIMIT for s in shape):
            raise ValueError(f"tensor {name}: dtype {dtype}, shape {shape}")
        length = _WIDTH[dtype]
        for s in shape:
            length *= s
        if begin != at or end != begin + length or end > MEMBER_LIMIT:
            raise ValueError(f"tensor {name}: data at {begin} to {end}, expected {at} to {at + length}")
        layout[name], at = (dtype, tuple(shape), begin, end), end
    _check_layout(layout)
    return layout


def _check_layout(layout: dict[str, tuple[str, tuple[int, ...], int, int]]) -> None:
    if missing := (set(_I64) | set(_IMAGE) | set(_F64) | set(_U8)) - _OPTIONAL - set(layout):
        raise ValueError(f"tensor {min(missing)} is missing")
    if (_STORED[0] in layout) != (_STORED[1] in layout):
        raise ValueError(f"one of {_STORED[0]} and {_STORED[1]} alone")
    (n,) = layout["annotations.id"][1] if len(layout["annotations.id"][1]) == 1 else (-1,)
    points = layout["annotations.point_coords"][1]
    p = points[1] if len(points) == 3 else -1
    k = 10 + 2 * p
    shapes: dict[str, tuple[str, set[tuple[int, ...]] | None]] = {
        **dict.fromkeys(_I64[:2], ("I64", {(n,)})),
        _I64[2]: ("I64", {(n + 1,)}),
        _I64[3]: ("I64", {(n, 2)}),
        **dict.fromkeys(_IMAGE, ("I64", {()})),
        **dict.fromkeys(_F64[:2], ("F64", {(n, 4)})),
        _F64[2]: ("F64", {(n, p, 2)}),
        **dict.fromkeys(_F64[3:], ("F64", {(n,)})),
        _U8[0]: ("U8", {(n,), (n, k)}),
        _U8[1]: ("U8", None),
        _U8[2]: ("U8", None),
    }
    for name, (dtype, shape, *_) in layout.items():
        if name not in shapes:
            raise ValueError(f"tensor {name} is not part of {FORMAT}")
        want, allowed = shapes[name]
        if dtype != want or (shape not in allowed if allowed else len(shape) != 1):
            raise ValueError(f"tensor {name}: dtype {dtype}, shape {list(shape)}")
    if n < 0 or p < 1:
        raise ValueError("tensor annotations.point_coords: at least one point an annotation")
    if list(layout) != [name for name in (*_I64, *_IMAGE, *_F64, *_U8) if name in layout]:
        raise ValueError("tensors are not in the library's order (by dtype, then name), which aligns them")


def unpack(member: "Buffer", where: str) -> Annotations:
    """The columns of a packed member, as views on its bytes: nothing is copied.

    Args:
        member: the bytes of `<key>.safetensors`; must stay as they are while the columns are in use.
        where: names the member in errors.

    Raises:
        FormatError: a member that is not of format version 1, or breaks one of its limits.
    """
    data = memoryview(member).cast("B")
    if not 8 <= len(data) <= MEMBER_LIMIT:
        raise FormatError(where, "not a packed member", f"8 to {MEMBER_LIMIT:,} bytes", f"{len(data):,}")
    begin = 8 + int.from_bytes(data[:8], "little")
    if begin > min(_HEADER_LIMIT, len(data)) or begin % 8:
        what = f"a header of at most {_HEADER_LIMIT:,} bytes, padded to 8"
        raise FormatError(where, "not a packed member", what, f"{begin - 8:,}")
    try:
        layout = _layout(bytes(data[8:begin]))
    except ValueError as error:
        raise FormatError(where, str(error)) from None
    end = begin + max(e for *_, e in layout.values())
    if end != len(data):
        raise FormatError(where, "wrong length", end, len(data))

    def column(name: str) -> npt.NDArray[Any]:
        dtype, shape, a, _ = layout[name]
        kind = {"I64": "<i8", "F64": "<f8", "U8": "u1"}[dtype]
        array = np.frombuffer(data, kind, int(np.prod(shape, dtype=np.int64)), begin + a).reshape(shape)
        array.flags.writeable = False
        return array

    height, image_id, width = (int(column(name)) for name in _IMAGE if name not in _STORED)
    if not (1 <= height <= SIDE_LIMIT and 1 <= width <= SIDE_LIMIT and height * width <= PIXEL_LIMIT):
        raise FormatError(where, "size beyond the limits", f"1 to {SIDE_LIMIT:,} a side", f"{height} x {width}")
    stored = (int(column(_STORED[0])), int(column(_STORED[1]))) if _STORED[0] in layout else None
    if stored is not None and not (1 <= stored[0] <= height and 1 <= stored[1] <= width and stored != (height, width)):
        found = f"{stored[0]} x {stored[1]}"
        raise FormatError(where, "a stored size that is not smaller than the image", f"{height} x {width}", found)
    offsets, counts = column(_I64[2]), column(_U8[1])
    if offsets[0] != 0 or offsets[-1] != counts.size or np.any(offsets[1:] < offsets[:-1]):
        raise FormatError(
            where, "offsets of the RLE strings do not rise from 0 to their end", counts.size, int(offsets[-1])
        )
    size = column(_I64[3]) if _I64[3] in layout else None
    if size is not None and (np.any((size < 1) | (size > SIDE_LIMIT)) or np.any(size[:, 0] * size[:, 1] > PIXEL_LIMIT)):
        raise FormatError(where, "an RLE's size is beyond the limits")
    return Annotations(
        image_id=image_id,
        height=height,
        width=width,
        id=column(_I64[1]),
        area=column(_I64[0]),
        bbox=column(_F64[0]),
        crop_box=column(_F64[1]),
        point_coords=column(_F64[2]),
        predicted_iou=column(_F64[3]),
        stability_score=column(_F64[4]),
        counts=counts,
        offsets=offsets,
        size=size,
        json_form=column(_U8[0]),
        source_json=column(_U8[2]).tobytes() if _U8[2] in layout else None,
        stored_size=stored,
    )


# ------------------------------------------------------------------------------------------------------------- restore


def restore(a: Annotations) -> bytes:
    """The JSON document of these annotations, byte for byte as the source had it.

    Raises:
        FormatError: values that no document has (they would not give valid JSON, or change on the way).
    """
    if a.source_json is not None:
        return a.source_json
    n, p = a.point_coords.shape[:2]
    values = np.concatenate(
        [a.bbox, a.crop_box, a.point_coords.reshape(n, 2 * p), a.predicted_iou[:, None], a.stability_score[:, None]], 1
    )
    if a.json_form.ndim == 2:
        ints = a.json_form.astype(bool)
    else:
        ints = np.zeros((n, 10 + 2 * p), bool)
        for bit, (begin, end) in _fields(p).items():
            ints[:, begin:end] = (a.json_form & bit).astype(bool)[:, None]
    whole = values[ints]
    if not np.isfinite(values).all() or np.any(np.trunc(whole) != whole):
        raise FormatError(f"sa_{a.image_id}.json", "a number that is not finite, or an int that is not whole")
    if np.any((a.counts < 48) | (a.counts > 111)):
        raise FormatError(f"sa_{a.image_id}.json", "a character that RLE strings do not have")
    rows: list[list[float]] = values.tolist()
    for i, j in np.argwhere(ints).tolist():
        rows[i][j] = int(rows[i][j])
    # Only RLE characters stand in `counts`: the backslash is all that JSON escapes among them.
    text = a.counts.tobytes().decode("ascii")
    offsets, area, ids = a.offsets.tolist(), a.area.tolist(), a.id.tolist()
    sizes = [[a.height, a.width]] * n if a.size is None else a.size.tolist()
    parts = []
    for i, v in enumerate(rows):
        counts = text[offsets[i] : offsets[i + 1]].replace("\\", "\\\\")
        points = [v[j : j + 2] for j in range(8, 8 + 2 * p, 2)]
        parts.append(
            f'{{"bbox": {v[:4]}, "area": {area[i]}, "segmentation": {{"size": {sizes[i]}, "counts": "{counts}"}}, '
            f'"predicted_iou": {v[-2]}, "point_coords": {points}, "crop_box": {v[4:8]}, '
            f'"id": {ids[i]}, "stability_score": {v[-1]}}}'
        )
    size = f'"width": {a.width}, "height": {a.height}'
    head = f'{{"image": {{"image_id": {a.image_id}, {size}, "file_name": "{a.file_name}"}}'
    return f'{head}, "annotations": [{", ".join(parts)}]}}'.encode()
