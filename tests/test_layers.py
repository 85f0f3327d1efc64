"""The shape of the project: levels, two pipelines, one seam for each heavy package, one tree of errors."""

import ast
import copy
import importlib
import inspect
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import sa1b_wds
from sa1b_wds import errors

PACKAGE = Path(sa1b_wds.__file__).parent

# Read from left to right, top to bottom: a module imports only what stands before it. So there are no cycles either.
# What is imported for types alone may also stand behind it in the same level: a stream names the data set it is of.
LEVELS = {
    0: "errors exclusion format geometry jit memory permutation",
    1: "files limits traffic transfer web clouds signing remote links uploads process pipe objects storage extents "
    "cache ranged ahead lanes buffers inflate tar codes raster rle plan order selection augment world differences",
    2: "annotations images recoding manifest state choice keys layout sidecars batch",
    3: "heartbeat sample runs source shard reader members schedule decode assembly stats examples table figure",
    4: "convert publication restore pipeline stream dataset facts accounts contents comparison deletion "
    "verify report export",
    5: "config status engines engines_ray log progress interop synth cli",
}

# They meet only in the format: neither imports the other, by whatever way.
CONVERT = {
    "heartbeat", "sample", "source", "shard", "convert", "runs", "publication", "status", "engines", "engines_ray",
    "progress",
}  # fmt: skip
STREAM = {
    "order", "state", "choice", "augment", "reader", "schedule", "decode", "assembly", "batch", "pipeline", "stream",
    "dataset", "cache", "extents",
}  # fmt: skip

# Packages that one module hides from the rest of the project, so that each can be exchanged there.
SEAMS = {
    "numba": {"jit"},
    "isal": {"inflate", "synth"},
    "cv2": {"images", "synth"},
    "simplejpeg": {"images", "synth"},
    "cyclopts": {"cli"},
    "rich": {"cli", "progress", "report"},
    "pycocotools": set(),
    "safetensors": set(),
    "torch": {f"interop.torch{part}" for part in ("", ".board", ".masks", ".stream", ".tensors")} | {"world"},
    "ray": {"engines_ray"},
    "obstore": {"clouds"},
    "boto3": {"clouds"},
    "webdataset": {"interop.webdataset"},
    "tensorflow": {"interop.tfds"},
    "pandas": {"table"},
    "pyarrow": {"table", "export"},
    "PIL": {"figure"},
}

NOT_LOADED = ("torch", "numba", "webdataset", "obstore", "cv2", "simplejpeg", "ray", "tensorflow", "rich", "cyclopts")


def modules() -> dict[str, Path]:
    """All modules but `__init__`: dotted name without the package → file."""
    names = {path: path.relative_to(PACKAGE).with_suffix("").as_posix() for path in sorted(PACKAGE.rglob("*.py"))}
    return {
        name.removesuffix("/__init__").replace("/", "."): path for path, name in names.items() if name != "__init__"
    }


MODULES = modules()


def imports(name: str) -> Iterator[tuple[int, str, bool]]:
    """(line, absolute name, for types alone) of everything a module imports, anywhere in it: in functions, too."""
    path = MODULES[name]
    package = ["sa1b_wds", *name.split(".")[: None if path.name == "__init__.py" else -1]]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typed = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, node in typed) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            for alias in node.names:
                target = ".".join([*base, *([node.module] if node.module else []), alias.name])
                yield node.lineno, target, node in typed


def own(name: str) -> Iterator[tuple[int, str, bool]]:
    """(line, module, for types alone) of what a module imports from this project."""
    for line, target, typed in imports(name):
        first, _, rest = target.partition(".")
        if first != "sa1b_wds":
            continue
        while rest and rest not in MODULES:  # a name in a module
            rest = rest.rpartition(".")[0]
        yield line, rest or "__init__", typed


def place(name: str) -> tuple[int, int]:
    for level, row in LEVELS.items():
        if name.split(".")[0] in row.split():
            return level, row.split().index(name.split(".")[0])
    raise AssertionError(f"{name} stands in no level: put it into LEVELS where it belongs")


def test_every_module_stands_in_one_level() -> None:
    listed = [name for row in LEVELS.values() for name in row.split()]
    assert len(listed) == len(set(listed))
    assert sorted(listed) == sorted({name.split(".")[0] for name in MODULES})


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_downwards(name: str) -> None:
    for line, target, typed in own(name):
        if name.startswith("interop") and target.startswith("interop"):
            continue
        assert target != "__init__", f"{name}:{line} imports the package itself, or a module that is not there"
        behind = place(target)[0] > place(name)[0] if typed else place(target) >= place(name)
        assert not behind, f"{name}:{line} imports {target}, which stands behind it"


