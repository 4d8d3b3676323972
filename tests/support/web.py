"""A web server on loopback that can cut answers off, and tells what it was asked."""

import http.server
import socket
import threading


class Server:
    """Serves `files`, bytes by path, with `headers` of a path and its faults.

    `cuts` has, by path, after how many bytes the next answers end; `status` the codes
    of the next ones. Without `ranges` every answer is of the whole file.
    """

    def __init__(self, files):
        self.files, self.headers, self.cuts, self.status = files, {}, {}, {}
        self.ranges, self.asked = True, []
        handler = type("Handler", (_Handler,), {"site": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def closed_port() -> str:
    """Returns an address at which nobody answers."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    site: Server

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def log_message(self, *_):
        pass

    def _answer(self, body: bool):
        site, wanted = self.site, self.headers.get("Range", "")
        site.asked.append((self.command, self.path, wanted))
        content = site.files.get(self.path)
        code = 200 if content is not None else 404
        if body and site.status.get(self.path):
            code = site.status[self.path].pop(0)
        start = int(wanted.removeprefix("bytes=").partition("-")[0] or 0)
        if code == 200 and wanted and site.ranges:
            code = 206 if start < len(content) else 416
        self.send_response(code)
        for name, value in site.headers.get(self.path, {}).items():
            self.send_header(name, value)
        if code == 206:
            last = len(content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
            content = content[start:]
        content = content if code in (200, 206) else b""
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            cuts = site.cuts.get(self.path)
            self.wfile.write(content[: cuts.pop(0)] if cuts else content)
        self.close_connection = True
