"""A server on this machine that files are read from over HTTP, range by range, and counted."""

import hashlib
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(slots=True)
class Served:
    """What a server holds, by path, and how many bytes of each it sent.

    Attributes:
        url: of the server, without a slash at its end.
        files: path and content; a path that ends in a slash lists those below it.
        sent: bytes of contents, by path.
        ranges: whether a part of a file may be asked for.
    """

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    ranges: bool = True


@contextmanager
def file_server() -> Iterator[Served]:
    """A server on a free port of this machine."""

    class Answers(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, format: str, *args: Any) -> None:
            """Silence."""

        def _answer(self, with_body: bool) -> None:
            content = served.files.get(self.path)
            if content is None:
                content = _page(served, self.path)
            if content is None:
                self.send_error(404)
                return
            part, asked = content, self.headers.get("Range")
            if asked and served.ranges:
                first, last = asked.removeprefix("bytes=").split("-")
                part = content[int(first) : int(last) + 1]
            self.send_response(206 if asked and served.ranges else 200)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
            self.end_headers()
            if with_body:
                served.sent[self.path] += len(part)
                self.wfile.write(part)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    served = Served(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _page(served: Served, path: str) -> bytes | None:
    """Links to what lies below a folder, and to the same page in another order."""
    folder = path.split("?")[0].rstrip("/") + "/"
    below = {name.removeprefix(folder) for name in served.files if name.startswith(folder)}
    links = sorted({name.split("/")[0] + ("/" if "/" in name else "") for name in below})
    if not links:
        return None
    return "".join(f'<a href="{link}">{link}</a>\n' for link in ["?C=N;O=D", *links]).encode()
