"""The files of configs/, and what a refused command must look like."""

import pathlib
import runpy

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
DIGITS = f"--config={CONFIGS / 'digits_lakd.py'}"


def get_config(name, *arg):
    """The config that `configs/NAME.py` returns for its argument."""
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](*arg)


def assert_refused(result, *words, code=2):
    """The command ended with `code` and at most ten lines, which hold `words`."""
    got, _, err = result
    lines = err.splitlines()
    assert got == code, err
    assert 1 <= len(lines) <= 10, err
    assert "Traceback" not in err
    for word in words:
        assert word in err
    return err


def untouched(workdir):
    """Nothing was trained there, and the next config may have it."""
    names = {p.name for p in workdir.iterdir()} if workdir.exists() else set()
    return not names & {"metrics.jsonl", "checkpoints", "config.json"}
