"""Writes the model card of an exported student: facts, input format, loading."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lakd_jax import config as config_lib
from lakd_jax.data import preparation
from lakd_jax.models import projector

Facts = Mapping[str, Any]

_LOADING = {
    ".safetensors": """\
Uses PyTorch's names and layout. In PyTorch, with `model` a {network} with {classes}
classes:

```python
import safetensors.torch
model.load_state_dict(safetensors.torch.load_file("{file}"))
```

In JAX:

```python
from lakd_jax import interop, models
state = interop.load_torch_file("{file}")
model = models.create("{network}", **interop.options_from_torch("{network}", state))
variables = interop.from_torch("{network}", state)
logits = model.apply(variables, images, train=False).logits
```

As the teacher of another run:

```
python main.py --config=FILE.py --config.teacher.name={network} \\
  --config.teacher.init={file} \\
  --config.teacher.mean="{mean}" --config.teacher.std="{std}"{resize}
```
""",
    ".pth": """\
A plain dictionary of tensors with PyTorch's names and layout. In PyTorch, with
`model` a {network} with {classes} classes:

```python
import torch
model.load_state_dict(torch.load("{file}", weights_only=True))
```
""",
    ".onnx": """\
The entire computation, including normalisation. With ONNX Runtime:

```python
import onnxruntime
session = onnxruntime.InferenceSession("{file}")
(logits,) = session.run(None, {{session.get_inputs()[0].name: images}})
# images: uint8 (B, {height}, {width}, 3), 0..255, for any B
```
""",
    ".stablehlo": """\
The entire computation for CPU, CUDA, ROCm and TPU, including normalisation. Loading
needs `pip install jax flatbuffers`, with the JAX version named above or one up to six
months newer:

```python
import jax.export
with open("{file}", "rb") as file:
    network = jax.export.deserialize(bytearray(file.read()))
logits = network.call(images)  # uint8 (B, {height}, {width}, 3), 0..255, for any B
```
""",
}


def render(
    card: Facts,
    settings: Facts,
    environment: Facts,
    files: Sequence[str],
    which: str = "last",
) -> str:
    """Returns the model card as Markdown.

    Args:
      card: the card stored with a student by `weights.save`.
      settings: the run's configuration, nested.
      environment: contents of the run's environment.json; empty if unknown.
      files: names of the exported files described by the card.
      which: which weights they have, "last" or "best".
    """
    result = card["result"]
    parts = [
        f"# {card['network']}",
        "A student trained by lakd_jax: the plain network, no teacher or adapters."
        + _head(card),
        _table(_facts(card, settings, environment, which)),
        "## Images",
        _images(card, settings),
    ]
    if "class_names" in result:
        names = json.dumps(result["class_names"], ensure_ascii=False)
        # Class names come from folders: quoted, so that they cannot act as Markdown.
        names = f"```json\n{names}\n```"
        parts += ["## Classes", f"In logit order:\n\n{names}"]
    for file in files:
        parts += [f"## {file}", _loading(card, settings, file)]
    parts += ["## Settings that differ from the defaults", _table(_changed(settings))]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _head(card: Facts) -> str:
    """Describes a head that is not the network's own; "" for one that is."""
    if not card.get("projector"):
        return ""
    found = projector.Options(**card["projector"])
    first = ""
    if found.pooled:
        size = "x".join(map(str, found.pooled))
        first = f"adaptive average pooling to {size}, then "
    network = card["network"]
    return (
        f"\n\nIts head is not the {network}'s own. In place of what that has behind "
        "the last stage (of a wide ResNet: behind the last norm and ReLU) it has the "
        f"projector `{found.name}`, {first}three convolutions without bias (1x1 to "
        f"{found.inner}, 3x3, 1x1 to {found.width} channels), each with batch norm and "
        "ReLU (`conv1`, `bn1`, ... `bn3`), the mean over positions, and its teacher's "
        "classifier under the name of the network's. All are in the files here, and in "
        "the number of parameters. For PyTorch, add these layers to the network; "
        "`interop.options_from_torch` finds them for JAX."
    )


def _facts(
    card: Facts, settings: Facts, environment: Facts, which: str
) -> dict[str, str]:
    result = card["result"]
    options = "".join(f", {k} {v}" for k, v in card["options"].items())
    facts = {
        "network": card["network"] + options + projector.words(card.get("projector")),
        "parameters": f"{result['parameters']:,}",
        "classes": str(card["num_classes"]),
        "test accuracy": _accuracy(result, which),
        "method": result["method"],
    }
    if result["teacher"]:
        score = result["teacher_test"]  # None for a teacher of other classes
        facts["teacher"] = result["teacher"] + (f", {_score(score)}" if score else "")
    source = html.escape(settings["data"]["source"])
    facts["data"] = f"{source}, fingerprint {result['data']}"
    facts["epochs"], facts["seed"] = str(result["epochs"]), str(result["seed"])
    facts["compute type"] = settings["dtype"]
    versions = dict(environment.get("versions", {}))
    versions |= {"commit": environment.get("commit")}
    known = [f"{name} {version}" for name, version in versions.items() if version]
    facts["versions"] = ", ".join(known) or "not recorded"
    return facts


def _accuracy(result: Facts, which: str) -> str:
    if which == "last":
        return _score(result["test_last"]) + " after the last epoch"
    when = f" after step {result['best_step']:,}, the best on minival"
    return _score(result["test_best_on_minival"]) + when


def _score(score: Facts) -> str:
    percent = f"{100 * score['accuracy']:.2f} %"
    return f"{percent} ({score['right']:,} of {score['examples']:,} images right)"


def _images(card: Facts, settings: Facts) -> str:
    mean, std = (_numbers(card[name]) for name in ("mean", "std"))
    size, steps = "of a size that was not recorded", {}
    if card.get("preparation"):
        prepared = preparation.Preparation(**card["preparation"])
        size, steps = prepared.describe(), dict(card["preparation"])
    steps |= {"mean": card["mean"], "std": card["std"]}
    steps["network_size"] = settings["student"].get("image_size", 0)
    first = ""
    if side := settings["student"].get("image_size"):
        first = f" after a bilinear resize to {side}x{side}"
    return (
        f"RGB, values 0 to 255, {size}. The weights alone expect each channel{first} "
        f"as\n\n    (value / 255 - mean) / std\n    mean = {mean}\n    std = {std}\n\n"
        "`.stablehlo` and `.onnx` files do the last step: pass them values 0 to 255. "
        "`lakd_jax.load(RUN).predict(FILES)` does all of it. The same as JSON:\n\n"
        f"```json\n{json.dumps(steps, sort_keys=True)}\n```"
    )


def _loading(card: Facts, settings: Facts, file: str) -> str:
    height, width, _ = card["result"].get("image_shape", ("H", "W", 3))
    side = settings["student"].get("image_size")
    return _LOADING["." + file.rsplit(".", 1)[1]].format(
        file=file,
        network=card["network"],
        classes=card["num_classes"],
        mean=_numbers(card["mean"]),
        std=_numbers(card["std"]),
        resize=f" --config.teacher.image_size={side}" if side else "",
        height=height,
        width=width,
    )


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(str(value) for value in values) + ")"


def _changed(settings: Facts) -> dict[str, str]:
    """Returns the fields that differ from the defaults."""
    default = config_lib.to_dict(config_lib.default())
    flat = [config_lib.flat(values) for values in (default, settings)]
    before, now = ({k: json.dumps(v) for k, v in x.items()} for x in flat)
    return {k: f"`{v}`" for k, v in now.items() if before.get(k) != v}


def _table(rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| field | value |", "| --- | --- |", *lines])
