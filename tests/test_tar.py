"""The tar reader held against `tarfile` where an archive is whole, and against every kind of damage where it is not."""

import gzip
import io
import itertools
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sa1b_wds import tar
from sa1b_wds.errors import FormatError, SourceDamaged
from sa1b_wds.inflate import OnDamage, Plain, open_bytes
from sa1b_wds.tar import BLOCK, END, Entry, Reader, Skipped, header, padding

WHERE = "sa_000014.tar"
LARGE = 4 << 20  # no test has a larger member; damaged headers may state one
Found = list[tuple[Entry, bytes | None]]


def reader(data: bytes, *, on_damage: OnDamage = "fail", keep: Callable[[Entry], bool] = lambda _: True) -> Reader:
    def allocate(entry: Entry) -> memoryview | None:
        assert entry.kind == "file"
        return memoryview(bytearray(entry.size)) if entry.size <= LARGE and keep(entry) else None

    stream = open_bytes(io.BytesIO(data), WHERE, on_damage=on_damage)
    return Reader(stream, allocate=allocate, on_damage=on_damage)


def accounts(read: Reader) -> int:
    return read.spans + read.zeros + sum(s.size for s in read.skipped)


def entries(data: bytes) -> Found:
    read = reader(data)
    found = [(entry, None if room is None else bytes(room)) for entry, room in read]
    assert not read.skipped
    plain = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    assert read.spans + read.zeros == len(plain)
    return found


def salvage(data: bytes) -> tuple[dict[str, bytes], list[Skipped]]:
    """Files by name, and what was skipped; the accounts must come out even."""
    read = reader(data, on_damage="salvage")
    found = [(entry, None if room is None else bytes(room)) for entry, room in read]
    assert [entry.ordinal for entry, _ in found] == list(range(len(found)))
    if data[:2] != b"\x1f\x8b":
        assert accounts(read) == len(data)
        places = [(s.offset, s.offset + s.size) for s in read.skipped]
        assert places == sorted(places)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))
    return {entry.name: room for entry, room in found if room is not None}, read.skipped


def damage(data: bytes) -> SourceDamaged:
    with pytest.raises(SourceDamaged) as error:
        for _ in reader(data):
            pass
    return error.value


def noise(size: int, seed: object = 0) -> bytes:
    return random.Random(repr(seed)).randbytes(size)


def archive(files: Iterable[tuple[str, bytes]]) -> bytes:
    return b"".join(header(n, len(d)) + d + bytes(padding(len(d))) for n, d in files) + END


def sample(count: int = 3, size: int = 900) -> list[tuple[str, bytes]]:
    return [(f"./sa_{n}.{ext}", noise(size + 70 * n, (n, ext))) for n in range(count) for ext in ("jpg", "json")]


def by_hand(
    name: bytes = b"a", size: bytes = b"00000000000\0", kind: bytes = b"0", rest: bytes = b"ustar\x0000"
) -> bytes:
    """A header with fields as given, and the right checksum."""
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0") + b"00000000000\0"
    block = (block + b" " * 8 + kind + bytes(100) + rest).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def record(keyword: str, value: str) -> bytes:
    body = f" {keyword}={value}\n".encode()
    size = len(body)
    while len(str(size)) + len(body) != size:
        size = len(str(size)) + len(body)
    return str(size).encode() + body


def extension(kind: bytes, data: bytes) -> bytes:
    return by_hand(b"././@LongLink", b"%011o\0" % len(data), kind) + data + bytes(padding(len(data)))


# -- writing


@given(
    st.text(st.characters(min_codepoint=1, max_codepoint=127), min_size=1, max_size=100), st.integers(0, (8 << 30) - 1)
)
def test_the_header_is_tarfiles(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_the_header_at_its_limits() -> None:
    info = tarfile.TarInfo("a" * 100)
    info.size = (8 << 30) - 1
    assert header(info.name, info.size) == info.tobuf(tarfile.USTAR_FORMAT)
    for name, size in (("a" * 101, 0), ("", 0), ("ä", 0), ("a\0b", 0), ("a", 8 << 30), ("a", -1)):
        with pytest.raises(FormatError):
            header(name, size)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1 << 20])
def test_padding(size: int) -> None:
    assert 0 <= padding(size) < BLOCK
    assert (size + padding(size)) % BLOCK == 0


# -- whole archives


names = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30
) | st.sampled_from(
    [
        "./sa_1.jpg",
        "../../etc/passwd",
        "/etc/passwd",
        "n" * 99,
        "n" * 100,
        "n" * 101,
        "d/" * 80 + "f",
        "x" * 300,
        "…" * 99,
        "a\nb",
        "\udcff",
    ]
)
kinds = st.sampled_from(
    [tarfile.REGTYPE] * 6
    + [
        tarfile.DIRTYPE,
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.FIFOTYPE,
        tarfile.CHRTYPE,
        tarfile.AREGTYPE,
        tarfile.CONTTYPE,
    ]
)
KIND = {
    tarfile.DIRTYPE: "directory",
    tarfile.SYMTYPE: "link",
    tarfile.LNKTYPE: "link",
    tarfile.FIFOTYPE: "other",
    tarfile.CHRTYPE: "other",
}


class Archive(bytes):
    """Bytes that are shown by what they hold."""

    def __repr__(self) -> str:
        try:
            with tarfile.open(fileobj=io.BytesIO(self)) as t:
                return f"<{[(m.type, m.size, m.name, m.pax_headers) for m in t]}>"
        except tarfile.TarError:
            return f"<{len(self)} bytes>"


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """Whatever tarfile can write."""
    format = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    out = io.BytesIO()
    pax = (
        draw(st.dictionaries(st.sampled_from(["comment", "path", "mtime"]), st.text(max_size=20), max_size=1))
        if format == tarfile.PAX_FORMAT
        else {}
    )
    pax.pop("path", None)
    with tarfile.open(fileobj=out, mode="w", format=format, encoding="utf-8", pax_headers=pax) as t:
        for _ in range(draw(st.integers(1 if pax else 0, 6))):  # tarfile cannot read a global header alone
            info = tarfile.TarInfo(draw(names))
            info.type = draw(kinds)
            if info.type == tarfile.AREGTYPE and (len(info.name) > 20 or info.name.endswith("/")):
                info.type = (
                    tarfile.REGTYPE
                )  # tarfile takes these for directories by a piece of their name, and loses their data
            info.linkname = draw(st.just("") | names)
            info.mtime = draw(
                st.sampled_from([0, 1_600_000_000, 1.25] if format == tarfile.PAX_FORMAT else [0, 1_600_000_000])
            )
            info.uname = draw(st.sampled_from(["", "root", "jörg"]))
            info.uid = draw(st.sampled_from([0, 1000, 1 << 22] if format != tarfile.USTAR_FORMAT else [0, 1000]))
            if format == tarfile.PAX_FORMAT:
                info.pax_headers = draw(
                    st.dictionaries(st.text("abc.é", min_size=1, max_size=5), st.text(max_size=9), max_size=2)
                )
            data = b""
            if info.type not in KIND:
                data = noise(draw(st.sampled_from([0, 1, 511, 512, 513, 1024, 3000, 70_000])), info.name)
            info.size = len(data)
            try:
                t.addfile(info, io.BytesIO(data))
            except ValueError:  # a name too long for ustar
                assume(False)
    return Archive(out.getvalue())


def packed(data: bytes, cuts: list[int]) -> bytes:
    """gzip members, the archive split at any bytes."""
    edges = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    return b"".join(gzip.compress(data[a:b], 1, mtime=0) for a, b in itertools.pairwise(edges))


@settings(max_examples=120, deadline=None)
@given(archives(), st.lists(st.integers(0, 1 << 20), max_size=3))
def test_any_archive_reads_as_tarfile_reads_it(data: bytes, cuts: list[int]) -> None:
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as t:
        expected = []
        for info in t:
            file = t.extractfile(info) if info.type not in KIND else None
            kind = KIND.get(info.type, "file")
            expected.append((info.name.rstrip("/"), info.offset, info.size, kind, file and file.read()))
    for form in (data, packed(data, cuts)):
        found = entries(form)
        # tarfile drops a slash at the end of any PAX name.
        assert [(e.name.rstrip("/"), e.offset, e.size, e.kind, d) for e, d in found] == expected
        assert [e.ordinal for e, _ in found] == list(range(len(found)))


@settings(max_examples=60, deadline=None)
@given(archives())
def test_what_is_not_wanted_is_passed_over(data: bytes) -> None:
    whole = entries(data)
    read = reader(data, keep=lambda entry: entry.ordinal % 2 == 0)
    found = [(entry, None if room is None else bytes(room)) for entry, room in read]
    assert found == [(entry, room if entry.ordinal % 2 == 0 else None) for entry, room in whole]


