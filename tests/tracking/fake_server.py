"""As much of W&B's server as its client needs for a run, on this machine: rows go where their offset says.

GraphQL answers say what a run has; the file stream takes history lines at an offset; files and artifacts are taken and forgotten.
"""

import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "tester"


@dataclass
class ServerRun:
    """What the server has of a run; `rewinds` are the steps that it was rewound to."""

    project: str
    config: dict[str, Any] = field(default_factory=dict)
    display_name: str = ""
    lines: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    num_events: int = 0
    rewinds: list[int] = field(default_factory=list)
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


class FakeServer:
    """Runs by id; `refuses_rewinds` is how a server answers whose account does not include them."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.runs: dict[str, ServerRun] = {}
        self.files: set[str] = set()
        self.num_artifacts = 0
        self.refuses_rewinds = False
        self.lock = threading.Lock()

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The `data` of a GraphQL answer. Raises PermissionError where it is refused."""
        run_id = variables.get("name") or variables.get("runName") or ""
        if operation == "Viewer":
            teams: dict[str, Any] = {"edges": []}
            viewer = {"id": "1", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": teams}
            return {"viewer": viewer}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if operation == "RunResumeStatus":
            return {"model": self._model(run_id) if run_id in self.runs else None}
        if operation == "UpsertBucket":
            inserted = run_id not in self.runs
            run = self.runs.setdefault(run_id, ServerRun(variables["project"]))
            run.config = json.loads(variables.get("config") or "null") or run.config
            run.display_name = variables.get("displayName") or run.display_name
            return {"upsertBucket": {"bucket": self._bucket(run_id), "inserted": inserted}}
        if operation == "RewindRun":
            if self.refuses_rewinds:
                raise PermissionError("rewinding is not enabled for this account")
            step = int(variables["metricValue"])
            run = self.runs[run_id]
            run.rewinds.append(step)
            run.lines = [line for line in run.lines if json.loads(line)["_step"] <= step]
            return {"rewindRun": {"rewoundRun": self._bucket(run_id)}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/storage/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": run_id, "uploadHeaders": [], "files": files}}
        if operation == "CreateArtifact":
            self.num_artifacts += 1
            sequence = {"id": "1", "latestArtifact": None}
            artifact = {"id": f"artifact{self.num_artifacts}", "state": "COMMITTED", "artifactSequence": sequence}
            return {"createArtifact": {"artifact": artifact}}
        return {"project": None}

    def stream(self, run_id: str, sent: dict[str, Any]) -> None:
        """A request of the file stream: lines of files, each from an offset on."""
        run = self.runs[run_id]
        for name, chunk in sent.get("files", {}).items():
            if name == "wandb-history.jsonl":
                run.lines[chunk["offset"] :] = chunk["content"]
            elif name == "wandb-summary.json":
                run.summary = json.loads(chunk["content"][-1])
            elif name == "wandb-events.jsonl":
                run.num_events += len(chunk["content"])
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode")

    def _model(self, run_id: str) -> dict[str, Any]:
        run = self.runs[run_id]
        bucket = self._bucket(run_id) | {
            "summaryMetrics": json.dumps(run.summary), "logLineCount": 0, "eventsLineCount": run.num_events,
            "historyTail": json.dumps(run.lines[-1:]), "eventsTail": "[]", "tags": [], "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip
        return {"id": "1", "name": run.project, "entity": {"id": "1", "name": ENTITY}, "bucket": bucket}

    def _bucket(self, run_id: str) -> dict[str, Any]:
        run = self.runs[run_id]
        project = {"id": "1", "name": run.project, "entity": {"id": "1", "name": ENTITY}}
        return {
            "id": f"storage-{run_id}", "name": run_id, "displayName": run.display_name, "description": None,
            "config": json.dumps(run.config), "sweepName": None, "project": project, "historyLineCount": len(run.lines),
        }  # fmt: skip


@contextlib.contextmanager
def fake_server() -> Iterator[FakeServer]:
    """Serves on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            with server.lock:
                self._reply(*self._handle(body))

        do_PUT = do_GET = do_POST  # noqa: N815 - names that the base class calls

        def _handle(self, body: bytes) -> tuple[int, dict[str, Any]]:
            if self.path.startswith("/storage/"):
                server.files.add(self.path.removeprefix("/storage/"))
            elif self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], json.loads(body))
            elif self.path == "/graphql":
                asked = json.loads(body)
                try:
                    return 200, {"data": server.answer(asked["operationName"], asked.get("variables") or {})}
                except PermissionError as error:
                    return 400, {"errors": [{"message": str(error)}], "data": None}
            return 200, {}

        def _reply(self, status: int, content: dict[str, Any]) -> None:
            encoded = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(encoded)))
            self.end_headers()
            self.wfile.write(encoded)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that goes without a word, as one that was killed."""

    with Server(("127.0.0.1", 0), Handler) as http:
        server = FakeServer(f"http://127.0.0.1:{http.server_port}")
        threading.Thread(target=http.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            http.shutdown()
