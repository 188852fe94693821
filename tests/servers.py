"""Servers on this host that stand in for storage behind a network, some of them with faults."""

from __future__ import annotations

import http.client
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

FAULTS = ("status 500", "status 503", "short", "reset", "flip", "hang")


class FileServer:
    """Serves a folder over http with byte ranges; ``fault_rate`` of the requests for a range go wrong.

    One range goes wrong ``most_in_a_row`` times at most, one after another, so that a patient reader gets it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fault_rate: float = 0.0,
        faults: tuple[str, ...] = FAULTS,
        most_in_a_row: int = 3,
        hang_s: float = 0.0,
        ranges: bool = True,
        seed: int = 0,
    ) -> None:
        self.folder, self.fault_rate, self.faults = folder, fault_rate, faults
        self.most_in_a_row, self.hang_s, self.ranges = most_in_a_row, hang_s, ranges
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.in_a_row: Counter[tuple[str, str]] = Counter()
        self.met: Counter[str] = Counter()
        self.requests: list[tuple[str, str]] = []
        server = self

        class Handler(_Handler):
            owner = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def fault_for(self, key: tuple[str, str]) -> str | None:
        """Choose what goes wrong with a request."""
        with self.lock:
            self.requests.append(key)
            if self.in_a_row[key] >= self.most_in_a_row or self.random.random() >= self.fault_rate:
                self.in_a_row[key] = 0
                return None
            self.in_a_row[key] += 1
            fault = self.random.choice(self.faults)
            self.met[fault] += 1
            return fault

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FileServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve(with_body=False)

    def do_GET(self) -> None:
        self._serve(with_body=True)

    def _serve(self, with_body: bool) -> None:
        path = self.owner.folder / unquote(urlsplit(self.path).path).lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        fault = self.owner.fault_for((self.path, self.headers.get("Range", ""))) if span else None
        content = path.read_bytes()
        start = 0
        if span and self.owner.ranges:
            start = int(span[1])
            body = content[start : int(span[2]) + 1]
            self._answer(
                path,
                206,
                body,
                fault,
                {"Content-Range": f"bytes {start}-{start + len(body) - 1}/{len(content)}"},
            )
        else:
            self._answer(path, 200, content if with_body else b"", fault, {"Content-Length": str(len(content))})

    def _answer(self, path: Path, status: int, body: bytes, fault: str | None, headers: dict[str, str]) -> None:
        if fault == "hang":
            time.sleep(self.owner.hang_s)
            self.close_connection = True
            return
        if fault and fault.startswith("status"):
            self.send_response(int(fault.split()[1]))
            self.send_header("Content-Length", "0")
            if fault == "status 503":
                self.send_header("Retry-After", "0")
            self.end_headers()
            return
        if fault == "reset":
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "ETag": f'"{path.stat().st_mtime_ns}"',
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if fault == "flip" and body:
            place = len(body) // 2
            body = body[:place] + bytes([body[place] ^ 16]) + body[place + 1 :]
        if fault == "short":
            body, self.close_connection = body[: len(body) // 2], True
        self.wfile.write(body)


class FakeHub:
    """Answers what the Hugging Face client asks for one dataset repository, from a folder."""

    def __init__(self, folder: Path, repository: str) -> None:
        self.folder, self.repository = folder, repository
        self.requests: list[str] = []
        server = self

        class Handler(_HubHandler):
            owner = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def entries(self, under: str, recursive: bool) -> list[dict[str, Any]]:
        """List files and folders as the Hub's tree does."""
        found = []
        for path in sorted((self.folder / under).rglob("*") if recursive else (self.folder / under).glob("*")):
            name = str(path.relative_to(self.folder))
            kind = "directory" if path.is_dir() else "file"
            size = 0 if path.is_dir() else path.stat().st_size
            found.append({"type": kind, "oid": f"{hash(name) & 0xFFFFFFFF:040x}", "size": size, "path": name})
        return found

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


class _HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        parts = urlsplit(self.path)
        self.owner.requests.append(self.path)
        if "/paths-info/" in parts.path:
            given = (
                json.loads(body) if "json" in self.headers.get("Content-Type", "") else parse_qs(body.decode())
            )
            wanted = given["paths"] if isinstance(given["paths"], list) else [given["paths"]]
            everything = self.owner.entries("", recursive=True)
            self._json([entry for entry in everything if entry["path"] in wanted])
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts, repository = urlsplit(self.path), self.owner.repository
        self.owner.requests.append(self.path)
        if match := re.fullmatch(rf"/api/datasets/{repository}/tree/[^/]+/?(.*)", unquote(parts.path)):
            recursive = parse_qs(parts.query).get("recursive", ["false"])[0].lower() == "true"
            self._json(self.owner.entries(match[1], recursive))
        elif parts.path.startswith(f"/api/datasets/{repository}"):
            self._json({"id": repository, "sha": "0" * 40, "private": False, "siblings": []})
        elif match := re.fullmatch(rf"/datasets/{repository}/resolve/[^/]+/(.*)", unquote(parts.path)):
            self._file(self.owner.folder / match[1])
        else:
            self.send_error(404)

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        body = content[int(span[1]) : int(span[2]) + 1] if span else content
        self.send_response(206 if span else 200)
        self.send_header("ETag", f'"{len(content)}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        if span:
            self.send_header("Content-Range", f"bytes {span[1]}-{int(span[1]) + len(body) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[FileServer]:
    """Serve a folder for as long as the block lasts."""
    server = FileServer(folder, **options)
    try:
        yield server
    finally:
        server.close()


class S3Proxy:
    """Stands in front of an S3 server; `fault_for`, asked with method and path, says what goes wrong with a request."""

    def __init__(self, port: int) -> None:
        self.fault_for: Callable[[str, str], int | None] = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def _forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                server.requests.append((self.command, self.path))
                if status := server.fault_for(self.command, self.path):
                    self.send_response(status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                content = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding", "server", "date"):
                        self.send_header(name, value)
                if answer.getheader("Content-Length") is None:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                connection.close()

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def s3_endpoint(url: str) -> Iterator[Any]:
    """Point S3 clients of this process, and of those it starts, to a server; gives a filesystem."""
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        s3fs.S3FileSystem.clear_instance_cache()  # they know the server that they began with
        yield s3fs.S3FileSystem()
    s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def serving_s3() -> Iterator[int]:
    """Run an empty S3 server; gives its port."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request(
            "POST", "/moto-api/reset"
        )  # what another server of this process was given is there still
        connection.getresponse().read()
        connection.close()
        yield port
    finally:
        server.stop()
