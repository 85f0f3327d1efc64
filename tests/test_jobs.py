"""The jobs for Kubernetes and AWS Batch: valid for their clients, and their commands run, every index a process."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sa1b_wds.cli import main
from sa1b_wds.plan import load_plan

from . import making, running

ROOT = Path(__file__).parents[1]
KUBERNETES, BATCH = ROOT / "scripts" / "k8s", ROOT / "scripts" / "aws-batch"
OPTIONS = ["--mix", "1", "--shard-size", "1MiB"]
TASKS = 3
Tree = dict[str, str]


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    running.write(
        folder, {f"sa_{n:06d}.tar": making.tar(making.pairs(range(100 * n + 1, 100 * n + 20))) for n in range(TASKS)}
    )
    return folder


@pytest.fixture(scope="module")
def expected(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """What one process makes of them."""
    dest = tmp_path_factory.mktemp("local") / "dest"
    assert main(["convert", str(tars), "--out", str(dest), "--workers", "1", *OPTIONS]) == 0
    return running.tree(dest)


def planned(tars: Path, dest: Path) -> int:
    """A written plan; how many tasks it has."""
    assert main(["plan", str(tars), "--out", str(dest), *OPTIONS]) == 0
    return len(load_plan((dest / "plan.json").read_bytes(), "plan").tasks)


def run(command: list[str], environment: Mapping[str, str]) -> None:
    """A container's command, as a process of its own."""
    program, *arguments = command
    assert program == "sa1b-wds"
    done = subprocess.run(
        [sys.executable, "-c", "from sa1b_wds.cli import run; run()", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------------------- Kubernetes


def documents(name: str) -> dict[str, dict[str, Any]]:
    """kind → document of a manifest."""
    yaml = pytest.importorskip("yaml", reason="##### NO yaml: pip install kubernetes (part of the `test` extra) #####")
    return {found["kind"]: found for found in yaml.safe_load_all((KUBERNETES / name).read_text())}


def unknown(document: dict[str, Any], model: str) -> dict[str, Any] | None:
    """None where Kubernetes' client takes every field of a document, else what it makes of it."""
    reason = "##### NO kubernetes: pip install kubernetes (part of the `test` extra) #####"
    client = pytest.importorskip("kubernetes.client", reason=reason)

    class Response:
        data = json.dumps(document)

    api = client.ApiClient()
    try:  # a type that is wrong and a field that is missing are errors, one it does not know is dropped
        again: dict[str, Any] = api.sanitize_for_serialization(_deserialised(api, Response(), model))
    finally:
        api.close()
    return None if again == document else again


def _deserialised(api: Any, response: Any, model: str) -> Any:
    try:
        return api.deserialize(response, model)
    except TypeError:  # newer ones take the text and its type
        return api.deserialize(response.data, model, "application/json")


@pytest.mark.parametrize(
    ("name", "kind", "model"),
    [("convert.yaml", "ServiceAccount", "V1ServiceAccount"), ("convert.yaml", "Job", "V1Job"),
     ("finalize.yaml", "Job", "V1Job")],
)  # fmt: skip
def test_kubernetes_client_knows_every_field(name: str, kind: str, model: str) -> None:
    document = documents(name)[kind]
    assert unknown(document, model) is None
    broken = json.loads(json.dumps(document))
    broken["metadata"]["nmae"] = "x"
    assert unknown(broken, model) is not None  # the check can fail


def test_the_kubernetes_jobs_fit_each_other() -> None:
    both = documents("convert.yaml")
    account, job, last = both["ServiceAccount"], both["Job"]["spec"], documents("finalize.yaml")["Job"]["spec"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] <= job["completions"]
    for spec in (job["template"]["spec"], last["template"]["spec"]):
        assert spec["serviceAccountName"] == account["metadata"]["name"]
        (container,), (volume,) = spec["containers"], spec["volumes"]
        assert {e["name"]: e["value"] for e in container["env"]}["TMPDIR"] == "/scratch"
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/scratch"}]
        assert "medium" not in volume["emptyDir"]  # a disk, not memory
    assert job["podFailurePolicy"]["rules"][1]["onExitCodes"]["containerName"] == "convert"
    (one,), (other,) = job["template"]["spec"]["containers"], last["template"]["spec"]["containers"]
    assert one["image"] == other["image"]
    assert one["command"][4] == other["command"][2]


@pytest.mark.slow
def test_the_kubernetes_jobs_make_the_same_data_set(tars: Path, expected: Tree, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    tasks = planned(tars, dest)
    places = {"s3://bucket/tars": str(tars), "s3://bucket/sa1b": str(dest)}

    def container(name: str) -> tuple[list[str], dict[str, str]]:
        (found,) = documents(name)["Job"]["spec"]["template"]["spec"]["containers"]
        environment = {e["name"]: e["value"].replace("/scratch", str(tmp_path)) for e in found["env"]}
        return [places.get(word, word) for word in found["command"]], environment

    command, environment = container("convert.yaml")
    for index in reversed(range(tasks)):
        run(command, {**environment, "JOB_COMPLETION_INDEX": str(index)})
    run(*container("finalize.yaml"))
    assert running.tree(dest) == expected


# ------------------------------------------------------------------------------------------------------------ AWS Batch


@contextmanager
def batch_server() -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """The address of something that takes AWS Batch's requests, and what it was asked."""
    asked: list[tuple[str, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body))
            answer = {"jobDefinitionName": "sa1b-wds", "jobDefinitionArn": "arn:sa1b-wds:1", "revision": 1}
            if self.path == "/v1/submitjob":
                answer = {"jobId": f"job-{len(asked)}", "jobName": body["jobName"]}
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.slow
def test_the_batch_jobs_make_the_same_data_set(tars: Path, expected: Tree, tmp_path: Path) -> None:
    """AWS' own client takes what `submit` says (it knows every parameter); then that is done, as AWS Batch would."""
    aws = Path(sys.executable).with_name("aws")
    if not aws.exists():
        pytest.skip("##### NO AWS CLI: pip install awscli (part of the `test` extra) #####")
    dest = tmp_path / "dest"
    tasks = planned(tars, dest)
    environment = {
        **os.environ,
        "PATH": f"{aws.parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with batch_server() as (address, asked):
        environment["AWS_ENDPOINT_URL"] = address
        command = [str(BATCH / "submit"), "queue", str(tars), str(dest), str(tasks)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "job-3\n"), done.stderr
    (first, definition), (_, array), (_, last) = asked
    assert first == "/v1/registerjobdefinition"
    assert definition == json.loads((BATCH / "job-definition.json").read_text())
    assert array["arrayProperties"] == {"size": tasks}
    assert last["dependsOn"] == [{"jobId": "job-2"}]
    assert {array["jobDefinition"], last["jobDefinition"]} == {"arn:sa1b-wds:1"}
    parameters = {f"Ref::{name}": value for name, value in {**definition["parameters"], **array["parameters"]}.items()}
    container = definition["containerProperties"]
    variables = {e["name"]: str(tmp_path) for e in container["environment"]}
    for index in range(tasks):
        command = [parameters.get(word, word) for word in container["command"]]
        run(command, {**variables, "AWS_BATCH_JOB_ARRAY_INDEX": str(index)})
    run(last["containerOverrides"]["command"], variables)
    assert running.tree(dest) == expected


def test_submit_says_how_it_is_called() -> None:
    done = subprocess.run([BATCH / "submit"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "scripts/aws-batch/submit QUEUE s3://bucket/tars s3://bucket/sa1b TASKS" in done.stderr
