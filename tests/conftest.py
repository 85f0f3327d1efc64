"""For all tests: a clean environment, one hypothesis profile, slow tests last, and a word on what is missing."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from . import servers

SHARED = Path(__file__).parents[2] / "shared" / "data"
"""Real photographs and documents, which are never part of the project; the tests on them are skipped without."""

# A deadline would measure the machine. On CI the same examples every time: a red run must mean the change.
settings.register_profile("all", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("ci", settings.get_profile("all"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "all")

# Where the tests run inside a job of a batch system, or next to a user's clouds, nothing of it may reach them. At once,
# not by a fixture: the processes that tests start inherit it too.
FOREIGN = (
    "SLURM_", "OMPI_", "PMI_", "AWS_", "GOOGLE_", "AZURE_", "AZURITE_", "STORAGE_EMULATOR_HOST", "CLOUD_RUN_",
    "JOB_COMPLETION_", "SA1B_WDS_",
)  # fmt: skip
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
for name in [name for name in os.environ if name.startswith(FOREIGN) or name in RANKS]:
    del os.environ[name]
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"  # where the tests' own servers are


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)  # stable: the order stays else


def pytest_report_header() -> list[str]:
    missing = [name for name in ("torch", "torchdata") if importlib.util.find_spec(name) is None]
    lines = [f"not installed, tests that need it are skipped: {', '.join(missing)}"] if missing else []
    if not SHARED.is_dir():
        lines.append(f"no real images and documents at {SHARED}: tests on them are skipped")
    return lines


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    """A real S3 server."""
    with servers.s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    """Microsoft's emulator of Azure's blobs."""
    with servers.azure_server(tmp_path_factory.mktemp("azure")) as server:
        yield server


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    """A real server of GCS' interface, good for reading."""
    with servers.gcs_server(tmp_path_factory.mktemp("gcs")) as server:
        yield server
