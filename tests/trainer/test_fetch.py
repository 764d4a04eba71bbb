"""A model out of a hub: a small one, served by the test, through the hub's own library."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from tuneward_api import manifest, names
from tuneward_trainer.__main__ import main

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server holds and what it was asked. `status`: what it answers instead of its files."""

    files: dict[str, bytes]
    status: int = 200
    code: str = ""
    asked: list[str] = field(default_factory=list)
    address: str = ""


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, format: str, *args: Any) -> None:
            hub.asked.append(f"{self.command} {self.path.split('?')[0]}")

        def _answer(self) -> None:
            path = self.path.split("?")[0]
            if hub.status != 200:
                self._send(b"{}", hub.status, {"X-Error-Code": hub.code} if hub.code else {})
            elif path.startswith("/api/models/acme/tiny/revision/") or path == "/api/models/acme/tiny":
                self._send(json.dumps({"id": "acme/tiny", "sha": COMMIT, "siblings": []}).encode())
            elif path.startswith("/api/models/acme/tiny/tree/"):
                self._send(json.dumps([_entry(*item) for item in hub.files.items()]).encode())
            elif path.startswith(f"/acme/tiny/resolve/{COMMIT}/"):
                content = hub.files[path.rsplit("/", 1)[-1]]
                self._send(content, 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})
            else:
                self._send(b"{}", 404)

        def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    return Handler


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if path.endswith(".safetensors"):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


@pytest.fixture
def hub(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    wanted = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    files = {name: (smollm2 / name).read_bytes() for name in wanted}
    files |= {"model.safetensors": b"weights", "tokenizer.model.v3": b"Mistral's"}
    held = Hub(files | {"pytorch_model.bin": b"no", "consolidated.safetensors": b"no"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(held))
    held.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", held.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", held.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield held
    server.shutdown()
    server.server_close()
    thread.join(60)


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(names.ENV_STORE_DIR, str(tmp_path / "store"))
    monkeypatch.setenv(names.ENV_TERMINATION_LOG, str(tmp_path / "termination-log"))
    (tmp_path / "store").mkdir()
    return tmp_path


def fetch(room: Path, uri: str) -> tuple[int, dict[str, Any]]:
    (room / "request.json").write_text(json.dumps({"uri": uri, "storeClaim": "tuneward-store"}))
    code = main(["fetch", "--request", str(room / "request.json")])
    return code, json.loads((room / "termination-log").read_text())


def test_a_model_is_fetched_once_and_pinned(room: Path, hub: Hub) -> None:
    code, report = fetch(room, "hf://acme/tiny")
    assert (code, report["outcome"], report["reason"]) == (0, "Done", "Available")
    base = report["base"]
    assert (base["uri"], base["claim"], base["subPath"]) == (
        f"hf://acme/tiny@{COMMIT}",
        "tuneward-store",
        f"models/{base['key']}",
    )
    folder = room / "store" / base["subPath"]
    assert manifest.verify(folder) == base["digest"]
    assert sorted(file.name for file in folder.iterdir()) == [
        "MANIFEST.json",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model.v3",
        "tokenizer_config.json",
    ]
    hub.asked.clear()
    assert fetch(room, "hf://acme/tiny@main")[1]["base"] == base
    assert [line for line in hub.asked if "/resolve/" in line or "/tree/" in line] == []
    hub.asked.clear()
    assert fetch(room, f"hf://acme/tiny@{COMMIT}")[1]["base"] == base
    assert hub.asked == []


def test_a_file_that_changed_on_its_way_is_refused(room: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "hash_file", lambda path: "0" * 64)
    code, report = fetch(room, "hf://acme/tiny")
    assert (code, report["message"]) == (
        75,
        "model.safetensors of hf://acme/tiny did not arrive whole; trying again may help",
    )


@pytest.mark.parametrize(
    ("status", "error", "code", "message"),
    [
        (401, "GatedRepo", 66, "hf://acme/tiny is gated: accept its terms on the hub, and name a Secret with the key token"),
        (404, "RepoNotFound", 66, "hf://acme/tiny does not exist, or is private: check the name, or name a Secret"),
        (404, "RevisionNotFound", 66, "hf://acme/tiny has no such revision; name a branch, tag or commit that exists"),
        (403, "", 66, "the hub refused the token (403) for hf://acme/tiny; renew the Secret of spec.model.secretRef"),
        (500, "", 75, "the hub answered 500 for hf://acme/tiny; trying again may help"),
    ],
)
def test_what_the_hub_refuses(room: Path, hub: Hub, status: int, error: str, code: int, message: str) -> None:
    hub.status, hub.code = status, error
    found, report = fetch(room, "hf://acme/tiny")
    assert found == code
    assert report["message"].startswith(message)


def test_a_hub_that_cannot_be_reached(room: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    code, report = fetch(room, "hf://acme/tiny")
    assert (code, report["reason"]) == (75, "Infrastructure")
    assert report["message"].startswith("the hub cannot be reached for hf://acme/tiny (ConnectError); check the network")
