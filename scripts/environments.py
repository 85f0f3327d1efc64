"""Environments of their own for the readers and oracles that ours cannot hold: made once, below `.venv-readers/`.

    python scripts/environments.py wids ray      makes these, if they are not there
    python scripts/environments.py all

Needs nothing but Python >= 3.11 and pip. Versions are pinned: what the tests read with is what the README names.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv-readers"

REQUIREMENTS = {
    # wids was taken out of webdataset 1.0; it imports torch.distributed.
    "wids": ["webdataset==0.2.111", "torch==2.13.0"],
    "huggingface": ["datasets==5.2.0", "pillow"],
    "energon": ["megatron-energon==7.4.1", "torch==2.13.0"],
    "dali": ["nvidia-dali-cuda120==2.4.0", "numpy"],
    "ray": ["ray[data]==2.60.0", "pillow"],
    "engine": ["ray==2.60.0", "-e", str(ROOT)],  # the converter on a Ray cluster
    "training": ["lightning", "accelerate", "transformers", "torch==2.13.0", "-e", str(ROOT)],
    "gsutil": ["gsutil==5.38"],  # which writes to GCS' emulator
    "s3fs": ["s3fs==2026.9.0"],  # a rival of scripts/bench/storage
    "tfds": [
        "tensorflow-datasets==4.9.10",
        "tensorflow-cpu==2.21.0",
        "apache-beam==2.77.0",
        "importlib_resources",
        "pillow",
        "-e",
        str(ROOT),
    ],
}
"""What pip installs into each."""

SERVERS = {"azurite": "azurite@3.35.0"}
"""What npm installs into each: servers that the tests start, where Node.js is there."""


def python(name: str) -> Path | None:
    """The interpreter of an environment; None where it is not there."""
    path = FOLDER / name / "bin" / "python"
    return path if (FOLDER / name / "stamp").exists() and path.exists() else None


def make_server(name: str) -> None:
    """Install a server by npm, if need be.

    Raises:
        CalledProcessError, FileNotFoundError: npm could not install it, or is not there.
    """
    folder = FOLDER / name
    stamp = folder / "stamp"
    if stamp.exists() and stamp.read_text() == SERVERS[name]:
        return
    print(f"Setting up {folder.relative_to(ROOT)}, the first time only ...", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    quiet = ["--no-audit", "--no-fund", "--loglevel=error"]
    subprocess.run(["npm", "install", *quiet, "--prefix", str(folder), SERVERS[name]], check=True, timeout=600)
    stamp.write_text(SERVERS[name])


def make(name: str) -> Path:
    """The interpreter of an environment, made if need be.

    Raises:
        CalledProcessError: pip could not install it; what it said stands on stderr.
    """
    folder = FOLDER / name
    stamp, wanted = folder / "stamp", "\n".join([sys.version, *REQUIREMENTS[name]])
    inside = folder / "bin" / "python"
    if stamp.exists() and stamp.read_text() == wanted and inside.exists():
        return inside
    print(f"Setting up {folder.relative_to(ROOT)}, the first time only ...", flush=True)
    stamp.unlink(missing_ok=True)
    arguments = [sys.executable, "-m", "venv", "--clear"]
    pip = [str(inside), "-m", "pip"]
    if subprocess.run([*arguments, str(folder)], capture_output=True).returncode:
        # Debian's Python may have venv without ensurepip; then the pip outside installs into it.
        subprocess.run([*arguments, "--without-pip", str(folder)], check=True)
        pip = [sys.executable, "-m", "pip", "--python", str(inside)]
    quiet = ["--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", *quiet, *REQUIREMENTS[name]], check=True, cwd=ROOT)
    stamp.write_text(wanted)
    return inside


def main(names: list[str]) -> int:
    known = [*REQUIREMENTS, *SERVERS]
    if not names or set(names) - {*known, "all"}:
        print(f"{__doc__}\nenvironments: {', '.join(known)}", file=sys.stderr)
        return 2
    failed = []
    for name in known if "all" in names else names:
        try:
            make_server(name) if name in SERVERS else make(name)
        except (subprocess.SubprocessError, OSError) as error:
            print(f"##### the environment {name} could not be made: {error} #####", file=sys.stderr)
            failed.append(name)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