def test_salvage_changes_nothing_in_a_whole_archive() -> None:
    files = sample()
    assert salvage(archive(files)) == (dict(files), [])
    assert salvage(packed(archive(files), [1000, 2000])) == (dict(files), [])


def test_v7_headers_and_signed_checksums() -> None:
    old = by_hand(b"dir/", kind=b"\0", rest=b"") + by_hand(b"file", b"%11o " % 3, b"\0", b"") + b"abc".ljust(512, b"\0")
    assert [(e.name, e.kind, d) for e, d in entries(old + END)] == [
        ("dir", "directory", None),
        ("file", "file", b"abc"),
    ]
    block = bytearray(by_hand("sä".encode("latin-1")))
    signed = sum(b - 256 if b > 127 else b for b in bytes(block[:148]) + b" " * 8 + bytes(block[156:]))
    block[148:156] = b"%06o\0 " % signed
    assert [e.name for e, _ in entries(bytes(block) + END)] == ["s\udce4"]


@pytest.mark.parametrize(
    "field",
    [
        b"%11o\0" % 3,
        b"%011o " % 3,
        b"3\0",
        b"   3 \0\0",
        b"3 junk",
        b"\x80" + bytes(10) + b"\3",
        b"\0" + b"%010o\0" % 3,
    ],
)
def test_sizes_as_writers_have_written_them(field: bytes) -> None:
    assert entries(by_hand(b"a", field) + b"abc".ljust(512, b"\0") + END)[0][1] == b"abc"


@pytest.mark.parametrize(
    "field",
    [
        b"\xff" * 12,
        b"\xff" + bytes(11),
        b"\x80" + b"\xff" * 11,
        b"-1\0",
        b"0x10\0",
        b"99\0",
        b"1_0\0",
        b"+7\0",
        b"\0\0junk",
        b"7" * 11 + b"8",
        b"\xc0" + bytes(11),
    ],
)
def test_sizes_that_are_none_are_damage_of_that_header(field: bytes) -> None:
    whole = archive(sample(1))[:-1024]
    for kind in (b"0", b"5", b"L", b"x", b"S", b"1"):
        error = damage(whole + by_hand(b"a", field, kind) + bytes(512) + END)
        assert error.where == f"sa_000014.tar: byte {len(whole):,} of the tar"
        assert "size" in error.what


def test_long_names_and_pax_records() -> None:
    def x(data: bytes) -> bytes:
        return extension(b"x", data)

    def g(data: bytes) -> bytes:
        return extension(b"g", data)

    body = bytes(512)
    file = by_hand(b"short", b"%011o\0" % 5) + b"12345".ljust(512, b"\0")

    def read(data: bytes) -> list[tuple[str, int, int]]:
        return [(e.name, e.offset, e.size) for e, _ in entries(data + END)]

    assert read(x(record("path", "ä/b")) + file) == [("ä/b", 0, 5)]
    assert read(x(record("path", "p") + record("path", "q")) + file) == [("q", 0, 5)]
    assert read(extension(b"L", b"long\0") + file) == [("long", 0, 5)]
    assert read(extension(b"L", b"long") + x(record("path", "pax")) + file) == [("pax", 0, 5)]
    assert read(extension(b"K", b"link\0") + file) == [("short", 0, 5)]
    assert read(x(record("size", "512")) + by_hand() + body) == [("a", 0, 512)]
    assert read(g(record("comment", "c")) + file) == [("short", 1024, 5)]
    assert read(g(record("path", "all")) + file + x(record("path", "one")) + file) == [
        ("all", 1024, 5),
        ("one", 2048, 5),
    ]
    assert read(g(record("path", "a")) + file + g(record("path", "b")) + file) == [("a", 1024, 5), ("b", 3072, 5)]
    assert read(g(record("comment", "c")) * 2000) == []
    assert read(extension(b"X", record("path", "sun")) + file) == [("sun", 0, 5)]
    assert read(x(record("path", "zeros") + bytes(9)) + file) == [("zeros", 0, 5)]
    assert read(x(b"") + file) == [("short", 0, 5)]
    assert read(by_hand(b"name", rest=b"ustar\x0000" + bytes(80) + b"prefix")) == [("prefix/name", 0, 0)]
    assert read(by_hand(b"name", rest=b"ustar  \0" + bytes(80) + b"12345670123")) == [("name", 0, 0)]  # GNU: a time


