"""Adapts `keras.distillation`: its Distiller, trained by Keras's own `fit`.

Keras is a package to install; it computes with the backend of KERAS_BACKEND, which has
to be set before it is imported: `jax` here, so that both use one compiler. Batches are
those of a data loader (`Work.batches`), given to `fit` as one array per call.
"""

import itertools
import time
from typing import Any

import keras
import numpy as np

from benchmarks import timing
from benchmarks import work as work_lib

_EPS = 1e-5  # as in PyTorch and ours; Keras's own is 1e-3


def network(weights: work_lib.Weights) -> keras.Model:
    """Returns a CIFAR ResNet of three stages with these weights, for (B, 32, 32, 3).

    The number of blocks and the kind of shortcut are those of the weights.
    """
    layers: list[tuple[keras.layers.Layer, str]] = []

    def conv(x: Any, name: str, norm: str, stride: int = 1) -> Any:
        kernel, padding = weights[f"{name}.weight"], "same"
        if stride > 1 and kernel.shape[2] == 3:  # its own padding would be uneven
            x, padding = keras.layers.ZeroPadding2D(1)(x), "valid"
        shape = (kernel.shape[0], kernel.shape[2], stride, padding)
        layers.append((keras.layers.Conv2D(*shape, use_bias=False), name))
        x = layers[-1][0](x)
        made = keras.layers.BatchNormalization(momentum=0.9, epsilon=_EPS)
        layers.append((made, norm))
        return made(x)

    def block(x: Any, name: str, stride: int) -> Any:
        h = conv(x, f"{name}.conv1", f"{name}.bn1", stride)
        h = conv(keras.layers.ReLU()(h), f"{name}.conv2", f"{name}.bn2")
        if f"{name}.downsample.0.weight" in weights:
            x = conv(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
        elif stride > 1:
            before = (h.shape[-1] - x.shape[-1]) // 2
            pads = (before, h.shape[-1] - x.shape[-1] - before)
            x = x[:, ::stride, ::stride]
            x = keras.ops.pad(x, ((0, 0), (0, 0), (0, 0), pads))
        return keras.layers.ReLU()(keras.layers.Add()([h, x]))

    images = keras.Input((32, 32, 3))
    x = keras.layers.ReLU()(conv(images, "conv1", "bn1"))
    blocks = sum(k.startswith("layer1.") and k.endswith("bn1.weight") for k in weights)
    for stage, index in itertools.product((1, 2, 3), range(blocks)):
        stride = 2 if stage > 1 and index == 0 else 1
        x = block(x, f"layer{stage}.{index}", stride)
    x = keras.layers.GlobalAveragePooling2D()(x)
    classes = len(weights["fc.bias"])
    layers.append((keras.layers.Dense(classes, dtype="float32"), "fc"))
    model = keras.Model(images, layers[-1][0](x))
    for layer, name in layers:
        layer.set_weights(_arrays(layer, name, weights))
    return model


def _arrays(
    layer: keras.layers.Layer, name: str, weights: work_lib.Weights
) -> list[np.ndarray]:
    """Returns the arrays of one layer, in Keras's order and layouts."""
    kernel = weights[f"{name}.weight"]
    if isinstance(layer, keras.layers.Conv2D):
        return [kernel.transpose(2, 3, 1, 0)]
    if isinstance(layer, keras.layers.Dense):
        return [kernel.T, weights[f"{name}.bias"]]
    return [kernel, *(weights[f"{name}.{k}"] for k in _NORM)]


_NORM = ("bias", "running_mean", "running_var")


def distiller(work: work_lib.Work) -> keras.Model:
    """Returns a compiled Distiller with the loss and the optimiser of `work`.

    Keras's weight decay is apart from the gradient, so momentum does not amplify it:
    it is divided by 1 - momentum, which is the same once the momentum has built up. Its
    Distiller ignores the losses of regularisers.
    """
    kd = work.methods["kd"]
    hard, soft = kd["ce_weight"], kd["kd_weight"]
    # An object, as Keras 3.15 applies the softmax and T^2 to no other: given the name
    # "kl_divergence", its default, it takes the logits for probabilities.
    divergence = keras.losses.KLDivergence()
    made = keras.distillation.Distiller(
        network(work.teacher_weights),
        network(work.student_weights),
        [keras.distillation.LogitsDistillation(kd["temperature"], divergence)],
        [soft / (1 - hard)],
        student_loss_weight=hard,
    )
    made.compile(
        keras.optimizers.SGD(
            work.lr,
            work.momentum,
            weight_decay=work.weight_decay / (1 - work.momentum),
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return made


class Keras:
    """Keras's Distiller; a `timing.Subject`."""

    name = "keras"
    methods = ("kd",)

    def __init__(self, work: work_lib.Work):
        """Builds and compiles it.

        Raises:
          timing.Unusable: Keras computes with another backend than JAX.
        """
        if keras.backend.backend() != "jax":
            raise timing.Unusable("--peer=keras: set KERAS_BACKEND=jax before")
        half = work.dtype == "bfloat16"
        keras.config.set_dtype_policy("mixed_bfloat16" if half else "float32")
        self._distiller, self._batches = distiller(work), work.batches()
        began = time.perf_counter()
        self.run(1)
        self.facts: dict[str, Any] = {"first_step_s": time.perf_counter() - began}

    def run(self, steps: int) -> None:
        """See `timing.Subject`; `fit` returns when the last loss is known."""
        batches = list(itertools.islice(self._batches, steps))
        images, labels = (
            np.concatenate(x) for x in list(zip(*batches, strict=True))[:2]
        )
        size = len(batches[0][1])
        self._distiller.fit(images, labels, size, verbose=0, shuffle=False)

    def peak_bytes(self) -> int | None:
        """See `timing.Subject`; Keras has no count of its own."""
        return None

    def predict(self, images: np.ndarray) -> np.ndarray:
        """See `timing.Subject`."""
        return np.asarray(self._distiller.student.predict(images, 256, verbose=0))
