"""Google Cloud Storage in memory, on loopback, for all of its clients that runs use.

It keeps the conditions of requests (`ifGenerationMatch`), on which locks rest, answers
404 for other buckets than BUCKET and READ_ONLY, and 403 for a write to the latter.
"""

import base64
import contextlib
import email
import http.server
import itertools
import json
import os
import re
import threading
import urllib.parse

BUCKET, READ_ONLY = "bucket", "read-only"
_TIME = "2026-01-01T00:00:00.000Z"
_COPY = re.compile(r"b/([^/]+)/o/(.+)/(copyTo|moveTo|rewriteTo)/b/([^/]+)/o/(.+)")
_MOVE = re.compile(r"b/([^/]+)/o/(.+)/(moveTo)/()o/(.+)")


class Refusal(Exception):
    """The code of an answer, and its reason."""


class Objects:
    """Contents and generations by (bucket, name).

    `requests` counts the answers; `fails`, if set, is the code of all of them.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self.requests, self.fails = 0, 0
        self._found, self._uploads = {}, {}
        self._numbers = itertools.count(1000)

    def names(self, prefix=""):
        """Names in BUCKET."""
        with self.lock:
            found = [name for bucket, name in self._found if bucket == BUCKET]
        return sorted(name for name in found if name.startswith(prefix))

    def content(self, name):
        return self._found[BUCKET, name][0]

    def replace(self, name, content):
        """Changes what is stored, as a fault or another process would."""
        self.put((BUCKET, name), content, {})

    def delete(self, name):
        with self.lock:
            del self._found[BUCKET, name]

    def put(self, key, content, query):
        if key[0] == READ_ONLY:
            raise Refusal(403, "no storage.objects.create access")
        with self.lock:
            self._check(key, query)
            self._found[key] = content, next(self._numbers)
            return self._described(key)

    def get(self, key, query):
        with self.lock:
            self._check(key, query)
            if key not in self._found:
                raise Refusal(404, "notFound")
            return *self._found[key], self._described(key)

    def remove(self, key, query):
        with self.lock:
            self.get(key, query)
            del self._found[key]

    def begin(self, key, query):
        with self.lock:
            number = str(next(self._numbers))
            self._uploads[number] = [key, b"", query]
        return number

    def extend(self, number, content, size):
        """Adds to an upload; returns how much there is, and the object at the end."""
        with self.lock:
            upload = self._uploads[number]
            upload[1] += content
            key, found, query = upload
        if size is None or len(found) < size:
            return len(found), None
        return len(found), self.put(key, found, query)

    def listed(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        first, end = query.get("startOffset", ""), query.get("endOffset")
        items, folders = [], {}
        with self.lock:
            for key in sorted(k for k in self._found if k[0] == bucket):
                name = key[1]
                if not name.startswith(prefix) or name < first or (end and name >= end):
                    continue
                head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
                if found:
                    folders[prefix + head + found] = None
                else:
                    items.append(self._described(key))
        return {"kind": "storage#objects", "items": items, "prefixes": list(folders)}

    def _check(self, key, query):
        have = self._found[key][1] if key in self._found else 0
        if int(query.get("ifGenerationMatch", have)) != have:
            raise Refusal(412, "conditionNotMet")
        if int(query.get("ifGenerationNotMatch", -1)) == have:
            raise Refusal(304, "notModified")

    def _described(self, key):
        content, generation = self._found[key]
        return {
            "kind": "storage#object",
            "id": f"{key[0]}/{key[1]}/{generation}",
            "bucket": key[0],
            "name": key[1],
            "generation": str(generation),
            "metageneration": "1",
            "etag": base64.b64encode(str(generation).encode()).decode(),
            "size": str(len(content)),
            "timeCreated": _TIME,
            "updated": _TIME,
            "storageClass": "STANDARD",
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    objects: Objects
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer takes 40 ms

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        with contextlib.suppress(ConnectionError):  # a client that was killed
            super().handle_one_request()

    def _any(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        body = self._body()
        self.objects.requests += 1
        try:
            if self.objects.fails:
                raise Refusal(self.objects.fails, "broken")
            self._answer(*self._route(url.path, query, body))
        except Refusal as refusal:
            code, reason = refusal.args
            error = {"code": code, "message": reason, "errors": [{"reason": reason}]}
            self._answer(code, {"error": error})

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _any

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, code, content=b"", headers=()):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = [("Content-Type", "application/json"), *headers]
        bare = code in (204, 304)
        self.send_response(code)
        for name, value in headers:
            self.send_header(name, value)
        if not bare:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not bare and self.command != "HEAD":
            self.wfile.write(content)

    def _route(self, path, query, body):
        if path.startswith("/batch"):
            return self._batch(body)
        path = path[path.index("b/") :] if "/b/" in path else path
        bucket = path.split("/")[1]
        if bucket not in (BUCKET, READ_ONLY):
            raise Refusal(404, "The specified bucket does not exist.")
        if match := _COPY.fullmatch(path) or _MOVE.fullmatch(path):
            return self._copied(*match.groups(), query)
        if match := re.fullmatch(r"b/[^/]+/o/(.+)", path):
            return self._object((bucket, urllib.parse.unquote(match[1])), query)
        if path == f"b/{bucket}/o" and self.command == "GET":
            return 200, self.objects.listed(bucket, query)
        if path == f"b/{bucket}/o":
            return self._upload(bucket, query, body)
        described = {"kind": "storage#bucket", "id": bucket, "name": bucket}
        described |= {"location": "US", "locationType": "region"}
        described |= {"storageClass": "STANDARD", "bucket": bucket}
        return 200, described | {"hierarchicalNamespace": {"enabled": False}}

    def _object(self, key, query):
        if self.command == "DELETE":
            self.objects.remove(key, query)
            return 204, b""
        content, generation, described = self.objects.get(key, query)
        if query.get("alt") != "media":
            return 200, described
        headers = [("x-goog-generation", str(generation))]
        headers += [("x-goog-stored-content-length", str(len(content)))]
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not span:
            return 200, content, headers
        size = len(content)
        first = int(span[1]) if span[1] else max(size - int(span[2]), 0)
        last = min(int(span[2]), size - 1) if span[1] and span[2] else size - 1
        if first >= size:
            raise Refusal(416, "requestedRangeNotSatisfiable")
        headers += [("Content-Range", f"bytes {first}-{last}/{size}")]
        return 206, content[first : last + 1], headers

    def _copied(self, bucket, name, verb, to_bucket, to_name, query):
        name, to_name = map(urllib.parse.unquote, (name, to_name))
        content, _, _ = self.objects.get((bucket, name), {})
        made = self.objects.put((to_bucket or bucket, to_name), content, query)
        if verb == "moveTo":
            self.objects.remove((bucket, name), {})
        if verb == "rewriteTo":
            size = {"totalBytesRewritten": made["size"], "objectSize": made["size"]}
            made = {"done": True, "resource": made, **size}
        return 200, made

    def _upload(self, bucket, query, body):
        kind = query.get("uploadType")
        if kind == "multipart":
            about, content = _parts(self.headers["Content-Type"], body)
            name = query.get("name") or json.loads(about)["name"]
            return 200, self.objects.put((bucket, name), content, query)
        if kind != "resumable":
            return 200, self.objects.put((bucket, query["name"]), body, query)
        if "upload_id" not in query:
            name = query.get("name") or json.loads(body)["name"]
            number = self.objects.begin((bucket, name), query)
            place = f"/upload/storage/v1/b/{bucket}/o?uploadType=resumable"
            url = f"http://{self.headers['Host']}{place}&upload_id={number}"
            return 200, b"", [("Location", url)]
        size = (self.headers.get("Content-Range") or "/*").rpartition("/")[2]
        size = None if size == "*" else int(size)
        held, made = self.objects.extend(query["upload_id"], body, size)
        if made is None:
            return 308, b"", [("Range", f"bytes=0-{held - 1}")]
        return 200, made

    def _batch(self, body):
        """Several deletions in one request."""
        answers = []
        for part in email.message_from_bytes(
            b"Content-Type: " + self.headers["Content-Type"].encode() + b"\n\n" + body
        ).get_payload():
            text = part.get_payload()
            verb, url = re.match(r"\s*(\S+) (\S+)", text).groups()
            assert verb == "DELETE", text
            name = urllib.parse.urlsplit(url).path.split("/o/")[1]
            code = 204
            try:
                key = urllib.parse.urlsplit(url).path.split("/b/")[1].split("/")[0]
                self.objects.remove((key, urllib.parse.unquote(name)), {})
            except Refusal as refusal:
                code = refusal.args[0]
            number = part["Content-ID"].strip("<>")
            answers.append(
                "--batch\r\nContent-Type: application/http\r\n"
                f"Content-ID: <response-{number}>\r\n\r\n"
                f"HTTP/1.1 {code} -\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        content = "".join([*answers, "--batch--"]).encode()
        return 200, content, [("Content-Type", "multipart/mixed; boundary=batch")]


def _parts(kind, body):
    """The two parts of an upload: what it is, and its content."""
    (edge,) = re.findall(r"boundary=[\"']?([^\"';]+)", kind)
    pieces = body.split(b"--" + edge.encode())[1:3]
    line = b"\r\n" if pieces[0].startswith(b"\r\n") else b"\n"
    return (p.partition(line * 2)[2].removesuffix(line) for p in pieces)


@contextlib.contextmanager
def serve():
    """Gives the `Objects` that all clients in this and later processes find."""
    objects = Objects()
    handler = type("Handler", (_Handler,), {"objects": objects})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    settings = {
        "STORAGE_EMULATOR_HOST": address,  # gcsfs and google-cloud-storage
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # TensorStore needs no other
        "GOOGLE_CLOUD_PROJECT": "none",
        "NO_GCE_CHECK": "true",  # nobody looks for a metadata server
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield objects
    finally:
        server.shutdown()
        server.server_close()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
