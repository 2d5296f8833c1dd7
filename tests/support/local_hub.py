"""A data set repository served over HTTP on this machine, with the few addresses that huggingface_hub's client asks."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "c" * 40


class LocalHub:
    """What is served and what was asked.

    Attributes:
        files: path -> content, as the repository's metadata describes it.
        served: path -> other content that is sent in its place, as a faulty disk or proxy would.
        cut: path -> number of bytes after which the connection breaks, once.
        refusal: status and the hub's error code that answer every question, where set.
        requests: "METHOD path range" of every download.
    """

    def __init__(self, folder):
        folder = Path(folder)
        self.files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.served, self.cut, self.refusal, self.requests, self.address = {}, {}, None, [], ""

    def tree(self):
        rows = []
        for path, data in self.files.items():
            row = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
            if path.endswith((".tar", ".parquet")):
                row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            rows.append(row)
        return rows

    def etag(self, path):
        row = next(row for row in self.tree() if row["path"] == path)
        return row["lfs"]["oid"] if "lfs" in row else row["oid"]


def git_sha1(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving(folder):
    """Serve a folder as any data set repository that is asked for."""
    hub = LocalHub(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            path = unquote(urlparse(self.path).path)
            if hub.refusal:
                return self.send(hub.refusal[0], b"", {"X-Error-Code": hub.refusal[1]}, body)
            if path.startswith("/api/datasets/"):
                wanted = hub.tree() if "/tree/" in path else {"id": "own/wds_mine", "sha": COMMIT, "siblings": []}
                return self.send(200, json.dumps(wanted).encode(), {"Content-Type": "application/json"}, body)
            name = path.split("/resolve/", 1)[1].split("/", 1)[1] if "/resolve/" in path else path
            if name not in hub.files:
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            return self.download(name, body)

        def download(self, name, body):
            data, asked = hub.served.get(name, hub.files[name]), self.headers.get("Range", "")
            hub.requests.append(f"{self.command} {name} {asked}".strip())
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
            headers = {"ETag": f'"{hub.etag(name)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            cut = hub.cut.pop(name, None) if body else None
            return self.send(206 if start else 200, data[start:], headers, body, cut)

        def send(self, status, data, headers, body, cut=None):
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data[:cut])
            if cut is not None:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