@pytest.mark.parametrize(
    "records",
    [
        b"9 path=a\n",
        b"11 path=a\n",
        b"8 path=a\n",
        b"99999999 path=a\n",
        b"0 path=a\n",
        b"2 \n",
        b"-9 path=a\n",
        b"path=a\n",
        b"7 path\n",
        b"x",
        record("path", "a") + b"9",
        record("size", "-1"),
        record("size", "1e9"),
        record("size", "99999999999999999999"),
        record("size", ""),
    ],
)
def test_pax_records_that_lie_are_damage(records: bytes) -> None:
    if records == b"9 path=a\n":
        entries(extension(b"x", records) + by_hand() + END)  # the one that is right
        return
    whole = archive(sample(1))[:-1024]
    at = len(whole) + (1024 if b"size" in records else 0)
    assert f": byte {at:,} of the tar" in damage(whole + extension(b"x", records) + by_hand() + END).where


def test_a_long_name_is_bounded() -> None:
    error = damage(by_hand(b"././@LongLink", b"\x80" + (10 << 30).to_bytes(11, "big"), b"L") + bytes(2048) + END)
    assert str(error) == (
        "sa_000014.tar: byte 0 of the tar: a long name or PAX header is too long: "
        "expected at most 1,048,576 bytes, found 10,737,418,240"
    )
    assert damage(extension(b"x", b"") + END).what == "no header behind a long name or PAX header"


def test_links_with_and_without_data() -> None:
    """PAX allows data behind a hard link; other writers give the size of the target and no data."""
    size = b"%011o\0" % 700
    last = by_hand(b"last")
    for kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
        found = entries(by_hand(b"l", size, kind) + last + END)
        assert [(e.name, e.size) for e, _ in found] == [("l", 0), ("last", 0)]
        assert [(e.name, e.size) for e, _ in entries(by_hand(b"l", size, kind) + END)] == [("l", 0)]
    found = entries(by_hand(b"l", size, b"1") + noise(700).ljust(1024, b"\0") + last + END)
    assert [(e.name, e.size, e.kind, d) for e, d in found] == [("l", 700, "link", None), ("last", 0, "file", b"")]


def test_a_link_that_swallowed_a_header_is_damage() -> None:
    first = by_hand(b"l", b"%011o\0" % 1500, b"1") + noise(512)
    broken = first + by_hand(b"a") + by_hand(b"b") + by_hand(b"c") + END
    assert "swallowed the header of another" in damage(broken).what
    found, skipped = salvage(broken)
    assert list(found) == ["a", "b", "c"]
    assert [(s.offset, s.size) for s in skipped] == [(0, len(first))]


def test_a_tar_inside_the_tar_is_let_be_where_nobody_wants_it() -> None:
    inner = archive(sample(2))
    whole = archive([("inner.tar", inner), ("sa_1.jpg", b"x")])
    read = reader(whole, keep=lambda e: e.name != "inner.tar")
    assert [(e.name, e.size) for e, _ in read] == [("inner.tar", len(inner)), ("sa_1.jpg", 1)]
    assert "swallowed the header of another" in damage(whole).what


@pytest.mark.parametrize("kind", [b"D", b"M", b"N", b"V", b"A", b"Z", b"9"])
def test_kinds_that_only_their_writer_knows(kind: bytes) -> None:
    found = entries(by_hand(b"u", b"%011o\0" % 700, kind) + noise(700).ljust(1024, b"\0") + by_hand(b"last") + END)
    assert [(e.name, e.size, e.kind, d) for e, d in found] == [("u", 700, "other", None), ("last", 0, "file", b"")]


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
@pytest.mark.parametrize("form", [["gnu"], ["posix", "0.0"], ["posix", "0.1"], ["posix", "1.0"]])
def test_sparse_files_of_gnu_tar(tmp_path: Path, form: list[str]) -> None:
    with (tmp_path / "holes").open("wb") as file:
        for n in range(60):  # more pieces than fit the first header
            file.seek(n * 65536 + 4096)
            file.write(noise(4096, n))
        file.truncate(60 * 65536)
    (tmp_path / "last").write_bytes(b"last")
    command = [
        "tar",
        "--sparse",
        f"--format={form[0]}",
        *(f"--sparse-version={v}" for v in form[1:]),
        "-cf",
        "out.tar",
        "holes",
        "last",
    ]
    subprocess.run(command, cwd=tmp_path, check=True)
    found = entries((tmp_path / "out.tar").read_bytes())
    assert [(e.name, e.kind, d) for e, d in found] == [("holes", "sparse", None), ("last", "file", b"last")]
    assert 60 * 4096 <= found[0][0].size < 60 * 4096 + 8192


