"""Fetches weights that others publish, once, and checks them before they are read."""

import contextlib
import dataclasses
import errno
import fcntl
import http.client
import os
import pathlib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import IO, Any

from lakd_jax import errors
from lakd_jax.interop import files, hub, published

Notify = Callable[[str], None]

BASE = "LAKD_JAX_DOWNLOADS"  # a mirror, which replaces scheme and host of addresses
_CHUNK = 2**20
_TIMEOUT = 30.0  # seconds without an answer
_ATTEMPTS = 3  # each continues where the one before was cut off


def fetch(
    field: str, name: str, folder: pathlib.Path, notify: Notify
) -> tuple[pathlib.Path, published.Published]:
    """Returns the file of published weights, and what comes with them.

    The file is fetched unless it is in `folder` already. Its hash is checked each time.

    Args:
      field: "student" or "teacher", for messages.
      name: a valid name, see `published.fault`.
      folder: where downloads are kept; created if needed.
      notify: receives lines about the progress.

    Raises:
      errors.TeacherError: the file cannot be fetched, or is not what was published.
    """
    try:
        if name.startswith(published.HUB):
            return hub.fetch(field, published.hub_file(name), folder, notify)
        entry = published.TABLE[name]
        path = folder / entry.file
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with _claimed(path.with_name(f"{path.name}.part")) as part:
                if not path.exists():  # otherwise another process has just fetched it
                    _fetch(field, entry, part, path, notify)
    except errors.TeacherError as error:
        raise errors.TeacherError(f"{field}.init: {name}: {error}") from error
    except OSError as error:
        raise errors.TeacherError(
            f"teacher.cache: {folder}, where downloads are kept, cannot be used: "
            f"{error}\nSet it to another folder."
        ) from error
    found = files.sha256(path)
    if not found.startswith(entry.sha256):
        raise errors.TeacherError(
            f"{field}.init: {name}: {path} is damaged, or another file: its SHA-256 "
            f"begins with {found[:8]}, that of {entry.address} with {entry.sha256[:8]}."
            "\nDelete it; it is then fetched again."
        )
    return path, dataclasses.replace(entry, sha256=found)


def address_of(entry: published.Published) -> str:
    """Returns the address of a file, at the mirror in `LAKD_JAX_DOWNLOADS` if any.

    Raises:
      errors.TeacherError: the variable is no address.
    """
    mirror = os.environ.get(BASE, "").rstrip("/")
    if not mirror:
        return entry.address
    if not mirror.startswith(("https://", "http://")):
        raise errors.TeacherError(
            f"{BASE} must begin with https:// or http://, is {mirror!r}."
        )
    return mirror + urllib.parse.urlsplit(entry.address).path


@contextlib.contextmanager
def _claimed(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """Opens a file for appending; waits while another process has it open."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Some file systems have no locks; whatever two processes write there, the
            # hash is checked.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield file


def _fetch(
    field: str,
    entry: published.Published,
    part: IO[bytes],
    path: pathlib.Path,
    notify: Notify,
) -> None:
    """Fetches the file at `path` by way of `part`, which may hold its beginning."""
    address = address_of(entry)
    resumed = part.seek(0, os.SEEK_END) > 0
    notify(f"{field}.init: fetching {address} to {path}")
    _complete(address, part, path, notify)
    found = files.sha256(part.name)
    if resumed and not found.startswith(entry.sha256):
        notify(f"{field}.init: what was left of {path.name} does not fit: once more")
        part.truncate(0)
        _complete(address, part, path, notify)
        found = files.sha256(part.name)
    if not found.startswith(entry.sha256):
        part.truncate(0)  # deleting it would let go of the lock
        raise errors.TeacherError(
            f"{address} is not what was published: its SHA-256 begins with "
            f"{found[:8]}, not {entry.sha256[:8]}. It was discarded.\nRepeat the "
            f"command, look for a proxy in between, or put the right file at {path}."
        )
    os.replace(part.name, path)


def _complete(
    address: str, part: IO[bytes], path: pathlib.Path, notify: Notify
) -> None:
    """Appends to `part` until it is whole; raises TeacherError if it cannot be."""
    reason: Exception | None = None
    for _ in range(_ATTEMPTS):
        try:
            _append(address, part, notify)
            part.flush()
            os.fsync(part.fileno())
            return
        except urllib.error.HTTPError as error:
            reason = error
            error.close()
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.truncate(0)  # it is longer than the file is now
            elif error.code < http.client.INTERNAL_SERVER_ERROR:
                break  # it would be the same again
        except (urllib.error.URLError, http.client.HTTPException) as error:
            reason = error
    kept = part.seek(0, os.SEEK_END)
    more = f" {_mib(kept)} are kept, and the same command continues." if kept else ""
    raise errors.TeacherError(
        f"{address} cannot be fetched ({reason}).{more}\nWithout a network, fetch it "
        f"elsewhere and put it at {path}."
    ) from reason


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from a protected connection to an unprotected one."""

    def redirect_request(
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """See the base class; raises URLError where the protection would be lost."""
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise urllib.error.URLError(f"redirected to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _append(address: str, part: IO[bytes], notify: Notify) -> None:
    """Appends what `part` lacks; starts it again if the server sends all of it.

    Raises:
      urllib.error.URLError, http.client.HTTPException: the connection failed, or ended
        before the file did.
    """
    have = part.seek(0, os.SEEK_END)
    request = urllib.request.Request(address, headers={"User-Agent": "lakd_jax"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.build_opener(_Redirects).open(request, timeout=_TIMEOUT) as r:
        content = r.headers.get("Content-Range", "")
        if have and not (r.status == 206 and content.startswith(f"bytes {have}-")):
            part.truncate(0)
            have = 0
        length = r.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else 0
        for chunk in _chunks(r):
            part.write(chunk)
            quarters = 4 * have // total if total else 0
            have += len(chunk)
            if total and 4 * have // total > quarters:
                notify(f"  {100 * have // total} % of {_mib(total)}")
    if total and have != total:
        raise urllib.error.URLError(f"cut off after {have} of {total} bytes")


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yields the content; a lost connection is a URLError, unlike a full disk."""
    while True:
        try:
            chunk = response.read(_CHUNK)
        except OSError as error:
            raise urllib.error.URLError(error) from error
        if not chunk:
            return
        yield chunk


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
