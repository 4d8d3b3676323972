"""Fetches weights from the Hugging Face Hub, with the `hub` extra."""

import hashlib
import importlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from lakd_jax import errors
from lakd_jax.interop import files, published
from lakd_jax.store import workdir

_CARD = "config.json"
_RECORD = "fetched.json"  # the commit, and the hash of each file at the publisher


def fetch(
    field: str,
    wanted: published.HubFile,
    folder: pathlib.Path,
    notify: Callable[[str], None],
) -> tuple[pathlib.Path, published.Published]:
    """Returns a file of the Hub, and what its repository says about the weights.

    Both are fetched from the same commit, unless they are in `folder` already.

    Args:
      field: "student" or "teacher", for messages.
      wanted: the file.
      folder: where downloads are kept.
      notify: receives a line about the download.

    Raises:
      errors.TeacherError: it cannot be fetched, or is not what the Hub has.
      OSError: the folder cannot be written.
    """
    owner_and_name = wanted.repository.replace("/", "--")
    root = folder / "hf" / f"{owner_and_name}@{wanted.revision}"
    path = root / wanted.file
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        notify(f"{field}.init: fetching {wanted.name} to {path}")
        _download(wanted, root)
    record = _checked_record(root)
    commit = record.get("commit", wanted.revision)
    entry = _described(wanted, root / _CARD, commit, files.sha256(path))
    if entry.mean is None:
        notify(
            f"{field}.init: {wanted.name} has no {_CARD} with a normalisation; "
            "teacher.mean and teacher.std, or the data's, are used"
        )
    return path, entry


def _library(path: pathlib.Path) -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise errors.TeacherError(
            'names that begin with hf: need huggingface_hub: pip install "lakd-jax'
            f'[hub]", or put the file at {path}.'
        ) from error


def _download(wanted: published.HubFile, root: pathlib.Path) -> None:
    """Fetches the card, if there is one, and then the weights."""
    path = root / wanted.file
    library = _library(path)
    # The library reads this variable when it is imported, which may be too early.
    endpoint = os.environ.get("HF_ENDPOINT") or None
    try:
        commit, digest = _published(library, wanted, wanted.file, "", endpoint)
        record = {"commit": commit, "files": {wanted.file: digest}}
        place = {"revision": commit, "local_dir": root, "endpoint": endpoint}
        try:
            _, digest = _published(library, wanted, _CARD, commit, endpoint)
        except library.errors.EntryNotFoundError:
            pass
        else:
            record["files"][_CARD] = digest
            library.hf_hub_download(wanted.repository, _CARD, **place)
        # Written before the weights are there, which are then never used unchecked.
        workdir.write_json(root / _RECORD, record)
        library.hf_hub_download(wanted.repository, wanted.file, **place)
    except errors.TeacherError:
        raise
    # Its errors are those of an HTTP client that depends on its version.
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise errors.TeacherError(
            f"{wanted.file} of {wanted.repository} cannot be fetched "
            f"({reason.splitlines()[0]}).\nThe same command tries again. Without a "
            f"network, put the file at {path}, and its {_CARD} at {root / _CARD}."
        ) from error


def _published(
    library: Any,
    wanted: published.HubFile,
    file: str,
    commit: str,
    endpoint: str | None,
) -> tuple[str, str]:
    """Returns the commit and the hash of a file at the Hub."""
    revision = commit or wanted.revision
    url = library.hf_hub_url(
        wanted.repository, file, revision=revision, endpoint=endpoint
    )
    found = library.get_hf_file_metadata(url)
    if not found.commit_hash or len(found.etag or "") not in (40, 64):
        raise errors.TeacherError(
            f"{url} comes without a commit or a hash; use another HF_ENDPOINT."
        )
    return found.commit_hash, found.etag


def _checked_record(root: pathlib.Path) -> dict[str, Any]:
    """Returns the record of what was fetched, after checking the files against it.

    It is empty for files that were put there by hand, which are what they are.

    Raises:
      errors.TeacherError: the file or its card has changed, or was damaged on the way.
    """
    record = workdir.read_json(root / _RECORD) if (root / _RECORD).exists() else {}
    for name, digest in record.get("files", {}).items():
        file = root / name
        if file.exists() and _digest(file, len(digest)) != digest:
            raise errors.TeacherError(
                f"{file} is not what was published (its hash is not {digest[:8]}...)."
                f"\nDelete {root}; it is then fetched again."
            )
    return record


def _digest(path: pathlib.Path, digits: int) -> str:
    """Returns a file's hash as the Hub has it: Git's for small files, or SHA-256."""
    if digits == 64:
        return files.sha256(path)
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _described(
    wanted: published.HubFile, card: pathlib.Path, commit: str, sha256: str
) -> published.Published:
    """Returns what a repository's config.json, as timm writes it, says.

    Raises:
      errors.TeacherError: it cannot be understood.
    """
    source = f"https://huggingface.co/{wanted.repository}"
    try:
        values = json.loads(card.read_text(encoding="utf-8")) if card.exists() else {}
        known = _values(values) if values else {}
    except (ValueError, TypeError, AttributeError) as error:
        raise errors.TeacherError(
            f"{card} cannot be understood ({error}).\nGive the file itself, "
            f"{card.with_name(wanted.file)}, and teacher.mean and teacher.std."
        ) from error
    return published.Published(
        name=wanted.name,
        network="",
        address=f"{source}/resolve/{commit}/{wanted.file}",
        sha256=sha256,
        source=source,
        **known,
    )


def _values(card: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `published.Published` that a config.json has."""
    values, known = card.get("pretrained_cfg", card), {}
    if not isinstance(values, dict):
        raise ValueError(f"pretrained_cfg is {values}")
    if "mean" in values and "std" in values:
        for name in ("mean", "std"):
            red, green, blue = map(float, values[name])
            if not 0 <= min(red, green, blue) <= max(red, green, blue) <= 1:
                raise ValueError(f"{name} is {values[name]}")
            known[name] = (red, green, blue)
    if "input_size" in values:
        _, height, width = map(int, values["input_size"])
        known["size"] = height if height == width else 0
        share = float(values.get("crop_pct", 1))
        if not 0 < share <= 1:
            raise ValueError(f"crop_pct is {share}")
        known["shorter"] = math.floor(known["size"] / share)  # as timm rounds
    if "interpolation" in values:
        known["interpolation"] = str(values["interpolation"])
    names = card.get("label_names", ())
    # timm allows a dictionary, for classes whose numbers have gaps.
    if isinstance(names, list) and len(set(names)) == len(names):
        known["classes"] = tuple(map(str, names))
    return known
