"""Records what training gives: losses and states of tiny runs, case by case.

    python -m tests.support.recordings                   # rewrites recordings.json
    python -m tests.support.recordings --only='lakd*'    # these cases of it

Every case is a run of three steps (four with a short batch) on made images, from a
teacher whose weights are made as well. `tests/long/test_recordings.py` holds the code
to the numbers; `scripts/same_bits.py` compares two commits to the bit.

Only what users rely on is used, so that the package can be rewritten below it: the
fields of the config, `lakd_jax.train`, and the files of a run. Reading a checkpoint has
no such surface: `_arrays` is the one function to adapt.
"""

import argparse
import contextlib
import fnmatch
import hashlib
import io
import json
import math
import os
import pathlib
import sys
import tempfile
from unittest import mock

import numpy as np
import safetensors.numpy
from flax import traverse_util

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # where pytest looks, too
import compilation  # noqa: E402
import recordings_cases  # noqa: E402

FILE = pathlib.Path(__file__).with_suffix(".json")
CLASSES, SIZE = 3, 8
DIGITS = 8
CASES = recordings_cases.CASES
ALL = CASES | recordings_cases.BITS_ONLY

# --------------------------------------------------------------- images and a teacher


def _write_images(path):
    """Noise of three classes; the class is where the light is."""
    rng = np.random.default_rng(0)

    def split(count):
        labels = np.arange(count) % CLASSES
        images = rng.integers(0, 80, (count, SIZE, SIZE, 3)).astype(np.uint8)
        images[labels == 1, :, : SIZE // 2] += 150
        images[labels == 2, :, SIZE // 2 :] += 150
        return images, labels

    train, test = split(48), split(16)
    names = ("train_images", "train_labels", "test_images", "test_labels")
    np.savez(path, **dict(zip(names, train + test, strict=True)))


def _teacher_shapes():
    """{name: shape} of the variables of resnet8."""

    def norm(name, width):
        params = {f"params/{name}/{leaf}": (width,) for leaf in ("bias", "scale")}
        stats = {f"batch_stats/{name}/{leaf}": (width,) for leaf in ("mean", "var")}
        return params | stats

    shapes = {"params/stem/conv/kernel": (3, 3, 3, 16), **norm("stem/bn", 16)}
    for k, (before, width) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
        block = f"stage{k}/block1"
        for conv, size, fan in (("1", 3, before), ("2", 3, width)):
            shapes[f"params/{block}/conv{conv}/kernel"] = (size, size, fan, width)
            shapes |= norm(f"{block}/bn{conv}", width)
        if before != width:
            shapes[f"params/{block}/shortcut_conv/kernel"] = (1, 1, before, width)
            shapes |= norm(f"{block}/shortcut_bn", width)
    head = {"kernel": (64, CLASSES), "bias": (CLASSES,)}
    return shapes | {f"params/head/dense/{leaf}": s for leaf, s in head.items()}


def _write_teacher(path):
    """A resnet8 as a finished run leaves it, of weights that were drawn."""
    rng = np.random.default_rng(1)

    def draw(name, shape):
        noise = rng.standard_normal(shape)
        if name.endswith(("scale", "var")):
            return np.exp(0.2 * noise)
        fan_in = math.prod(shape[:-1])
        return noise * (math.sqrt(2 / fan_in) if fan_in > 1 else 0.1)

    weights = {n: draw(n, s).astype(np.float32) for n, s in _teacher_shapes().items()}
    card = {
        "network": "resnet8",
        "num_classes": CLASSES,
        "options": {"shortcut": "projection"},
        "vam": None,
        "mean": [0.5071, 0.4867, 0.4408],
        "std": [0.2675, 0.2565, 0.2761],
        "image_size": SIZE,
        "result": {},
    }
    header = {"format": "lakd_jax", "metadata": json.dumps(card)}
    safetensors.numpy.save_file(weights, path, metadata=header)


# ----------------------------------------------------------------------- a run of each


def run(name, folder):
    """Trains a case in `folder`, and returns what it left.

    {part: ({metric: a float per step}, {leaf: array})}; the part is "run", and of an
    HME its first training is "stage1".
    """
    import lakd_jax

    folder = pathlib.Path(folder)
    images, teacher = folder / "images.npz", folder / "teacher.safetensors"
    _write_images(images)
    _write_teacher(teacher)
    fields = recordings_cases.BASE | ALL[name]
    fields |= {
        "data.source": f"npz:{images}",
        "teacher.init": "" if fields["method"] == "none" else str(teacher),
        "teacher.cache": str(folder / "cache"),
    }
    config = lakd_jax.config.changed(lakd_jax.config.default(), fields)
    with _devices(recordings_cases.DEVICES_OF.get(name, 1)), _silence():
        lakd_jax.train(config, folder / "run")
    parts = {"run": folder / "run", "stage1": folder / "run" / "stage1"}
    return {n: (_metrics(p), _arrays(p)) for n, p in parts.items() if p.exists()}


@contextlib.contextmanager
def _devices(count):
    """Has the code see the first `count` devices of this process."""
    import jax

    found = jax.devices()[:count]
    with (
        mock.patch.object(jax, "devices", lambda *backend: found),
        mock.patch.object(jax, "device_count", lambda *backend: len(found)),
    ):
        yield


@contextlib.contextmanager
def _silence():
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield


def _metrics(directory):
    """{metric: a value per step} of a run."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [row for row in rows if row["kind"] == "train"]
    names = sorted(steps[0].keys() - {"kind"})
    return {name: [row[name] for row in steps] for name in names}


def _arrays(directory):
    """{name: array} of the state that a run ended with. Adapt this as modules move."""
    from lakd_jax.store import checkpoint

    return checkpoint.read_arrays(directory / "checkpoints", None)[1]


# ------------------------------------------------------------------ what is kept of it


def numbers(left):
    """What recordings.json holds of a case, from what `run` returned.

    Of each leaf its norm, and its product with a fixed pattern, which tells apart what
    has the same norm.
    """
    return {
        part: {
            "metrics": {n: list(map(_rounded, v)) for n, v in metrics.items()},
            "leaves": {n: _figures(a) for n, a in sorted(arrays.items())},
        }
        for part, (metrics, arrays) in left.items()
    }


def _figures(array):
    flat = np.asarray(array, np.float64).ravel()
    norm, product = np.linalg.norm(flat), flat @ np.cos(np.arange(flat.size))
    if norm == 0:
        return [0.0, 0.0]
    digits = DIGITS - 1 - math.floor(math.log10(norm))
    return [_rounded(norm), round(float(product), max(digits, 0))]


def _rounded(value):
    return float(f"{value:.{DIGITS}g}")


def bits(left):
    """{"run/metrics/loss/1": ..., "run/leaves/NAME": a hash}: what must be equal."""
    found = {}
    for part, (metrics, arrays) in left.items():
        for name, values in metrics.items():
            for step, value in enumerate(values, 1):
                found[f"{part}/metrics/{name}/{step}"] = float(value).hex()
        for name, array in sorted(arrays.items()):
            array = np.ascontiguousarray(array)
            head = f"{array.dtype}{array.shape}".encode()
            digest = hashlib.sha256(head + array.tobytes()).hexdigest()
            found[f"{part}/leaves/{name}"] = digest[:16]
    return found


def read():
    """{case: as `numbers` gives it} of recordings.json."""
    if not FILE.exists():
        return {}
    found = json.loads(FILE.read_text())
    names = [[*traverse_util.flatten_dict(tree, sep="/")] for tree in found["names"]]

    def part(held):
        pairs = zip(held["norms"], held["products"], strict=True)
        leaves = zip(names[held["names"]], map(list, pairs), strict=True)
        return {"metrics": held["metrics"], "leaves": dict(leaves)}

    return {
        case: {name: part(held) for name, held in parts.items()}
        for case, parts in found["cases"].items()
    }


def write(cases):
    """Puts {case: as `numbers` gives it} into recordings.json, a line per case.

    What many cases have, the names of all leaves, is there once.
    """
    held = read() | cases
    trees = []

    def part(own):
        leaves = own["leaves"]
        tree = traverse_util.unflatten_dict(dict.fromkeys(leaves, 0), "/")
        if tree not in trees:
            trees.append(tree)
        norms, products = map(list, zip(*leaves.values(), strict=True))
        at = {"names": trees.index(tree), "norms": norms, "products": products}
        return {"metrics": own["metrics"], **at}

    lines = [
        f"{json.dumps(case)}: {_dumped({n: part(p) for n, p in held[case].items()})}"
        for case in CASES
        if case in held
    ]
    FILE.write_text(
        '{"names": [\n'
        + ",\n".join(map(_dumped, trees))
        + '\n],\n"cases": {\n'
        + ",\n".join(lines)
        + "\n}}\n"
    )


def _dumped(value):
    return json.dumps(value, separators=(",", ":"))


# ------------------------------------------------------------------- the command line


def main(arguments=None):
    """Records the cases; see the top of the file."""
    parser = argparse.ArgumentParser(description="Records what training gives.")
    parser.add_argument("--only", default="*", help="cases: a pattern as of file names")
    parser.add_argument("--bits", help="write hashes to this file, and no recordings")
    parser.add_argument("--full", action="store_true", help="compile as users do")
    given = parser.parse_args(arguments)
    table = ALL if given.bits else CASES
    chosen = fnmatch.filter(table, given.only)
    if not chosen:
        parser.error(f"--only={given.only} is none of {', '.join(table)}")
    compilation.prepare()
    os.environ["JAX_NUM_CPU_DEVICES"] = str(compilation.DEVICES)
    if given.full:
        del os.environ["XLA_FLAGS"]
    if given.bits:
        return _record_bits(chosen, pathlib.Path(given.bits))
    for name, left in _all(chosen):
        write({name: numbers(left)})  # at once: a run that is stopped goes on by --only
    print(f"{len(chosen)} cases, {FILE.stat().st_size / 1024:.0f} KiB in {FILE}")


def _all(chosen):
    """(case, what `run` gives) of each."""
    for name in chosen:
        print(name, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            yield name, run(name, folder)


def _record_bits(chosen, path):
    """Writes {"package": its folder, "cases": {case: `bits`, or {"error": text}}}."""
    import lakd_jax

    found = {}
    for name in chosen:
        try:
            found |= {n: bits(left) for n, left in _all([name])}
        except Exception as error:  # of the commit that is compared, not of this file
            if type(error).__name__ == "Interrupted":  # Ctrl-C; its module may move
                raise
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    package = str(pathlib.Path(lakd_jax.__file__).parents[1])
    path.write_text(json.dumps({"package": package, "cases": found}))


if __name__ == "__main__":
    main()
