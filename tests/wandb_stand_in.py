"""A stand-in for the service of Weights & Biases on loopback: as much of its protocol as its own client asks for.

The client, `wandb-core`, speaks GraphQL (what a run and an artifact is), posts the file stream (history, summary,
output) and puts files to addresses that it was given. What arrives is kept, so that a test can look at it.
"""

import base64
import gzip
import json
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ENTITY = "researcher"
KEY = "0123456789abcdef0123456789abcdef01234567"
SIGNED = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
OPERATION = re.compile(r"\s*(?:query|mutation)\s+(\w+)")


@dataclass
class Request:
    """A request as it arrived."""

    method: str
    path: str
    operation: str
    variables: dict
    headers: dict
    body: bytes


@dataclass
class Run:
    """What the service knows of a run."""

    id: str
    fields: dict = field(default_factory=dict)  # display name, group, job type and the like, as they were sent
    config: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    streamed: set[str] = field(default_factory=set)  # the names of the stream's files: history, summary, output ...
    files: dict[str, bytes] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)  # ids of artifacts
    exit_code: int | None = None


@dataclass
class Artifact:
    """What the service knows of one version of an artifact."""

    id: str
    name: str
    type: str
    digest: str
    metadata: dict
    aliases: list[str]
    made_by: str | None
    state: str = "PENDING"
    manifest: dict = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