def test_padding_may_hold_anything() -> None:
    assert entries(by_hand(b"a", b"3") + b"abc" + noise(509) + END)[0][1] == b"abc"


def test_zeros_may_follow_the_end() -> None:
    for more in (0, 1, 511, 512, 10240, 200_000):
        assert len(entries(archive(sample()) + bytes(more))) == 6


# -- damage


def test_every_cut_is_damage_and_says_where() -> None:
    files = sample(2, 1200)
    whole = archive(files)
    cuts = {block + d for block in range(0, len(whole) + 1, BLOCK) for d in (-1, 0, 1)}
    for cut in sorted(cuts):
        if not 0 < cut < len(whole):
            continue
        error = damage(whole[:cut])
        assert error.where == f"sa_000014.tar: byte {cut:,} of the tar"
        assert error.what.startswith(("the file ends inside", "the archive has no end", "one zero block alone"))
        assert error.expected is not None
        assert error.found is not None
        # The same bytes, whole, inside gzip.
        assert str(damage(packed(whole[:cut], []))) == str(error)
        assert str(damage(packed(whole[:cut], [700]))) == str(error)
    assert damage(packed(b"", [])).what == "the archive has no end"


def test_every_cut_of_the_gzip_stream_is_damage() -> None:
    whole = archive([(name, bytes(data[:300])) for name, data in sample(1)])
    zipped = packed(whole, [1000])
    for cut in range(2, len(zipped)):
        error = damage(zipped[:cut])
        assert error.where.startswith("sa_000014.tar: byte ")
        assert "gzip" in str(error) or cut == len(packed(whole[:1000], []))


def test_what_a_cut_says() -> None:
    whole = archive([("sa_223750.jpg", noise(1_211_392))])
    assert str(damage(whole[:41_472])) == (
        "sa_000014.tar: byte 41,472 of the tar: the file ends inside sa_223750.jpg: "
        "expected 1,211,392 bytes, found 40,960"
    )
    assert str(damage(whole[:-1024])) == (
        "sa_000014.tar: byte 1,211,904 of the tar: the archive has no end: expected two zero blocks, found end of file"
    )


def test_a_header_that_is_overwritten_is_damage_not_an_end() -> None:
    files = sample()
    whole = archive(files)
    offsets = [e.offset for e, _ in entries(whole)]
    for offset in offsets:
        for new in (noise(512), bytes(512), b"\xff" * 512, bytes(1024), whole[offset : offset + 511] + b"x"):
            broken = whole[:offset] + new + whole[offset + len(new) :]
            error = damage(broken)
            assert f"byte {offset:,} of" in error.where or f"byte {offset + len(new):,} of" in error.where
            assert str(damage(packed(broken, [offset]))) == str(error)


def test_every_changed_byte_of_a_header_is_damage() -> None:
    whole = archive([("sa_1.jpg", b"abc"), ("sa_1.json", b"{}")])
    for at in [*range(512), *range(1024, 1536), *range(2048, 3072)]:
        for bit in (1, 0x80):
            broken = bytearray(whole)
            broken[at] ^= bit
            if at % 1024 in range(154, 156):  # behind the checksum's digits
                continue
            damage(bytes(broken))


@pytest.mark.parametrize("behind", [b"x", bytes(99) + b"x", noise(512), noise(100_000), bytes(10240) + noise(1)])
def test_garbage_behind_the_end_is_damage(behind: bytes) -> None:
    whole = archive(sample(1))
    for data in (whole + behind, packed(whole + behind, []), packed(whole, []) + packed(behind, [])):
        error = damage(data)
        assert error.what == "garbage behind the end"
        at = len(whole) + len(behind) - len(behind.lstrip(b"\0"))
        assert error.where == f"sa_000014.tar: byte {at - at % BLOCK:,} of the tar"


@pytest.mark.parametrize("zeros", [0, 512, 9216, 1 << 17])
def test_a_second_archive_behind_the_end_is_damage(zeros: int) -> None:
    first, second = archive(sample(1)), archive([("sa_9.jpg", noise(2000)), ("sa_9.json", noise(100))])
    data = first + bytes(zeros) + second
    for form in (data, packed(data, []), packed(first + bytes(zeros), []) + packed(second, [])):
        error = damage(form)
        assert error.what == "a second archive behind the end"
        assert error.where == f"sa_000014.tar: byte {len(first) + zeros:,} of the tar"
    found, skipped = salvage(data)
    assert list(found) == ["./sa_0.jpg", "./sa_0.json", "sa_9.jpg", "sa_9.json"]
    assert [(s.offset, s.size) for s in skipped] == [(len(first) + zeros, 0)]
    assert "second archive" in skipped[0].reason


