"""A program for test_distributed.py: one of the processes that train together.

    python one_of_several.py ADDRESS COUNT INDEX FOLDER FIELDS

FIELDS are those of `tiny.small`, as JSON. The run is kept in FOLDER/run.
"""

import json
import sys

from lakd_jax import cli, paths
from lakd_jax.runtime import hosts


def work(guard):
    address, count, index, folder, fields = sys.argv[1:]
    hosts.connect(address, int(count), int(index))
    guard.leave = hosts.leave
    import tiny  # draws numbers as it is imported, which starts JAX

    from lakd_jax import models
    from lakd_jax.runs import command, single

    single.data.load = lambda *a, **k: tiny.dataset(**tiny.COUNTS)
    models.register(tiny.NETWORK, tiny.SMALL)
    folder = paths.of(folder)
    config = tiny.small(folder, **json.loads(fields))
    with hosts.together(), hosts.Guard() as own:
        command.run(config, folder / "run", guard=own)


if __name__ == "__main__":
    cli.end_with(work)
