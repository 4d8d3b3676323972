"""tfds data sets, prepared from a local web server and read without TensorFlow."""

import functools
import hashlib
import http.server
import io
import json
import pathlib
import sys
import tarfile
import threading

import audit
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums

from lakd_jax import data, errors
from lakd_jax.data.tfds import builders
from lakd_jax.data.tfds import source as source_lib

COARSE = [f"group{k}" for k in range(20)]
NAMES = {
    "cifar10": [f"kind{k}" for k in range(10)],
    "cifar100": [f"kind{k:02d}" for k in range(100)],
    "svhn_cropped": [str(k) for k in range(10)],
}
COUNTS = {"train": 10, "test": 4}


def pixels(role: str) -> np.ndarray:
    seed = ("train", "test").index(role)
    shape = (COUNTS[role], 32, 32, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def labels(role: str) -> np.ndarray:
    return np.arange(COUNTS[role], dtype=np.uint8)[::-1]


def cifar_records(role: str, coarse: bool) -> bytes:
    columns = [labels(role)[:, None] % 20] * coarse + [labels(role)[:, None]]
    planes = pixels(role).transpose(0, 3, 1, 2).reshape(COUNTS[role], -1)
    return np.concatenate([*columns, planes], axis=1).tobytes()


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def cifar10_archive() -> bytes:
    train = cifar_records("train", coarse=False)
    fifth = len(train) // 5
    files = {f"data_batch_{k + 1}.bin": train[k * fifth :][:fifth] for k in range(5)}
    files["test_batch.bin"] = cifar_records("test", coarse=False)
    files["batches.meta.txt"] = ("\n".join(NAMES["cifar10"]) + "\n\n").encode()
    hostile = {"../../outside.txt": b"x", "cifar-10-batches-bin/readme.html": b"x"}
    files = {f"cifar-10-batches-bin/{k}": v for k, v in files.items()}
    return tar(hostile | files, "w:gz")


def cifar100_archive() -> bytes:
    files = {f"{role}.bin": cifar_records(role, coarse=True) for role in COUNTS}
    files["coarse_label_names.txt"] = ("\n".join(COARSE) + "\n").encode()
    files["fine_label_names.txt"] = ("\n".join(NAMES["cifar100"]) + "\n").encode()
    return tar({f"cifar-100-binary/{k}": v for k, v in files.items()}, "w:gz")


def svhn_matrix(role: str) -> bytes:
    from scipy import io as scipy_io

    buffer = io.BytesIO()
    digits = np.where(labels(role) == 0, 10, labels(role))[:, None]
    content = {"X": pixels(role).transpose(1, 2, 3, 0), "y": digits}
    scipy_io.savemat(buffer, content)
    return buffer.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files`; records each request in `seen`."""

    def __init__(self, files, seen, *rest):
        self.files, self.seen = files, seen
        super().__init__(*rest)

    def do_GET(self):
        self.seen.append(self.path)
        content = self.files.get(self.path)
        self.send_response(200 if content is not None else 404)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *_):
        pass


class Site:
    """A local web server; `publish` makes a builder download from it."""

    def __init__(self, monkeypatch):
        self.files, self.seen, self.monkeypatch = {}, [], monkeypatch
        handler = functools.partial(Handler, self.files, self.seen)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(
            target=self.server.serve_forever, args=(0.02,), daemon=True
        ).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def publish(self, name: str, archives: dict[str, bytes]) -> None:
        urls, infos = {}, {}
        for part, content in archives.items():
            suffix = builders.URLS[name][part].rsplit("/", 1)[1]
            urls[part] = f"{self.address}/{suffix}"
            self.files[f"/{suffix}"] = content
            digest = hashlib.sha256(content).hexdigest()
            size = tfds.core.utils.Size(len(content))
            infos[urls[part]] = checksums.UrlInfo(size, digest, suffix)
        self.monkeypatch.setitem(builders.URLS, name, urls)
        stock = builders.builder_class(name)
        self.monkeypatch.setattr(stock, "url_infos", infos)


ARCHIVES = {
    "cifar10": lambda: {"all": cifar10_archive()},
    "cifar100": lambda: {"all": cifar100_archive()},
    "svhn_cropped": lambda: {role: svhn_matrix(role) for role in COUNTS},
}


class WithoutTensorFlow:
    """An import finder that does not find TensorFlow."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorflow":
            return None
        return self.finder.find_spec(name, path, target)


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    finders = [WithoutTensorFlow(finder) for finder in sys.meta_path]
    monkeypatch.setattr(sys, "meta_path", finders)
    site = Site(monkeypatch)
    yield site
    assert "tensorflow" not in sys.modules
    site.server.shutdown()
    site.server.server_close()


@pytest.fixture
def cifar10(site):
    """The site, with CIFAR-10 on it."""
    site.publish("cifar10", ARCHIVES["cifar10"]())
    return site


@pytest.fixture
def prepared(cifar10, tmp_path):
    """CIFAR-10, which has been prepared in the directory of the test."""
    return data.load("cifar10", data_dir=str(tmp_path))


def failure(name: str, data_dir: pathlib.Path, **options) -> str:
    with pytest.raises(errors.DataError) as caught:
        data.load(name, data_dir=str(data_dir), **options)
    text = str(caught.value)
    assert text.count("\n") < 10
    return text


def by_content(split: data.Split) -> dict[bytes, int]:
    pairs = zip(split.images, split.labels, strict=True)
    return {image.tobytes(): int(label) for image, label in pairs}


@pytest.mark.parametrize("name", sorted(ARCHIVES))
def test_downloads_once_and_reads_every_pixel(name, site, tmp_path):
    site.publish(name, ARCHIVES[name]())
    first = data.load(name, data_dir=str(tmp_path))
    requests = len(site.seen)
    assert requests == len(builders.URLS[name])
    with audit.without(*audit.NETWORK):
        second = data.load(name, data_dir=str(tmp_path))
    assert len(site.seen) == requests
    assert first.fingerprint() == second.fingerprint()
    assert first.name == name and first.classes == tuple(NAMES[name])
    for role in COUNTS:
        split = getattr(first, role)
        assert split.images.shape == (COUNTS[role], 32, 32, 3)
        expected = zip(pixels(role), labels(role), strict=True)
        assert by_content(split) == {x.tobytes(): int(y) for x, y in expected}
        assert split.ids.tolist() == list(range(COUNTS[role]))
    assert not list(tmp_path.parent.rglob("outside.txt"))


@pytest.mark.parametrize("name", sorted(ARCHIVES))
def test_the_stock_builder_opens_the_result(name, site, tmp_path):
    site.publish(name, ARCHIVES[name]())
    data.load(name, data_dir=str(tmp_path))
    stock = tfds.builder(name, data_dir=str(tmp_path), file_format="array_record")
    assert type(stock) is tfds.builder_cls(name)
    assert type(stock) is not builders.builder_class(name)
    assert stock.info.features["label"].names == NAMES[name]
    for role, count in COUNTS.items():
        source = stock.as_data_source(role)
        examples = [source[k] for k in range(count)]
        assert stock.info.splits[role].num_examples == count
        assert set(examples[0]) == set(stock.info.features)
        digits = 6 if name == "svhn_cropped" else 5
        for example in examples:
            place = int(example["id"].decode().removeprefix(f"{role}_"))
            assert example["id"].decode() == f"{role}_{place:0{digits}d}"
            np.testing.assert_array_equal(example["image"], pixels(role)[place])
            assert example["label"] == labels(role)[place]
            if name == "cifar100":
                assert example["coarse_label"] == labels(role)[place] % 20


@pytest.mark.parametrize("name", sorted(builders.URLS))
def test_urls_and_version_are_those_of_tfds(name):
    stock, ours = tfds.builder_cls(name), builders.builder_class(name)
    assert set(builders.URLS[name].values()) <= set(stock.url_infos)
    assert ours.url_infos == stock.url_infos
    assert ours.name == name and ours.VERSION == stock.VERSION


def test_a_wrong_checksum_is_refused(cifar10, tmp_path):
    path = next(iter(cifar10.files))
    cifar10.files[path] = cifar10.files[path][:-1] + b"!"
    text = failure("cifar10", tmp_path)
    assert "wrong checksum" in text and "cifar-10-binary.tar.gz" in text
    assert not (tmp_path / "cifar10" / "3.0.2").exists()
    cifar10.publish("cifar10", ARCHIVES["cifar10"]())
    data.load("cifar10", data_dir=str(tmp_path))  # a second attempt succeeds


def test_a_url_without_checksum_is_refused(cifar10, tmp_path, monkeypatch):
    monkeypatch.setattr(builders.builder_class("cifar10"), "url_infos", {})
    assert "checksum" in failure("cifar10", tmp_path)
    assert not cifar10.seen


def test_a_failed_download_says_what_to_do(cifar10, tmp_path):
    archive = cifar10.files.pop(next(iter(cifar10.files)))
    text = failure("cifar10", tmp_path)
    manual = tmp_path / "downloads" / "manual"
    assert "404" in text and str(manual) in text
    assert builders.URLS["cifar10"]["all"] in text
    manual.mkdir(parents=True)
    (manual / "cifar-10-binary.tar.gz").write_bytes(archive)
    before = len(cifar10.seen)
    assert len(data.load("cifar10", data_dir=str(tmp_path)).train) == COUNTS["train"]
    assert len(cifar10.seen) == before


def test_an_unreachable_host_is_reported(cifar10, tmp_path, monkeypatch):
    cifar10.server.server_close()
    monkeypatch.setattr(builders, "_RETRIES", 0)
    assert "downloading and preparing failed" in failure("cifar10", tmp_path)


def test_an_archive_without_a_file_is_named(site, tmp_path):
    site.publish("cifar100", {"all": tar({"cifar-100-binary/train.bin": b""}, "w:gz")})
    assert "lacks cifar-100-binary/coarse_label_names.txt" in failure(
        "cifar100", tmp_path
    )


def test_a_truncated_shard_is_an_error(prepared, tmp_path):
    """Promise 32: a shard cut short is not trained on."""
    (shard,) = tmp_path.rglob("cifar10-train.array_record*")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert "cannot be read" in failure("cifar10", tmp_path)
    shard.unlink()
    assert "Delete the directory" in failure("cifar10", tmp_path)


def rewrite_info(data_dir: pathlib.Path, file_format: str) -> None:
    (path,) = data_dir.rglob("dataset_info.json")
    info = json.loads(path.read_text()) | {"fileFormat": file_format}
    path.write_text(json.dumps(info))


def as_tfrecords(data_dir: pathlib.Path) -> None:
    """Converts a prepared data set to TFRecord, the default format of tfds."""
    from array_record.python import array_record_module

    for path in list(data_dir.rglob("*.array_record*")):
        reader = array_record_module.ArrayRecordReader(str(path))
        records = [reader.read([k])[0] for k in range(reader.num_records())]
        reader.close()
        path.unlink()
        path.with_name(path.name.replace("array_record", "tfrecord")).write_bytes(
            b"".join(
                len(r).to_bytes(8, "little") + b"crc1" + r + b"crc2" for r in records
            )
        )
    rewrite_info(data_dir, "tfrecord")


def test_tfrecords_are_read_alike_and_at_any_size(cifar10, prepared, tmp_path):
    as_tfrecords(tmp_path)
    again, small = (
        data.load("cifar10", data_dir=str(tmp_path), image_size=size)
        for size in (0, 16)
    )
    assert prepared.fingerprint() == again.fingerprint()
    assert small.train.images.shape[1:] == (16, 16, 3)
    assert len(cifar10.seen) == 1


@pytest.mark.parametrize("lost", [1, 5, 3000])
def test_truncated_tfrecords_are_an_error(prepared, tmp_path, lost):
    """Promise 32: in the other format as well."""
    as_tfrecords(tmp_path)
    (shard,) = tmp_path.rglob("cifar10-train.tfrecord*")
    shard.write_bytes(shard.read_bytes()[:-lost])
    assert "ends within a record" in failure("cifar10", tmp_path)


def test_fewer_examples_than_the_info_says_is_an_error(prepared, tmp_path):
    """Promise 32: a half-prepared directory is not trained on."""
    as_tfrecords(tmp_path)
    (shard,) = tmp_path.rglob("cifar10-train.tfrecord*")
    content = shard.read_bytes()
    length = 16 + int.from_bytes(content[:8], "little")
    shard.write_bytes(content[length:])
    assert "9 examples" in (text := failure("cifar10", tmp_path)) and "10" in text


def test_other_formats_are_refused(prepared, tmp_path):
    rewrite_info(tmp_path, "riegeli")
    text = failure("cifar10", tmp_path)
    assert "riegeli" in text and "--file_format=array_record" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifer10", ["cifar10", "folder:PATH"]),
        ("digit", ["digits"]),
        ("cifar10_1/no_such", ["no_such"]),
        ("mnist", ["pip install lakd-jax[tf]", "--file_format=array_record"]),
    ],
)
def test_sets_that_cannot_be_opened_here(name, words, tmp_path, monkeypatch):
    monkeypatch.setattr(source_lib, "has_tensorflow", lambda: False)
    text = failure(name, tmp_path)
    assert all(word in text for word in words), text
