"""Weights on the Hugging Face Hub, played by a server on loopback."""

import hashlib
import json

import audit
import pytest
import web

from lakd_jax import errors
from lakd_jax.interop import downloads, hub

pytest.importorskip("huggingface_hub")

_GET = ("GET", "/org/")
CONTENT = bytes(range(256)) * 40
COMMIT = "c0ffee" + "0" * 34
# As timm writes it.
CARD = {
    "architecture": "resnet34",
    "num_classes": 3,
    "label_names": ["red", "green", "blue"],
    "pretrained_cfg": {
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.1],
    },
}
NAME = "hf:org/net"
MAIN, PINNED = "/org/net/resolve/main/", f"/org/net/resolve/{COMMIT}/"
WEIGHTS = "model.safetensors"


def serve(site, name, content, digest):
    """The site has a file at a branch and its commit, as the Hub does."""
    for folder in (MAIN, PINNED):
        site.files[folder + name] = content
        site.headers[folder + name] = {
            "ETag": f'"{digest}"',
            "X-Repo-Commit": COMMIT,
        }


def serve_card(site, text):
    content = text.encode()
    head = f"blob {len(content)}\0".encode()
    serve(site, "config.json", content, hashlib.sha1(head + content).hexdigest())


@pytest.fixture
def site(monkeypatch):
    missing = {"X-Error-Code": "EntryNotFound"}
    with web.Server({}) as server:
        for folder in (MAIN, PINNED):
            server.headers[folder + "config.json"] = missing
        serve(server, WEIGHTS, CONTENT, hashlib.sha256(CONTENT).hexdigest())
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


def fetch(folder, name=NAME, notify=lambda line: None):
    return downloads.fetch("teacher", name, folder, notify)


def message(folder, name=NAME):
    with pytest.raises(errors.TeacherError) as caught:
        fetch(folder, name)
    text = str(caught.value)
    assert text.startswith(f"teacher.init: {name}: ") and len(text.splitlines()) <= 3
    return text


def test_weights_and_card_come_once_and_from_one_commit(site, tmp_path):
    serve_card(site, json.dumps(CARD))
    lines = []
    path, entry = fetch(tmp_path, notify=lines.append)
    assert path == tmp_path / "hf/org--net@main" / WEIGHTS
    assert path.read_bytes() == CONTENT
    assert lines == [f"teacher.init: fetching {NAME} to {path}"]
    # The library asks the Hub for more than the files.
    got = {path for method, path, _ in site.asked if (method, path[:5]) == _GET}
    assert got == {PINNED + WEIGHTS, PINNED + "config.json"}
    assert (entry.mean, entry.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert (entry.size, entry.shorter, entry.interpolation) == (224, 235, "bicubic")
    assert entry.classes == ("red", "green", "blue")
    assert entry.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert entry.address == f"https://huggingface.co{PINNED}{WEIGHTS}"
    with audit.without(*audit.NETWORK):
        assert fetch(tmp_path) == (path, entry)


def test_a_revision_and_a_file_can_be_named(site, tmp_path):
    serve(site, "sub/other.safetensors", CONTENT, hashlib.sha256(CONTENT).hexdigest())
    path, _ = fetch(tmp_path, f"{NAME}@{COMMIT}:sub/other.safetensors")
    assert path == tmp_path / f"hf/org--net@{COMMIT}/sub/other.safetensors"


def test_weights_without_a_card_say_that_the_normalisation_is_unknown(site, tmp_path):
    lines = []
    _, entry = fetch(tmp_path, notify=lines.append)
    assert entry.mean is None and entry.size == 0 and entry.classes == ()
    assert "has no config.json with a normalisation" in lines[-1]


def test_a_cut_file_is_completed(site, tmp_path):
    site.cuts[PINNED + WEIGHTS] = [1000]
    assert fetch(tmp_path)[0].read_bytes() == CONTENT


def test_other_content_than_the_hub_announced_is_refused(site, tmp_path):
    serve(site, WEIGHTS, CONTENT, "0" * 64)
    assert "is not what was published" in message(tmp_path)
    # It stays refused: the hash is recorded.
    assert "is not what was published" in message(tmp_path)


def test_a_file_that_changes_later_is_refused(site, tmp_path):
    path, _ = fetch(tmp_path)
    path.write_bytes(CONTENT[::-1])
    assert f"Delete {path.parent}; it is then fetched again." in message(tmp_path)


@pytest.mark.parametrize("code", ["EntryNotFound", "RepoNotFound", "RevisionNotFound"])
def test_what_is_not_there(site, tmp_path, code):
    del site.files[MAIN + WEIGHTS]
    site.headers[MAIN + WEIGHTS] = {"X-Error-Code": code}
    text = message(tmp_path)
    assert f"{WEIGHTS} of org/net cannot be fetched (404" in text
    assert not (tmp_path / "hf/org--net@main" / WEIGHTS).exists()


def test_a_hub_without_hashes_is_refused(site, tmp_path):
    site.headers[MAIN + WEIGHTS] = {}
    assert "without a commit or a hash" in message(tmp_path)


def test_without_a_network_files_can_be_put_there(site, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", web.closed_port())
    text = message(tmp_path)
    place = tmp_path / "hf/org--net@main" / WEIGHTS
    assert f"put the file at {place}, and its config.json at" in text
    place.write_bytes(CONTENT)
    place.with_name("config.json").write_text(json.dumps(CARD))
    path, entry = fetch(tmp_path)
    assert path == place and entry.size == 224


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"mean": [1, 2, 3], "std": [1, 1, 1]}',
        '{"mean": 0.5, "std": 0.5}',
        '{"pretrained_cfg": []}',
        '{"pretrained_cfg": {"input_size": [224]}}',
        '{"pretrained_cfg": {"input_size": [3, 224, 224], "crop_pct": 0}}',
    ],
)
def test_a_made_up_card_is_an_error_in_a_line(site, tmp_path, text):
    serve_card(site, text)
    assert "config.json cannot be understood" in message(tmp_path)


def test_without_the_extra_the_message_says_what_to_install(tmp_path, monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(hub.importlib, "import_module", absent)
    assert 'pip install "lakd-jax[hub]"' in message(tmp_path)