def test_adapters_know_nothing_of_each_other() -> None:
    for name in MODULES:
        adapter = ".".join(name.split(".")[:2])
        if name.startswith("interop."):
            others = [target for _, target, _ in own(name) if not f"{target}.".startswith(f"{adapter}.")]
            assert not [target for target in others if target.startswith("interop.")], name


@pytest.mark.parametrize(("pipeline", "other"), [(CONVERT, STREAM), (STREAM, CONVERT)], ids=["convert", "stream"])
def test_the_pipelines_never_meet(pipeline: set[str], other: set[str]) -> None:
    assert pipeline | other <= {name for row in LEVELS.values() for name in row.split()}
    reached = pipeline & set(MODULES)
    waiting = list(reached)
    while waiting:
        new = {target for _, target, _ in own(waiting.pop()) if target in MODULES} - reached
        reached |= new
        waiting += new
    assert not reached & other


@pytest.mark.parametrize("package", SEAMS)
def test_one_module_hides_a_package(package: str) -> None:
    users = {name for name in MODULES for _, target, _ in imports(name) if target.split(".")[0] == package}
    assert users <= SEAMS[package]


def test_import_loads_nothing_heavy() -> None:
    code = "import sys, sa1b_wds; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "sa1b_wds" in loaded
    assert {module.split(".")[0] for module in loaded} & set(NOT_LOADED) == set()


def defined(module: ModuleType) -> set[str]:
    """Public classes and functions that stand in a module itself."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    }


def test_all_is_what_is_public() -> None:
    public = {
        name for name in dir(sa1b_wds) if not name.startswith("_") and not inspect.ismodule(getattr(sa1b_wds, name))
    }
    assert set(getattr(sa1b_wds, "__all__", ())) == public
    for name in sorted(public):
        assert inspect.getdoc(getattr(sa1b_wds, name)), f"sa1b_wds.{name} has no docstring"


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("interop")])
def test_all_of_a_module_names_what_it_defines(name: str) -> None:
    module = importlib.import_module(f"sa1b_wds.{name}")
    assert inspect.getdoc(module)
    if (listed := getattr(module, "__all__", None)) is not None:
        assert sorted(set(listed)) == sorted(listed)
        assert all(hasattr(module, entry) for entry in listed)


# ---- errors ----------------------------------------------------------------------------------------------------------

ERRORS = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, errors.Sa1bError)]


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_pickle_with_all_their_data(kind: type[errors.Sa1bError]) -> None:
    for arguments in (("s3://b/x.tar: byte 7", "is cut", 1_211_392, 40_960), ("", "what"), ("w", "x", None, "f\n")):
        error = kind(*arguments)
        again = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
        for other in (*again, copy.copy(error), copy.deepcopy(error)):
            assert type(other) is kind
            assert vars(other) == vars(error)
            assert other.args == error.args
            assert str(other) == str(error)
            assert other.exit_code == error.exit_code


def test_the_message_has_where_what_expected_found() -> None:
    error = errors.ShardDamaged("s3://b/x.tar: byte 48,211,968", "sa_1.jpg is cut", 1_211_392, 40_960)
    assert str(error) == "s3://b/x.tar: byte 48,211,968: sa_1.jpg is cut: expected 1,211,392, found 40,960"


def test_the_tree_in_the_docstring_is_the_real_one() -> None:
    drawn: dict[str, tuple[str | None, int]] = {}
    above: list[tuple[int, str, int]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"([ │├└─]*)(\w+)\s*(?:exit (\d))?", line)
        if not found or found[2] not in vars(errors):
            continue
        while above and above[-1][0] >= len(found[1]):
            above.pop()
        exit_code = int(found[3]) if found[3] else above[-1][2] if above else errors.Sa1bError.exit_code
        drawn[found[2]] = (above[-1][1] if above else None, exit_code)
        above.append((len(found[1]), found[2], exit_code))
    real = {}
    for kind in ERRORS:
        (base,) = kind.__bases__
        real[kind.__name__] = (base.__name__ if base in ERRORS else None, kind.exit_code)
    assert drawn == real


def test_only_errors_of_the_tree_are_raised() -> None:
    """`raise` names a class of `errors`, one that Python's protocols ask for, or a name that was caught or made."""
    allowed = {kind.__name__ for kind in ERRORS} | {
        "ValueError",  # where msgspec or the command line turns it into an error with its place
        "TypeError", "AssertionError", "NotImplementedError", "StopIteration", "IndexError", "KeyError",
        "AttributeError", "KeyboardInterrupt", "SystemExit",
    }  # fmt: skip
    builtin = set(vars(__builtins__) if inspect.ismodule(__builtins__) else __builtins__)
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and node.exc is not None:
                raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                if isinstance(raised, ast.Name) and raised.id in builtin:
                    assert raised.id in allowed, f"{name}:{node.lineno} raises {raised.id}"
