"""The example files: each one loads, has every key of its sections, and explains it."""

import re
import tomllib
from pathlib import Path

import pytest

from sa1b_wds.config import SECTIONS, Plan, load

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(path.name for path in FOLDER.glob("*.toml"))


def test_all_of_them_are_there() -> None:
    assert {"local.toml", "s3.toml", "gcs.toml", "links-to-s3.toml", "train-sam.toml"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_it_loads_and_explains_every_key(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    everything = tomllib.loads(re.sub(r"(?m)^# (\w+ = )", r"\1", text))
    for section, keys in everything.items():
        inherited = Plan.__struct_fields__ if section == "convert" else ()
        assert list(keys) == [key for key in SECTIONS[section].__struct_fields__ if key not in inherited], section
    for section in tomllib.loads(text):
        load(FOLDER / name, SECTIONS[section])
    for line in text.splitlines():
        assert len(line) <= 120
        if re.match(r"(# )?\w+ = |\[", line):
            assert re.search(r" # \w", line[2:]), f"not explained: {line}"
