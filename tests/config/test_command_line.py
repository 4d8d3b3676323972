"""Overrides of fields on the command line."""

import commands
import pytest

from lakd_jax.config import command_line

# How ml_collections loads a config file is deprecated from Python 3.12 on.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def test_update_from_the_command_line():
    c, directory, dry_run = command_line.parse(
        [
            f"{commands.DIGITS}:kd",
            "--config.optim.milestones=(1.5, 2)",
            "--config.local.module_start_epochs=(0,1,2)",
            "--config.local.cuts=('stage1', 'stage2')",
            "--config.baselines=none",
            "--config.optim.lr",
            "0.25",
            "--noconfig.data.flip",
            "--config.data.drop_last",
            "--dry_run",
        ]
    )
    assert (directory, dry_run) == ("runs/digits_lakd", True)
    assert c.optim.milestones == (1.5, 2)
    assert c.local.module_start_epochs == (0, 1, 2)
    assert c.local.cuts == ("stage1", "stage2")
    assert c.baselines == ("none",)
    assert (c.method, c.optim.lr) == ("kd", 0.25)
    assert (c.data.flip, c.data.drop_last) == (False, True)
    c, directory, _ = command_line.parse(
        [commands.DIGITS, "--config.baselines=()", "--workdir=a/b"]
    )
    assert (c.baselines, directory) == ((), "a/b")