def test_one_zero_block_alone_is_damage() -> None:
    files = sample(2)
    whole = archive(files[:2])[:-512] + archive(files[2:])
    error = damage(whole)
    assert error.what == "one zero block alone, where an archive ends with two"
    found, skipped = salvage(whole)
    assert found == dict(files)
    assert [(s.offset, s.size) for s in skipped] == [(len(archive(files[:2])) - 1024, 512)]


def test_a_damaged_second_gzip_member_says_which() -> None:
    whole = archive(sample(2, 20_000))
    first = gzip.compress(whole[:30_000], mtime=0)
    second = bytearray(gzip.compress(whole[30_000:], mtime=0))
    second[-8] ^= 1
    error = damage(first + bytes(second))
    assert f"(gzip member at compressed byte {len(first):,})" in error.where
    assert f"byte {len(whole):,} of the tar" in error.where
    assert "checksum" in error.what


def test_hostile_names_are_reported_in_one_harmless_line() -> None:
    for name in (b"\x1b[2J\n" + b"a" * 50, b"\xff\xfe", b"a" * 100):
        text = str(damage(by_hand(name, b"%011o\0" % 900) + b"short"))
        assert "\n" not in text
        assert text.isprintable()
    data = extension(b"L", b"x" * 500_000) + by_hand(b"x", b"%011o\0" % 900)
    assert len(str(damage(data))) < 500


def test_room_of_the_wrong_kind_is_never_filled_beyond() -> None:
    """A directory, link or device is never allocated for, whatever size it states."""
    asked: list[Entry] = []
    data = b"".join(by_hand(b"l", b"%011o\0" % 700, kind) for kind in (b"1", b"2", b"3", b"5")) + END
    stream = open_bytes(io.BytesIO(data), WHERE)
    assert [e.kind for e, _ in Reader(stream, allocate=lambda e: asked.append(e))] == [
        "link",
        "link",
        "other",
        "directory",
    ]
    assert not asked


# -- salvage


def test_salvage_loses_only_what_is_damaged() -> None:
    files = sample(4, 3000)
    whole = archive(files)
    offsets = [e.offset for e, _ in entries(whole)] + [len(whole) - 1024]
    for n, (name, _) in enumerate(files):
        for new in (noise(512), bytes(512)):
            broken = whole[: offsets[n]] + new + whole[offsets[n] + 512 :]
            found, skipped = salvage(broken)
            assert found == {k: v for k, v in files if k != name}
            assert skipped[0].offset == offsets[n]
            assert sum(s.size for s in skipped) == offsets[n + 1] - offsets[n]
            gapless, _ = salvage(packed(broken, [offsets[n]]))
            assert gapless == found


def test_salvage_of_a_cut_archive() -> None:
    files = sample(2, 3000)
    whole = archive(files)
    offsets = [e.offset for e, _ in entries(whole)] + [len(whole) - 1024]
    for cut in range(1, len(whole), 97):
        found, skipped = salvage(whole[:cut])
        complete = [name for n, (name, data) in enumerate(files) if offsets[n] + 512 + len(data) <= cut]
        assert list(found) == complete
        assert skipped
        assert "end" in skipped[-1].reason


def test_salvage_where_bytes_are_missing_in_a_member() -> None:
    files = sample(3, 5000)
    whole = archive(files)
    at = [e.offset for e, _ in entries(whole)][2] + 1024
    broken = whole[:at] + whole[at + 1536 :]
    assert "swallowed the header of another" in damage(broken).what
    found, skipped = salvage(broken)
    assert found == {k: v for n, (k, v) in enumerate(files) if n != 2}
    assert len(skipped) == 1
    assert "swallowed" in skipped[0].reason
    last = whole[: at - 1024] + whole[at:]  # now without a header of its own, so nobody has swallowed anything
    assert "not a tar header" in damage(last).what
    assert salvage(last)[0] == found


