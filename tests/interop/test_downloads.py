"""Published weights: fetched once, resumed when cut off, and checked."""

import hashlib
import http.client
import urllib.error
import urllib.request

import audit
import pytest
import web

from lakd_jax import errors
from lakd_jax.interop import downloads, published

CONTENT = bytes(range(256)) * 40
DIGEST = hashlib.sha256(CONTENT).hexdigest()
NAME, PATH = "torchvision:small.TEST", f"/models/small-{DIGEST[:8]}.pth"


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    """NAME is listed, at an address that does not exist."""
    address = f"https://publisher.invalid{PATH}"
    entry = published.Published(NAME, "small", address, DIGEST[:8])
    monkeypatch.setitem(published.TABLE, NAME, entry)


@pytest.fixture
def site(monkeypatch):
    with web.Server({PATH: CONTENT}) as server:
        monkeypatch.setenv(downloads.BASE, server.address)
        yield server


@pytest.fixture
def fetch(tmp_path):
    """Fetches NAME; returns (path, what comes with it, lines)."""

    def run():
        lines = []
        return *downloads.fetch("teacher", NAME, tmp_path, lines.append), lines

    return run


def asked(site):
    """The ranges that were asked for, "" for all."""
    assert {(method, path) for method, path, _ in site.asked} <= {("GET", PATH)}
    return [wanted for *_, wanted in site.asked]


def message(fetch):
    with pytest.raises(errors.TeacherError) as caught:
        fetch()
    text = str(caught.value)
    assert len(text.splitlines()) <= 3
    return text


def test_a_whole_file_is_fetched_once_with_its_progress(site, fetch, tmp_path):
    path, entry, lines = fetch()
    assert path == tmp_path / PATH.rpartition("/")[2]
    assert path.read_bytes() == CONTENT and entry.sha256 == DIGEST
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert lines == [
        f"teacher.init: fetching {site.address}{PATH} to {path}",
        "  100 % of 0.0 MiB",
    ]
    with audit.without(*audit.NETWORK):
        assert fetch() == (path, entry, [])


def test_what_was_cut_off_continues(site, fetch):
    site.cuts[PATH] = [1000, 2000]
    path, _, lines = fetch()
    assert path.read_bytes() == CONTENT
    assert asked(site) == ["", "bytes=1000-", "bytes=3000-"]
    assert lines[-1] == "  100 % of 0.0 MiB"


def test_a_server_without_ranges_sends_it_again(site, fetch):
    site.cuts[PATH], site.ranges = [1000], False
    assert fetch()[0].read_bytes() == CONTENT
    assert asked(site) == ["", "bytes=1000-"]


def test_after_three_attempts_the_next_command_continues(site, fetch, tmp_path):
    site.cuts[PATH] = [1000, 1000, 1000]
    text = message(fetch)
    assert text.startswith(f"teacher.init: {NAME}: {site.address}{PATH} cannot be")
    assert "cut off after 3000 of 10240 bytes" in text and "continues" in text
    assert f"put it at {tmp_path}" in text
    site.asked.clear()
    assert fetch()[0].read_bytes() == CONTENT
    assert asked(site) == ["bytes=3000-"]


@pytest.mark.parametrize("rest", [b"of another file", CONTENT + b"more"])
def test_a_rest_that_does_not_fit_is_dropped(site, fetch, tmp_path, rest):
    (tmp_path / f"{PATH.rpartition('/')[2]}.part").write_bytes(rest)
    assert fetch()[0].read_bytes() == CONTENT
    assert asked(site) == [f"bytes={len(rest)}-", ""]


def test_another_file_is_refused_and_not_kept(site, fetch, tmp_path):
    site.files[PATH] = CONTENT[::-1]
    text = message(fetch)
    found = hashlib.sha256(CONTENT[::-1]).hexdigest()[:8]
    assert f"begins with {found}, not {DIGEST[:8]}" in text
    assert asked(site) == [""]
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) == 0
    site.files[PATH] = CONTENT
    assert fetch()[0].read_bytes() == CONTENT


def test_a_file_that_is_gone_is_not_asked_for_again(site, fetch):
    site.files.clear()
    text = message(fetch)
    assert "HTTP Error 404" in text and "are kept" not in text
    assert asked(site) == [""]


def test_a_server_in_trouble_is_asked_again(site, fetch):
    site.status[PATH] = [503, 500]
    assert fetch()[0].read_bytes() == CONTENT
    assert len(asked(site)) == 3


def test_without_a_network_a_file_can_be_put_there(fetch, tmp_path, monkeypatch):
    monkeypatch.setenv(downloads.BASE, web.closed_port())
    text = message(fetch)
    place = tmp_path / PATH.rpartition("/")[2]
    assert "refused" in text and f"put it at {place}." in text
    place.write_bytes(CONTENT[1:])
    assert f"{place} is damaged, or another file" in message(fetch)
    place.write_bytes(CONTENT)
    assert fetch()[0] == place


def test_a_mirror_that_is_no_address(fetch, monkeypatch):
    monkeypatch.setenv(downloads.BASE, "mirror")
    assert "LAKD_JAX_DOWNLOADS must begin with https://" in message(fetch)


def test_a_folder_that_cannot_be_used_is_named(site, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.TeacherError, match="^teacher.cache: .*/file/downloads"):
        downloads.fetch("student", NAME, tmp_path / "file/downloads", print)


def test_a_redirect_does_not_leave_https():
    follow = downloads._Redirects().redirect_request
    request = urllib.request.Request("https://a.invalid/x", headers={"Range": "y"})
    where = (None, 302, "", http.client.HTTPMessage())
    assert follow(request, *where, "https://b.invalid/x").get_header("Range") == "y"
    with pytest.raises(urllib.error.URLError, match="not https"):
        follow(request, *where, "http://b.invalid/x")
