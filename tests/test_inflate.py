"""The gzip side of sources, held against `gzip` of the standard library; every kind of damage is an error."""

import gzip
import io
import random
import struct
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sa1b_wds.errors import SourceDamaged
from sa1b_wds.inflate import Direct, Gap, Inflated, OnDamage, Plain, Raw, open_bytes

WHERE = "sa_000014.tar"


class Trickle:
    """Storage that hands over what it likes."""

    def __init__(self, data: bytes, sizes: Callable[[], int]) -> None:
        self._data, self._at, self._sizes = data, 0, sizes

    def readinto(self, buffer: memoryview, /) -> int:
        piece = self._data[self._at : self._at + max(1, min(len(buffer), self._sizes()))]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


class File(io.BytesIO):
    def rewind(self) -> bool:
        return self.seek(0) == 0


@pytest.fixture(autouse=True, params=["pieces", "direct"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test takes both ways: what can be read once, and what can be read again."""
    monkeypatch.setitem(globals(), "READABLE", {"pieces": io.BytesIO, "direct": File}[request.param])


READABLE: type[io.BytesIO] = File


def source(data: bytes, *, on_damage: OnDamage = "fail", raw: Raw | None = None) -> Plain | Inflated | Direct:
    return open_bytes(raw or READABLE(data), WHERE, on_damage=on_damage)


def read(stream: Plain | Inflated | Direct, size: int = 1 << 16) -> bytes:
    """All bytes up to the first short read."""
    out = bytearray()
    view = memoryview(bytearray(size))
    while True:
        before = stream.position
        got = stream.readinto(view)
        assert stream.position == before + got
        out += view[:got]
        if got < size:
            return bytes(out)


def salvage(data: bytes, size: int = 777) -> tuple[bytes, list[Gap]]:
    """All bytes, gaps or not."""
    stream = source(data, on_damage="salvage")
    out = read(stream, size)
    while stream.broken:
        out += read(stream, size)
    assert stream.readinto(memoryview(bytearray(1))) == 0
    return out, list(stream.gaps)


def member(
    data: bytes,
    *,
    level: int = 6,
    strategy: int = zlib.Z_DEFAULT_STRATEGY,
    extra: bytes | None = None,
    name: bytes | None = None,
    comment: bytes | None = None,
    check: bool = False,
) -> bytes:
    """A gzip member with any of the optional fields."""
    flags = 2 * check | 4 * (extra is not None) | 8 * (name is not None) | 16 * (comment is not None)
    head = struct.pack("<4BLBB", 0x1F, 0x8B, 8, flags, 0, 0, 255)
    if extra is not None:
        head += struct.pack("<H", len(extra)) + extra
    for text in (name, comment):
        if text is not None:
            head += text + b"\0"
    if check:
        head += struct.pack("<H", zlib.crc32(head) & 0xFFFF)
    packer = zlib.compressobj(level, zlib.DEFLATED, -15, 8, strategy)
    body = packer.compress(data) + packer.flush()
    return head + body + struct.pack("<LL", zlib.crc32(data), len(data) & 0xFFFFFFFF)


def full(data: bytes) -> bytes:
    return member(data, extra=b"SA" * 20, name=b"sa_000014.tar", comment=b"a comment", check=True)


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


texts = st.binary(max_size=40).map(lambda b: b.replace(b"\0", b"."))
members = st.builds(
    member,
    st.one_of(
        st.binary(max_size=3000),
        st.integers(0, 400_000).map(lambda n: bytes(n)),
        st.tuples(st.integers(0, 300_000), st.integers(0, 9)).map(lambda t: noise(*t)),
    ),
    level=st.sampled_from([0, 1, 6, 9]),
    strategy=st.sampled_from([zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED, zlib.Z_HUFFMAN_ONLY]),
    extra=st.none() | st.binary(max_size=300),
    name=st.none() | texts,
    comment=st.none() | texts,
    check=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(members, min_size=1, max_size=5),
    st.integers(0, 2000),
    st.integers(1, 200_000),
    st.sampled_from([1 << 20, 70_000, 513, 3]),
    st.sampled_from(["fail", "salvage"]),
)
def test_any_members_inflate_as_gzip_does(
    parts: list[bytes], zeros: int, size: int, reads: int, on_damage: OnDamage
) -> None:
    data = b"".join(parts) + bytes(zeros)
    stream = source(data, on_damage=on_damage, raw=Trickle(data, lambda: reads))
    assert read(stream, size) == gzip.decompress(data)
    assert isinstance(stream, Inflated)
    assert stream.members == len(parts)
    assert not stream.gaps
    assert not stream.broken


@pytest.mark.parametrize("reads", [1, 2, 9, 511])
def test_storage_may_hand_over_single_bytes(reads: int) -> None:
    data = full(noise(3000)) + member(b"")
    assert read(source(data, raw=Trickle(data, lambda: reads))) == noise(3000)
    assert read(source(noise(3000), raw=Trickle(noise(3000), lambda: reads)), 700) == noise(3000)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 400_000), min_size=1, max_size=12), st.integers(1, 300_000))
def test_plain_bytes_come_as_they_are(sizes: list[int], reads: int) -> None:
    data = noise(1_000_000)
    stream = source(data, raw=Trickle(data, lambda: reads))
    assert isinstance(stream, Plain)
    at = 0
    for size in sizes:
        view = memoryview(bytearray(size))
        got = stream.readinto(view)
        assert got == min(size, len(data) - at)
        assert view[:got] == data[at : at + got]
        at += got
        assert stream.position == at


def test_the_first_bytes_decide_not_the_name() -> None:
    assert isinstance(source(b"\x1f\x8b\x08"), Inflated | Direct)
    assert isinstance(source(b"\x1f"), Plain)
    assert isinstance(source(b"PK"), Plain)


def test_an_empty_file_is_damage() -> None:
    with pytest.raises(SourceDamaged, match=r"sa_000014\.tar: the file is empty"):
        source(b"")


def test_every_cut_is_damage_and_says_where() -> None:
    first, second = noise(900, 1), b"mask " * 200
    whole = full(first) + full(second)
    boundary = len(full(first))
    for cut in range(2, len(whole)):
        stream = source(whole[:cut])
        if cut == boundary:
            assert read(stream) == first
            continue
        with pytest.raises(SourceDamaged) as error:
            read(stream)
        begun = 0 if cut < boundary else boundary
        # What the bytes before the cut inflate to has been delivered, to the byte.
        head, rest = (whole, cut) if cut < boundary else (whole[boundary:], cut - boundary)
        size = len(full(b"")) - 10
        opened = zlib.decompressobj(-15).decompress(head[size:rest]) if rest > size else b""
        position = (0 if cut < boundary else len(first)) + len(opened)
        where = f"sa_000014.tar: byte {position:,} of the tar (gzip member at compressed byte {begun:,})"
        assert error.value.where == where
        assert error.value.what == "the gzip stream ends early"
        assert error.value.expected is not None
        assert "end of file" in str(error.value) or "bytes" in str(error.value)


def test_every_changed_bit_is_damage() -> None:
    data = noise(300, 2) + b"counts" * 50
    one = full(data)
    whole = one + full(data[::-1])
    unused = []
    for at in range(2, len(whole)):
        for bit in range(8):
            broken = bytearray(whole)
            broken[at] ^= 1 << bit
            try:
                assert read(source(bytes(broken))) == data + data[::-1]
            except SourceDamaged:
                continue
            unused.append(at)
    # Deflate fills its last byte, just before the trailer, with bits that mean nothing.
    assert set(unused) <= {len(one) - 9, len(whole) - 9}
    assert len(unused) < 2 * 8


def test_a_changed_bit_in_a_long_stream_is_damage() -> None:
    whole = member(noise(700_000), level=1)
    for at in random.Random(0).sample(range(10, len(whole)), 60):
        broken = bytearray(whole)
        broken[at] ^= 0x10
        with pytest.raises(SourceDamaged, match="gzip member at compressed byte 0"):
            read(source(bytes(broken)))


def test_checksum_and_length_say_what_was_expected_and_found() -> None:
    data = b"annotations" * 30
    whole = member(data)
    with pytest.raises(SourceDamaged, match=rf"expected CRC-32 00000000, found {zlib.crc32(data):08x}"):
        read(source(whole[:-8] + bytes(4) + whole[-4:]))
    with pytest.raises(SourceDamaged, match=r"length differs: expected 331 bytes .*, found 330"):
        read(source(whole[:-4] + struct.pack("<L", 331)))
    damage = r"byte 330 of the tar \(gzip member at compressed byte 0\)"
    with pytest.raises(SourceDamaged, match=damage):
        read(source(whole[:-4] + struct.pack("<L", 331)))


@pytest.mark.parametrize(
    "behind", [b"x", b"\0" * 100 + b"x", b"\x1f", b"\x1f\x8b", b"\x1f\x8b\x07" + bytes(20), noise(99)]
)
def test_garbage_behind_the_last_member_is_damage(behind: bytes) -> None:
    whole = member(b"masks") + behind
    with pytest.raises(SourceDamaged, match=r"byte 5 of the tar"):
        read(source(whole))


def test_zeros_behind_the_last_member_are_not() -> None:
    assert read(source(member(b"masks") + bytes(300_000))) == b"masks"


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"\x1f\x8b\x08\x20", "flags that do not exist: expected flags below 20, found 20"),
        (b"\x1f\x8b\x07\x00", "expected 1f8b08, found 1f8b07"),
        (b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * 300_000, "header is too long"),
    ],
)
def test_a_header_that_is_none_is_damage(head: bytes, message: str) -> None:
    with pytest.raises(SourceDamaged, match=message):
        read(source(head + bytes(20)))


def test_many_tiny_members_do_not_cost_their_neighbours() -> None:
    one = member(b"box")
    assert read(source(one * 20_000)) == b"box" * 20_000


def test_what_changes_between_two_readings_is_damage_all_the_same() -> None:
    class Healing(File):
        """Damaged when it is read first, sound when it is read again."""

        rewound = 0

        def rewind(self) -> bool:
            self.rewound += 1
            if self.rewound == 2:
                self.getbuffer()[:] = sound
            return super().rewind()

    sound = member(noise(2_000_000), level=1)
    stream = source(b"", raw=Healing(damaged(sound)))
    with pytest.raises(SourceDamaged, match=r"was damaged .* and was sound when it was read again") as error:
        read(stream, 1 << 20)
    assert error.value.where == "sa_000014.tar: byte 2,000,000 of the tar"


def test_a_stream_that_cannot_be_read_again_is_read_once() -> None:
    class Once(io.BytesIO):
        def rewind(self) -> bool:
            return False

    stream = source(b"", raw=Once(member(b"masks")))
    assert isinstance(stream, Inflated)
    assert read(stream) == b"masks"


@pytest.mark.slow
def test_a_member_above_four_gigabytes() -> None:
    block, count = bytes(16 << 20), 257
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    piece = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    crc = 0
    for _ in range(count):
        crc = zlib.crc32(block, crc)
    end = zlib.compressobj(1, zlib.DEFLATED, -15).flush()
    size = count * len(block)
    whole = b"\x1f\x8b\x08" + bytes(7) + piece * count + end + struct.pack("<LL", crc, size & 0xFFFFFFFF)
    stream = source(whole)
    view = memoryview(bytearray(8 << 20))
    while stream.readinto(view) == len(view):
        pass
    assert stream.position == size > 1 << 32


# -- salvage


def damaged(part: bytes, at: int | None = None, size: int = 8) -> bytes:
    at = len(part) // 2 if at is None else at
    return part[:at] + bytes(b ^ 0xA5 for b in part[at : at + size]) + part[at + size :]


def test_salvage_goes_on_at_the_next_member() -> None:
    data = [noise(200_000, n) + b"boxes" * 3000 for n in range(4)]
    parts = [member(d) for d in data]
    found, gaps = salvage(parts[0] + damaged(parts[1]) + parts[2] + parts[3])
    assert len(gaps) == 1
    gap = gaps[0]
    assert gap.start == len(data[0])
    assert len(data[0]) < gap.position < len(data[0]) + len(data[1]) + 1
    assert found[: len(data[0])] == data[0]
    assert found[gap.position :] == data[2] + data[3]
    assert len(parts[0]) < gap.compressed < len(parts[0]) + len(parts[1])
    assert gap.compressed + gap.lost == len(parts[0]) + len(parts[1])


def test_salvage_keeps_nearly_all_before_the_damage() -> None:
    data = noise(300_000, 5)
    part = member(data, level=0)
    at = 200_000
    # What a decoder stumbles on is the length of a stored block: LEN, then its complement.
    header = next(n for n in range(at, 0, -1) if part[n : n + 2] == bytes(b ^ 255 for b in part[n + 2 : n + 4]))
    found, gaps = salvage(damaged(part, header, 2))
    assert len(gaps) == 1
    assert data.startswith(found)
    assert len(found) > header - 2048


def test_salvage_without_another_member_loses_the_rest() -> None:
    data = noise(100_000, 6)
    part = member(data, level=9)
    found, gaps = salvage(part[:60_000])
    assert data.startswith(found)
    assert len(found) > 58_000
    assert [(g.position, g.lost, g.compressed) for g in gaps] == [(len(found), 0, 60_000)]
    assert "ends early" in gaps[0].reason


@pytest.mark.parametrize("what", ["crc", "size"])
def test_salvage_with_a_wrong_trailer_keeps_the_bytes_and_says_so(what: str) -> None:
    data = [noise(9000, n) for n in range(3)]
    parts = [member(d) for d in data]
    parts[1] = damaged(parts[1], len(parts[1]) - (8 if what == "crc" else 4), 4)
    found, gaps = salvage(b"".join(parts))
    assert found == b"".join(data)
    assert [(g.start, g.position) for g in gaps] == [(9000, 18000)]
    assert ("checksum" if what == "crc" else "length") in gaps[0].reason


def test_salvage_is_not_fooled_by_a_magic_number_in_the_data() -> None:
    data = [noise(150_000, n) for n in range(3)]
    parts = [member(d, level=0) for d in data]
    fake = b"\x1f\x8b\x08" + bytes(6) + b"\xff" + noise(200, 9)
    parts[1] = parts[1][:70_000] + fake + parts[1][70_000 + len(fake) :]
    # Stored blocks: the fake stands in the data itself; the damage stands at the first block's length.
    parts[1] = damaged(parts[1], 10, 4)
    found, gaps = salvage(b"".join(parts))
    assert len(gaps) == 1
    assert found == data[0] + data[2]


@pytest.mark.parametrize("garbage", [b"x", noise(1000, 8), noise(500_000, 8), b"\x1f\x8b" * 7])
def test_salvage_passes_over_garbage_between_members(garbage: bytes) -> None:
    found, gaps = salvage(member(b"first") + garbage + member(b"second"))
    assert found == b"firstsecond"
    assert [(g.position, g.compressed, g.lost) for g in gaps] == [(5, len(member(b"first")), len(garbage))]


def test_salvage_of_garbage_at_the_end() -> None:
    found, gaps = salvage(member(b"first") + b"garbage")
    assert found == b"first"
    assert [g.lost for g in gaps] == [7]


def test_salvage_of_a_broken_first_header() -> None:
    found, gaps = salvage(b"\x1f\x8b\x08\xff" + noise(50) + member(b"second"))
    assert found == b"second"
    assert [(g.position, g.compressed, g.lost) for g in gaps] == [(0, 0, 54)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_ends_in_an_error_or_in_gaps(data: st.DataObject) -> None:
    """No other exception, no endless loop, nothing invented: undamaged members come out whole."""
    parts = [member(noise(data.draw(st.integers(0, 3000)), n)) for n in range(4)]
    plain = [gzip.decompress(p) for p in parts]
    whole = bytearray(b"".join(parts))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(2, len(whole) - 1))
        size = data.draw(st.integers(1, 40))
        whole[at : at + size] = data.draw(st.binary(min_size=size, max_size=size))
    broken = bytes(whole)
    found, gaps = salvage(broken)
    ends = [sum(map(len, parts[: n + 1])) for n in range(4)]
    for n, end in enumerate(ends):
        if broken[end - len(parts[n]) : end] == parts[n]:
            assert plain[n] in found
    try:
        assert read(source(broken)) == found
    except SourceDamaged:
        assert gaps
    else:
        assert not gaps
