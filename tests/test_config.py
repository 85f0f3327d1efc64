"""Options: sizes, defaults, precedence, and one clear line for every mistake."""

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa1b_wds import config
from sa1b_wds.config import SECTIONS, Convert, Finalize, Plan, Restore, Stream, Verify, load, parse_size, section
from sa1b_wds.errors import ConfigError, UsageError

LOCAL = Path(__file__).parents[1] / "configs" / "local.toml"


def write(folder: Path, text: str) -> Path:
    file = folder / "x.toml"
    file.write_text(text, encoding="utf-8")
    return file


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GiB", 1 << 30), ("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("64KiB", 65536), ("2TiB", 2 << 40),
        ("100MB", 100_000_000), ("1kB", 1000), ("1KB", 1000), ("7B", 7), ("4096", 4096), (4096, 4096), ("0", 0),
        (" 3 MiB ", 3 << 20), ("0.1GB", 100_000_000),
    ],
)  # fmt: skip
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "1G", "1gib", "1 mib", "-1", -1, "1.5", "1..5GiB", "1e9", "1,000", "１GiB", True, "1GiB 2"]
)
def test_not_sizes(text: str | int) -> None:
    with pytest.raises(ValueError, match=r"not a size: .*; write 512MiB, 1GiB, 100MB or whole bytes"):
        parse_size(text)


@given(st.integers(0, 1 << 70))
def test_whole_bytes_are_exact(size: int) -> None:
    assert parse_size(str(size)) == parse_size(size) == parse_size(f"{size}B") == size
    assert parse_size(f"{size}GiB") == size << 30


# ---- what wins -------------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    options = load(None, Convert)
    assert (options.shard_size, options.pairing_buffer) == (1 << 30, 512 << 20)
    assert (options.mix, options.seed, options.max_quarantine) == (4, 0, 0.001)
    assert (options.engine, options.on_damage) == ("local", "fail")
    assert (options.workers, options.scratch, options.assume_size, options.out) == (None, None, None, None)
    assert options.sources == []


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, '[convert]\nworkers = 2\nmix = 8\nshard_size = "2GiB"\nscratch = "/s"\n')
    options = load(file, Convert, workers=3, mix=None, shard_size=None, pairing_buffer="1MiB", seed=0)
    assert (options.workers, options.mix, options.shard_size, options.pairing_buffer) == (3, 8, 2 << 30, 1 << 20)
    assert options.scratch == Path("/s")
    assert options.on_damage == "fail"
    # Falsy values of the command line are values.
    file = write(tmp_path, "[verify]\ndeep = true\nagainst = ['a']\n")
    assert load(file, Verify).deep is True
    assert load(file, Verify, deep=False, against=[]) == Verify(deep=False, against=[])


def test_convert_takes_from_plan_what_it_lacks(tmp_path: Path) -> None:
    file = write(tmp_path, "[plan]\nsources = ['a']\nmix = 2\nseed = 1\ndry_run = true\n[convert]\nseed = 5\n")
    assert section(file, "convert") == {"sources": ["a"], "mix": 2, "seed": 5}
    assert load(file, Plan) == Plan(sources=["a"], mix=2, seed=1, dry_run=True)


def test_dest_is_where_plan_writes(tmp_path: Path) -> None:
    file = write(tmp_path, "[plan]\nout = 'here'\n[verify]\ndest = 'there'\n[restore]\nout = 'tars'\n")
    assert load(file, Finalize).dest == "here"
    assert load(file, Verify).dest == "there"
    assert load(file, Stream).dest == "here"
    assert (load(file, Restore).dest, load(file, Restore).out) == ("here", Path("tars"))
    assert load(file, Finalize, dest="elsewhere").dest == "elsewhere"


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    for name, schema in SECTIONS.items():
        assert section(write(tmp_path, ""), name) == {}
        assert load(write(tmp_path, f"[{name}]"), schema) == schema()


