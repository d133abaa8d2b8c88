"""The Kubernetes manifest: against its schema, against itself, and its command for real."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, environment

MANIFEST = ROOT / "scripts/kubernetes/job.yaml"
SERVICE, JOB = yaml.safe_load_all(MANIFEST.read_text())
POD: dict[str, Any] = JOB["spec"]["template"]["spec"]
CONTAINER: dict[str, Any] = POD["containers"][0]


def test_the_manifest_fits_the_schema_of_kubernetes() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    newest = validate.latest_version()
    for document in (SERVICE, JOB):
        validate.validate(document, newest, strict=True)
    JOB["spec"]["completion"] = 2
    with pytest.raises(validate.ValidationError):
        validate.validate(JOB, newest, strict=True)
    del JOB["spec"]["completion"]


def test_names_and_counts_that_belong_together_agree() -> None:
    env = {item["name"]: item["value"] for item in CONTAINER["env"]}
    assert env["RDZV"].partition(":")[0] == f"{JOB['metadata']['name']}-0.{POD['subdomain']}"
    assert SERVICE["metadata"]["name"] == POD["subdomain"]
    assert SERVICE["spec"]["selector"] == {"batch.kubernetes.io/job-name": JOB["metadata"]["name"]}
    assert JOB["spec"]["completions"] == JOB["spec"]["parallelism"] == int(env["NNODES"])
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}
    assert CONTAINER["command"] == ["/opt/vip/scripts/kubernetes/pod.sh"]
    assert "WORKDIR /opt/vip" in (ROOT / "Dockerfile").read_text()


@pytest.mark.e2e
def test_a_signal_to_one_pod_ends_them_all_so_that_the_job_starts_them_again(tmp_path: Path, digits: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = environment() | {"NNODES": "2", "NPROC": "1", "RDZV": f"127.0.0.1:{port}", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"SETTLE": "0", "GLOO_SOCKET_IFNAME": "lo"}
    command = [str(ROOT / CONTAINER["command"][0].removeprefix("/opt/vip/")), "experiment=digits", "epochs=1000"]
    command += [f"data.root={digits}", f"runs_dir={tmp_path / 'runs'}"]
    pods = []
    for number in range(2):
        with (tmp_path / f"pod{number}.txt").open("w") as log:
            own = env | {"LAUNCH_NOTES": str(tmp_path / f"notes{number}")}  # each pod has its own /tmp
            (tmp_path / f"notes{number}").mkdir()
            pods.append(subprocess.Popen(command, env=own, stdout=log, stderr=log, start_new_session=True))
    try:
        deadline = time.monotonic() + 200
        while not any("step 11/" in (tmp_path / f"pod{number}.txt").read_text() for number in range(2)):
            assert [pod.poll() for pod in pods] == [None, None], said(tmp_path)
            assert time.monotonic() < deadline, said(tmp_path)
            time.sleep(0.2)
        pods[1].send_signal(signal.SIGTERM)
        assert [pod.wait(90) for pod in pods] == [143, 143], said(tmp_path)
    finally:
        for pod in pods:
            if pod.poll() is None:
                os.killpg(pod.pid, signal.SIGKILL)
    assert int((tmp_path / "runs/digits/PREEMPTED").read_text()) >= 11


def said(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("pod*.txt")))