@pytest.mark.parametrize("size", [1, 265, 511, 512, 900, 1024])
@pytest.mark.parametrize("keep", [True, False])
def test_a_member_that_swallowed_the_next_is_damage(size: int, keep: bool) -> None:
    """Without its last data block the first takes the second's header for data, and a header or the end follows."""
    whole = archive([("sa_0.jpg", noise(size)), ("sa_0.json", b"")])
    at = size + padding(size)
    broken = whole[:at] + whole[at + 512 :]
    with pytest.raises(SourceDamaged, match=r"byte 0 of the tar: bytes are missing in sa_0\.jpg"):
        list(reader(broken, keep=lambda _: keep))
    found, skipped = salvage(broken)
    assert found == {"sa_0.json": b""}
    assert [(s.offset, s.size) for s in skipped] == [(0, at)]


def test_salvage_where_bytes_are_too_many() -> None:
    files = sample(3, 5000)
    whole = archive(files)
    at = [e.offset for e, _ in entries(whole)][3]
    found, skipped = salvage(whole[:at] + noise(2048) + whole[at:])
    assert found == dict(files)
    assert [(s.offset, s.size) for s in skipped] == [(at, 2048)]


def test_salvage_finds_headers_at_any_byte_after_a_gap() -> None:
    files = sample(40, 30_000)
    whole = archive(files)
    edges = [0, 600_001, 1_200_003, len(whole)]
    parts = [gzip.compress(whole[a:b], 6, mtime=0) for a, b in itertools.pairwise(edges)]
    parts[1] = parts[1][:300_000] + bytes(64) + parts[1][300_064:]
    data = b"".join(parts)
    damage(data)
    read = reader(data, on_damage="salvage")
    found = {e.name: bytes(room) for e, room in read if room is not None}
    stream = read._stream
    assert stream.position == accounts(read)
    offsets = [e.offset for e, _ in entries(whole)]
    hurt = range(600_001 + 298_000 - 40_000, 1_200_003)
    for (name, content), offset in zip(files, offsets, strict=True):
        if offset + 512 + len(content) < hurt.start or offset >= hurt.stop:
            assert found[name] == content
    assert len(found) < len(files)
    assert any("gzip" in s.reason for s in read.skipped)


def test_digits_that_happen_to_be_a_checksum_are_no_header() -> None:
    """Found by fuzzing: the size 3754 is also the sum of the 512 bytes that hold it where a checksum would stand."""
    data = noise(3754)
    whole = archive([("sa_0.jpg", b""), ("sa_1.jpg", data)])
    first = gzip.compress(whole[:1], 0, mtime=0)
    read = reader(first[:10] + first[11:] + gzip.compress(whole[1:], 0, mtime=0), on_damage="salvage")
    assert [(e.name, room and bytes(room)) for e, room in read] == [("sa_1.jpg", data)]


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_salvage_recovers_what_intact_gzip_members_hold(draw: st.DataObject) -> None:
    files = [(f"sa_{n}.jpg", noise(draw.draw(st.integers(0, 4000)), n)) for n in range(draw.draw(st.integers(2, 9)))]
    whole = archive(files)
    cuts = draw.draw(st.lists(st.integers(0, len(whole)), max_size=6))
    edges = sorted({0, *cuts, len(whole)})
    level = draw.draw(st.sampled_from([0, 1, 6]))
    parts = [gzip.compress(whole[a:b], level, mtime=0) for a, b in itertools.pairwise(edges)]
    hurt = draw.draw(st.sets(st.integers(0, len(parts) - 1), max_size=2))
    for n in hurt:
        at = draw.draw(st.integers(10, len(parts[n]) - 1))
        new = draw.draw(st.sampled_from([b"", bytes(20), noise(30, at)]))
        parts[n] = parts[n][:at] + new + parts[n][at + draw.draw(st.integers(0, 40)) :]
    data = b"".join(parts)
    read = reader(data, on_damage="salvage")
    found = {e.name: bytes(room) for e, room in read if room is not None}
    assert read._stream.position == accounts(read)
    at = 0
    for name, content in files:
        span = (at, at + BLOCK + len(content))
        if not any(edges[n] < span[1] and span[0] < edges[n + 1] for n in hurt):
            assert found.get(name) == content
        at += BLOCK + len(content) + padding(len(content))


def test_salvage_of_nothing_but_garbage() -> None:
    found, skipped = salvage(noise(100_000))
    assert not found
    assert sum(s.size for s in skipped) == 100_000


