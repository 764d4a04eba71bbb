"""A proxy before the API server that kills the operator with SIGKILL at a chosen write, so that no moment is left out."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

WRITES = ("POST", "PATCH", "DELETE", "PUT")


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """The dead hang up without a word."""


class Assassin:
    """Passes everything on, but the first time that the operator makes a certain write, `strike` is called.

    After the API server has got it, the write happened and its answer is lost; before, it never happens.
    """

    def __init__(self, api: httpx.Client, folder: Path, strike: Callable[[], None], *, after: bool) -> None:
        self.created: list[str] = []
        self.struck: list[str] = []
        self._api = api
        self._strike = strike
        self._after = after
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass_on(self) -> None:
                with suppress(OSError, httpx.HTTPError):
                    outer.pass_on(self)

            do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _pass_on  # noqa: N815

            def log_message(self, *_: Any) -> None:
                return

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.kubeconfig = folder / "kubeconfig-assassin"
        self.kubeconfig.write_text(_kubeconfig(f"http://127.0.0.1:{self._server.server_address[1]}"))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def pass_on(self, asked: BaseHTTPRequestHandler) -> None:
        body = asked.rfile.read(int(asked.headers.get("Content-Length") or 0))
        write = _write(asked, body)
        if write and not self._after and self._first(write):
            asked.close_connection = True
            return
        kept = {name: asked.headers[name] for name in ("Accept", "Content-Type") if name in asked.headers}
        with self._api.stream(asked.command, asked.path, content=body, headers=kept, timeout=None) as answer:
            self._note(asked, answer.status_code, body)
            if write and self._after and answer.is_success and self._first(write):
                asked.close_connection = True
                return
            asked.send_response(answer.status_code)
            asked.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
            asked.send_header("Transfer-Encoding", "chunked")
            asked.end_headers()
            for chunk in answer.iter_raw():
                asked.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                asked.wfile.flush()
            asked.wfile.write(b"0\r\n\r\n")

    def _first(self, write: str) -> bool:
        with self._lock:
            if write in self.struck:
                return False
            self.struck.append(write)
            self._strike()
            return True

    def _note(self, asked: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
        if asked.command == "POST" and status == 201 and "/events" not in asked.path:
            made = json.loads(body)
            self.created.append(f"{made['kind']}/{made['metadata']['name']}")


def _write(asked: BaseHTTPRequestHandler, body: bytes) -> str:
    """What the request would change, in words that are the same when it is tried again; empty: nothing."""
    # Events cost nothing when lost, and their names differ each time.
    if asked.command not in WRITES or "/events" in asked.path:
        return ""
    said = json.loads(body) if body else {}
    name = said.get("metadata", {}).get("name", "")
    return f"{asked.command} {asked.path.split('?')[0]} {name} {said.get('status', {}).get('phase', '')}"


def _kubeconfig(server: str) -> str:
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": server}}],
            "users": [{"name": "u", "user": {"token": "x"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "c",
        }
    )
