"""Several teachers: the configs of each, and the ensemble made of them."""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Iterator, Sequence

import jax.numpy as jnp

from lakd_jax import errors
from lakd_jax.config import resolved, several
from lakd_jax.interop import weights
from lakd_jax.models import ensemble
from lakd_jax.runs import single
from lakd_jax.training import spec as spec_lib


def configs(config: resolved.Config) -> list[resolved.Config]:
    """Returns the config of a run with each of `teachers` alone.

    What would be stored of a teacher is stored of all together.
    """
    found = []
    for entry in config.teachers:
        network, init = several.parts(entry, config.teacher.name)
        alone = dataclasses.replace(config.teacher, name=network, init=init, views=0)
        found.append(dataclasses.replace(config, teachers=(), teacher=alone))
    return found


@contextlib.contextmanager
def named(index: int) -> Iterator[None]:
    """Has errors about a teacher name its entry of `teachers`."""
    try:
        yield
    except errors.TeacherError as error:
        text = re.sub(r"^teacher\.(init|name)", f"teachers[{index}]", str(error))
        raise errors.TeacherError(text) from error


def joined(config: resolved.Config, found: Sequence[single.Teacher]) -> single.Teacher:
    """Returns the combination of teachers, not tested yet."""
    networks = [one.network for one in found]
    first = networks[0].model
    model = ensemble.Ensemble(
        members=tuple(ensemble.Member(t.network.model, t.pixels) for t in found),
        combine=config.teacher.combine,
        stage_sizes=first.stage_sizes,
        num_classes=first.num_classes,
        dtype=first.dtype,
    )
    variables = {f"teacher{i}": n.variables for i, n in enumerate(networks, 1)}
    together = "".join(network.digest for network in networks).encode()
    loaded = weights.Loaded(
        model,
        {"params": variables},
        f"{len(found)} teachers ({config.teacher.combine})",
        classes=networks[0].classes,
        digest=hashlib.blake2b(together, digest_size=8).hexdigest(),
    )
    # Members normalise and resize: they take images in 0..255, which these are / 255.
    pixels = spec_lib.Pixels((0.0,) * 3, (1.0,) * 3, jnp.dtype("float32"))
    parameters = sum(one.parameters for one in found)
    return single.Teacher(
        loaded, pixels, None, parameters, loaded.digest, members=tuple(found)
    )