@st.composite
def damages(draw: st.DrawFn) -> tuple[list[tuple[str, bytes]], bytes, set[str]]:
    """An archive, the same one damaged, and the names of what the damage did not touch."""
    sizes = draw(st.lists(st.integers(0, 9000), min_size=2, max_size=8))
    files = [(f"sa_{n}.jpg", noise(size, n)) for n, size in enumerate(sizes)]
    whole = archive(files)
    spans = {}
    at = 0
    for name, data in files:
        spans[name] = (at, at + 512 + len(data))
        at += 512 + len(data) + padding(len(data))
    start = draw(st.integers(0, len(whole) - 1))
    size = draw(st.integers(1, 3000))
    what = draw(st.sampled_from(["overwrite", "zero", "delete", "insert", "cut"]))
    if what in ("delete", "insert"):
        start -= start % BLOCK
        size += padding(size)
    end = min(len(whole), start + size)
    new = {
        "overwrite": noise(end - start),
        "zero": bytes(end - start),
        "delete": b"",
        "insert": noise(size),
        "cut": b"",
    }[what]
    end = {"insert": start, "cut": len(whole)}.get(what, end)
    untouched = {
        name
        for name, (a, b) in spans.items()
        if b <= start or (what != "insert" and a >= end) or (what == "insert" and a >= start)
    }
    assume(start or end < len(whole) or new)  # an empty file is another error
    return files, Archive(whole[:start] + new + whole[end:]), untouched


@settings(max_examples=400, deadline=None)
@given(damages())
def test_salvage_recovers_everything_that_is_whole(case: tuple[list[tuple[str, bytes]], bytes, set[str]]) -> None:
    files, broken, untouched = case
    found, _ = salvage(broken)
    lost = {name for name, data in files if name in untouched and found.get(name) != data}
    assert not lost
    with_errors = reader(broken)
    try:
        strict = {e.name: bytes(room) for e, room in with_errors if room is not None}
    except SourceDamaged:
        return
    assert strict == found


@settings(max_examples=300, deadline=None)
@given(archives(), st.data())
def test_any_changed_byte_is_survived(data: bytes, draw: st.DataObject) -> None:
    """Whatever a byte becomes: members or SourceDamaged, in both modes, plain and zipped; accounts even."""
    broken = bytearray(draw.draw(st.sampled_from([data, packed(data, [700])])))
    for _ in range(draw.draw(st.integers(1, 4))):
        broken[draw.draw(st.integers(2, len(broken) - 1))] = draw.draw(st.integers(0, 255))
    try:
        for _ in reader(bytes(broken)):
            pass
    except SourceDamaged as error:
        assert error.where.startswith("sa_000014.tar: ")
    read = reader(bytes(broken), on_damage="salvage")
    for _ in read:
        pass
    assert read._stream.position == accounts(read)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["header", "zero", "noise", "pax", "long", "link", "sparse", "global"]), max_size=9),
    st.integers(0, 600),
)
def test_any_blocks_are_survived(blocks: list[str], cut: int) -> None:
    pieces = {
        "header": by_hand(b"a", b"%011o\0" % 300),
        "zero": bytes(512),
        "noise": noise(512),
        "pax": extension(b"x", record("size", "100000")),
        "long": extension(b"L", b"name"),
        "link": by_hand(b"l", b"%011o\0" % 600, b"1"),
        "sparse": by_hand(b"s", b"%011o\0" % 600, b"S", b"ustar  \0".ljust(225, b"\0") + b"\1"),
        "global": extension(b"g", record("path", "p")),
    }
    data = b"".join(pieces[b] for b in blocks)
    data = data[: max(1, len(data) - cut)] if data else b"\0"
    try:
        for _ in reader(data, keep=lambda e: e.size < 4000):
            pass
    except SourceDamaged:
        pass
    read = reader(data, on_damage="salvage", keep=lambda e: e.size < 4000)
    for _ in read:
        pass
    assert accounts(read) == len(data)


def test_absurd_archives_do_not_take_quadratic_time() -> None:
    """A member of valid headers that are themselves damaged behind: each is looked at a bounded number of times."""
    inner = b"".join(by_hand(b"x%d" % n, b"%011o\0" % (1 << 20)) + noise(512, n) for n in range(2000))
    read = reader(
        by_hand(b"outer", b"%011o\0" % len(inner)) + inner + noise(512), on_damage="salvage", keep=lambda e: True
    )
    for _ in read:
        pass
    assert accounts(read) == len(inner) + 1024


def test_the_reader_needs_nothing_but_the_protocol() -> None:
    stream = open_bytes(io.BytesIO(archive(sample(1))), WHERE)
    assert isinstance(stream, Plain)
    assert [e.name for e, _ in tar.Reader(stream, allocate=lambda _: None)] == ["./sa_0.jpg", "./sa_0.json"]
