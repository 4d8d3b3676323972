"""Opens a page in a headless Chromium and tells what the page asked for."""

import dataclasses
import json
import shutil
import subprocess

_NAMES = ("chromium", "chromium-browser", "google-chrome")
# The browser's own errands (updates, the time) must not leave the machine either.
_NOWHERE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
_QUIET = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
)


@dataclasses.dataclass(frozen=True)
class Visit:
    """What opening a page led to: its DOM, the browser's log, a picture, requests."""

    dom: str
    log: str
    picture: object
    requests: list[str]


def find():
    """The browser's path, None without one."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


def visit(url, folder):
    """Opens `url` in a new profile in `folder`."""
    picture, net_log = folder / "page.png", folder / "net.json"
    done = subprocess.run(
        [
            find(),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            *_QUIET,
            _NOWHERE,
            f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr",
            f"--log-net-log={net_log}",
            "--window-size=1300,1000",
            f"--screenshot={picture}",
            "--dump-dom",
            url,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    asked = _asked_by_pages(json.loads(net_log.read_text()))
    return Visit(done.stdout, done.stderr, picture, asked)


def _asked_by_pages(log):
    """URLs that a page wanted, and hosts it had looked up, of Chromium's network log.

    The browser's own requests have no initiator, and belong to no file's page.
    """
    number = log["constants"]["logEventTypes"]
    asked = []
    for event in log["events"]:
        params, kind = event.get("params", {}), event["type"]
        if kind == number["URL_REQUEST_START_JOB"] and "url" in params:
            if params["initiator"] != "not an origin":
                asked.append(params["url"])
        elif kind == number["HOST_RESOLVER_MANAGER_REQUEST"] and "host" in params:
            if "file://" in params["network_anonymization_key"]:
                asked.append(params["host"])
    return asked