class StandIn:
    """The service: a web server in a thread, and what it was told."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.clients: dict[str, str] = {}  # the client's id of an artifact -> the service's
        self.requests: list[Request] = []
        self.unknown: list[str] = []  # GraphQL operations that it can't answer
        self.status = lambda request: 200  # a test makes it another, to see what happens; 0 cuts the connection
        self.lock = threading.RLock()
        self.server = Server(("127.0.0.1", 0), handler(self))

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "StandIn":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *reason: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: Request) -> tuple[int, dict]:
        """The status and the answer to a request."""
        with self.lock:
            self.requests.append(request)
            if (status := self.status(request)) != 200:
                return status, {"errors": [{"message": "as the test wants it"}], "data": None}
            if not request.path.startswith("/upload/") and request.headers.get("authorization") != SIGNED:
                return 401, {"errors": [{"message": "user is not logged in"}], "data": None}
            if request.path.startswith("/graphql"):
                return 200, self.graphql(request.operation, request.variables)
            parts = request.path.strip("/").split("/")
            if parts[0] == "files" and parts[-1] == "file_stream":
                return 200, self.stream(self.runs[parts[-2]], json.loads(request.body))
            if request.method == "PUT" and parts[0] == "upload":
                return 200, self.upload(parts[1:], request.body)
            return 404, {"error": request.path}

    # GraphQL

    def graphql(self, operation: str, given: dict) -> dict:
        """The answer to a query or mutation by its name."""
        answer = getattr(self, f"on_{operation}", None)
        if answer is None:
            self.unknown.append(operation)
            return {"data": None, "errors": [{"message": f"the stand-in does not know {operation}"}]}
        return {"data": answer(given.get("input") or given)}

    def on_Viewer(self, given: dict) -> dict:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        who = {"id": "1", "entity": ENTITY, "username": ENTITY, "email": "researcher@example.com", "flags": "{}"}
        return {"viewer": who | {"teams": teams}}

    def on_ServerFeaturesQuery(self, given: dict) -> dict:
        return {"serverInfo": {"features": []}}

    def on_RunResumeStatus(self, given: dict) -> dict:
        entity = {"id": ENTITY, "name": ENTITY}
        run = self.runs.get(given["name"])
        if run is None:
            return {"model": {"id": "p", "name": given["project"], "entity": entity, "bucket": None}}
        lines = [json.dumps(row) for row in run.history]
        bucket = {
            "id": run.id,
            "name": run.id,
            "summaryMetrics": json.dumps(run.summary),
            "displayName": run.fields.get("displayName"),
            "logLineCount": 0,
            "historyLineCount": len(lines),
            "eventsLineCount": 0,
            "historyTail": json.dumps(lines[-1:]),
            "eventsTail": "[]",
            "config": json.dumps(run.config),
            "tags": [],
            "notes": "",
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {"id": "p", "name": given["project"], "entity": entity, "bucket": bucket}}

    def on_UpsertBucket(self, given: dict) -> dict:
        new = given["name"] not in self.runs
        run = self.runs.setdefault(given["name"], Run(given["name"]))
        run.fields |= {name: value for name, value in given.items() if value is not None}
        run.config |= json.loads(given.get("config") or "{}")
        project = {"id": "p", "name": given["project"], "entity": {"id": ENTITY, "name": ENTITY}}
        bucket = {"id": run.id, "name": run.id, "displayName": given.get("displayName"), "description": ""}
        bucket |= {"config": json.dumps(run.config), "sweepName": None, "historyLineCount": len(run.history)}
        return {"upsertBucket": {"bucket": bucket | {"project": project}, "inserted": new}}

    def on_CreateRunFiles(self, given: dict) -> dict:
        urls = [{"name": name, "uploadUrl": f"{self.url}/upload/run/{given['run']}/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": urls}}

    def on_CreateArtifact(self, given: dict) -> dict:
        names = given.get("artifactCollectionNames") or [given["artifactCollectionName"]]
        family = [found for found in self.artifacts.values() if found.name == names[0]]
        artifact = next((found for found in family if found.digest == given["digest"]), None)
        if artifact is None:
            artifact = Artifact(
                f"artifact-{len(self.artifacts)}",
                names[0],
                given["artifactTypeName"],
                given["digest"],
                json.loads(given.get("metadata") or "{}"),
                [alias["alias"] for alias in given.get("aliases") or []],
                given.get("runName"),
            )
            self.artifacts[artifact.id] = artifact
        self.clients[given.get("clientID")] = artifact.id
        latest = family[-1] if family else None
        sequence = {"id": names[0], "latestArtifact": latest and {"id": latest.id, "versionIndex": len(family) - 1}}
        found = {"id": artifact.id, "state": artifact.state, "artifactSequence": sequence}
        return {"createArtifact": {"artifact": found}}

    def on_CreateArtifactManifest(self, given: dict) -> dict:
        url = f"{self.url}/upload/manifest/{given['artifactID']}"
        file = {"id": given["artifactID"], "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": given["artifactID"], "file": file}}}

    on_UpdateArtifactManifest = on_CreateArtifactManifest

    def on_CreateArtifactFiles(self, given: dict) -> dict:
        nodes = []
        for file in given["artifactFiles"]:
            url = f"{self.url}/upload/artifact/{file['artifactID']}/{file['name']}"
            node = {"storagePath": file["name"], "uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None}
            nodes.append({"node": node | {"artifact": {"id": file["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def on_CommitArtifact(self, given: dict) -> dict:
        artifact = self.artifacts[given["artifactID"]]
        artifact.state = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest}}}

    def on_UseArtifact(self, given: dict) -> dict:
        self.runs[given["runName"]].used.append(given["artifactID"])
        return {"useArtifact": {"artifact": {"id": given["artifactID"]}}}

    def on_ArtifactType(self, given: dict) -> dict:
        name = given["name"].partition(":")[0]
        kind = next((found.type for found in self.artifacts.values() if found.name == name), None)
        return {"project": {"artifact": kind and {"artifactType": {"name": kind}}}}

    def on_ArtifactByID(self, given: dict) -> dict:
        artifact = self.artifacts[given["id"]]
        family = [found for found in self.artifacts.values() if found.name == artifact.name]
        project = {"id": "p", "internalId": "p", "name": "llmprod", "entity": {"name": ENTITY}}
        answer = {"id": artifact.id, "state": artifact.state, "digest": artifact.digest, "aliases": [], "tags": []}
        answer |= {"artifactSequence": {"name": artifact.name, "project": project}, "versionIndex": len(family) - 1}
        answer |= {"artifactType": {"name": artifact.type}, "metadata": json.dumps(artifact.metadata)}
        answer |= dict.fromkeys(("description", "historyStep", "commitHash", "updatedAt"))
        answer |= {"ttlDurationSeconds": 0, "ttlIsInherited": False, "size": 1, "fileCount": 1}
        return {"artifact": answer | {"createdAt": "2026-01-01T00:00:00Z"}}

    def on_ClientIDMapping(self, given: dict) -> dict:
        found = self.clients.get(given["clientID"])
        return {"clientIDMapping": found and {"serverID": found}}

    # the file stream, and files

    def stream(self, run: Run, sent: dict) -> dict:
        """Takes lines of the file stream: a row of history each, the summary as one line that is replaced."""
        for name, part in (sent.get("files") or {}).items():
            run.streamed.add(name)
            if name == "wandb-history.jsonl":
                run.history[part["offset"] :] = [json.loads(line) for line in part["content"]]
            elif name == "wandb-summary.json":
                run.summary = json.loads(part["content"][-1])
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode")
        return {}

    def upload(self, place: list[str], content: bytes) -> dict:
        """Takes a file at an address that the service gave out."""
        kind, owner, name = place[0], place[1], "/".join(place[2:])
        if kind == "manifest":
            self.artifacts[owner].manifest = json.loads(content)
        else:
            (self.runs if kind == "run" else self.artifacts)[owner].files[name] = content
        return {}


class Server(ThreadingHTTPServer):
    """A server that neither waits for its connections when it ends, nor tells of those that a client cut."""

    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, address)


def handler(service: StandIn) -> type[BaseHTTPRequestHandler]:
    """The class that reads a request and hands it to the service."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def take(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            asked = json.loads(body) if self.path.startswith("/graphql") and body else {}
            operation = OPERATION.match(asked.get("query", ""))
            name = operation[1] if operation else ""
            headers = {key.lower(): value for key, value in self.headers.items()}
            request = Request(self.command, self.path, name, asked.get("variables") or {}, headers, body)
            status, answer = service.answer(request)
            if status == 0:
                self.close_connection = True
                return
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = take

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler
