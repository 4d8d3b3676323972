"""What a refused command must look like, for the tests of the command line."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
DIGITS = f"--config={ROOT / 'configs' / 'digits_lakd.py'}"


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