# ---- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = [
    ('[convert]\nworkers = "four"', 'convert.workers: expected int >= 1, found str "four"'),
    ("[convert]\nworkers = 0", "convert.workers: expected int >= 1, found int 0"),
    ("[convert]\nworkers = true", "convert.workers: expected int >= 1, found bool true"),
    ("[convert]\nworkers = 2.0e30", "convert.workers: expected int >= 1, found float 2e+30"),
    ("[convert]\nwrokers = 4", "convert.wrokers: unknown key, did you mean workers?"),
    ("[finalize]\nzzz = 4", "finalize.zzz: unknown key, known are dest, partial"),
    ("[verify]\nmix = 4", "verify.mix: unknown key; it belongs in [plan] or [convert]"),
    ("[covert]\nworkers = 4", "[covert]: unknown section, did you mean convert?"),
    ("[zzz]", f"[zzz]: unknown section, known are {', '.join(SECTIONS)}"),
    ("mix = 4", "mix: stands in no section; it belongs in [plan] or [convert]"),
    ("zzz = 4", "zzz: stands in no section"),
    ("convert = 4", "convert: expected a section, found int 4"),
    ("[[convert]]", "convert: expected a section, found a list"),
    ("[convert.workers]", "convert.workers: expected int >= 1, found a section"),
    ('[plan]\nshard_size = "1G"', 'plan.shard_size: expected a size such as 512MiB, found str "1G"'),
    ("[plan]\nshard_size = 0", "plan.shard_size: expected a size such as 512MiB, found int 0"),
    ("[plan]\nassume_size = 1.5", "plan.assume_size: expected a size such as 512MiB, found float 1.5"),
    ("[plan]\nsources = 'a'", 'plan.sources: expected list of str, found str "a"'),
    ("[plan]\nsources = ['a', 3]", "plan.sources[1]: expected str, found int 3"),
    ("[plan]\nseed = -1", "plan.seed: expected int >= 0 and <= 9,223,372,036,854,775,807, found int -1"),
    ("[stream]\nmasks_per_image = 0", "stream.masks_per_image: expected int >= 1, found int 0"),
    ("[convert]\non_damage = 'skip'", 'convert.on_damage: expected "fail" or "salvage", found str "skip"'),
    ("[convert]\nscratch = 1", "convert.scratch: expected a path, found int 1"),
    ("[convert]\nmax_quarantine = 1.5", "convert.max_quarantine: expected float >= 0 and <= 1, found float 1.5"),
    ("[convert]\nmax_quarantine = nan", "convert.max_quarantine: expected float >= 0 and <= 1, found float NaN"),
    ("[verify]\ndeep = 1", "verify.deep: expected bool, found int 1"),
    ("[plan]\nmix = 1979-05-27", "plan.mix: expected int >= 1, found date 1979-05-27"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_a_mistake_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    for name in ("convert", "stats"):  # a mistake in another section is a mistake too
        with pytest.raises(ConfigError) as caught:
            section(file, name)
        assert str(caught.value) == f"{file}: {message}"
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: no such file or directory"):
        load(tmp_path / "none.toml", Convert)
    with pytest.raises(ConfigError, match="cannot be read: is a directory"):
        load(tmp_path, Convert)
    # The rest of the message is Python's own.
    with pytest.raises(ConfigError, match=r"x\.toml: is not TOML: .*\(at line 2, column 6\)$"):
        load(write(tmp_path, "[plan]\nmix =\n"), Convert)
    file = tmp_path / "x.toml"
    file.write_bytes(b"# caf\xe9\n")
    with pytest.raises(ConfigError, match="is not UTF-8, at byte 5"):
        load(file, Convert)


def test_a_mistake_on_the_command_line_names_the_option(tmp_path: Path) -> None:
    file = write(tmp_path, "[convert]\nworkers = 2")
    with pytest.raises(UsageError) as caught:
        load(file, Convert, pairing_buffer="1G")
    assert str(caught.value) == '--pairing-buffer: wrong value: expected a size such as 512MiB, found str "1G"'
    with pytest.raises(UsageError, match="--max-quarantine: wrong value: expected float >= 0 and <= 1, found int 2"):
        load(None, Convert, max_quarantine=2)


# ---- the explained example -------------------------------------------------------------------------------------------


def test_local_toml_explains_every_option() -> None:
    text = LOCAL.read_text(encoding="utf-8")
    # Options without a default stand as comments.
    everything = tomllib.loads(re.sub(r"(?m)^# (\w+ = )", r"\1", text))
    assert list(everything) == list(SECTIONS)
    for name, schema in SECTIONS.items():
        inherited = Plan.__struct_fields__ if name == "convert" else ()
        assert list(everything[name]) == [key for key in schema.__struct_fields__ if key not in inherited], name
    assert max(map(len, text.splitlines())) <= 120
    for line in text.splitlines():
        if re.match(r"(# )?\w+ = |\[", line):
            assert re.search(r" # \w", line[2:]), f"not explained: {line}"


def test_local_toml_states_the_defaults(tmp_path: Path) -> None:
    paths = {"sources", "out", "dest"}
    for name, schema in SECTIONS.items():
        said = {key: value for key, value in section(LOCAL, name).items() if key not in paths}
        defaults = schema()
        assert said == {key: getattr(defaults, key) for key in said}
        commented = {key for key in schema.__struct_fields__ if getattr(defaults, key) is None}
        assert set(said) == set(schema.__struct_fields__) - commented - paths
    file = write(tmp_path, re.sub(r"(?m)^# (\w+ = )", r"\1", LOCAL.read_text(encoding="utf-8")))
    assert load(file, Convert).workers == 8  # what stands in the comments is valid, too


def test_schemas_are_complete() -> None:
    for name, schema in SECTIONS.items():
        assert name == schema.SECTION
        assert schema.__name__ in config.__all__
        for key in schema.__struct_fields__:
            assert key.isidentifier() and key == key.lower()
