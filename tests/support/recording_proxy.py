"""A forward proxy that keeps the bodies of requests, because a browser's tools hide uploads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from painted import form_fields


class Recording:
    """The address of a proxy, and the forms that went through it, the oldest first."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.forms: list[dict[str, bytes]] = []


@contextmanager
def recording_proxy() -> Iterator[Recording]:
    """Run a proxy for browsers."""
    recording = Recording("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kind = self.headers.get("Content-Type") or ""
            if kind.startswith("multipart/form-data"):
                recording.forms.append(form_fields(kind, body))
            target = urlsplit(self.path)
            headers = {k: v for k, v in self.headers.items() if not k.startswith("Proxy-")}
            connection = HTTPConnection(target.netloc)
            connection.request(self.command, target.path, body or None, headers)
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_DELETE = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    recording.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield recording
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
