"""Compares what training gives at a commit and in the working tree, to the bit.

    python scripts/same_bits.py HEAD                    # uncommitted changes
    python scripts/same_bits.py v0.2.0 --only='lakd*'   # some of the cases
    python scripts/same_bits.py HEAD --full             # compiled as users do

The cases are those of tests/support/recordings.py. Both sides run on this machine, one
after the other, with the recorder of the working tree; where that cannot read what the
other commit leaves, with the commit's own. Run it by hand before and after a rewrite: a
difference is no fault where the arithmetic was meant to change.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORDER = pathlib.Path("tests", "support", "recordings.py")

Bits = dict[str, dict[str, str]]  # of each case, by the name of a loss or leaf


def main() -> int:
    """Prints a line per case; 1 where any differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rev", metavar="REV", help="the commit to compare with")
    parser.add_argument("--only", default="*", help="cases: a pattern as of file names")
    parser.add_argument("--full", action="store_true", help="compile as users do")
    given = parser.parse_args()
    options = [f"--only={given.only}", *(["--full"] if given.full else [])]
    with tempfile.TemporaryDirectory() as scratch, _checkout(given.rev) as other:
        theirs = _of_commit(other, options, pathlib.Path(scratch))
        ours = _record(ROOT / RECORDER, ROOT, options, pathlib.Path(scratch))
    lines = {name: compare(theirs.get(name), bits) for name, bits in ours.items()}
    width = max(map(len, lines))
    for name, line in lines.items():
        print(f"{name:{width}}  {line}")
    differ = [name for name, line in lines.items() if line != "equal"]
    print(f"{len(lines) - len(differ)} of {len(lines)} cases are equal to {given.rev}")
    return 1 if differ else 0


def compare(theirs: dict[str, str] | None, ours: dict[str, str]) -> str:
    """ "equal", or what the first difference of a case is."""
    if theirs is None:
        return "is not there"
    if "error" in theirs or "error" in ours:
        where, text = ("there", theirs) if "error" in theirs else ("here", ours)
        return f"fails {where}: {text['error'].splitlines()[0]:.100}"
    names = [*theirs, *(name for name in ours if name not in theirs)]
    found = [name for name in names if theirs.get(name) != ours.get(name)]
    if not found:
        return "equal"
    first = found[0]
    lost = "" if first in theirs and first in ours else ", only on one side"
    return f"{len(found)} of {len(names)} differ, the first {first}{lost}"


@contextlib.contextmanager
def _checkout(rev: str) -> Iterator[pathlib.Path]:
    """The files of a commit, in a folder for the time of the context."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = pathlib.Path(scratch) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), rev], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def _of_commit(tree: pathlib.Path, options: list[str], scratch: pathlib.Path) -> Bits:
    """The other side's, with the recorder that can read what its package leaves."""
    found = _record(ROOT / RECORDER, tree, options, scratch)
    failed = all("error" in bits for bits in found.values())
    if failed and (tree / RECORDER).exists():
        print("every case failed there: again with the recorder of that commit")
        return _record(tree / RECORDER, tree, options, scratch)
    return found


def _record(
    recorder: pathlib.Path,
    tree: pathlib.Path,
    options: list[str],
    scratch: pathlib.Path,
) -> Bits:
    """Runs `recorder` on the package in `tree`."""
    out = scratch / "bits.json"
    # A program that both have is compiled once.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled")}
    subprocess.run(
        [sys.executable, str(recorder), f"--bits={out}", *options],
        env={**os.environ, **cache, "PYTHONPATH": str(tree)},
        cwd=tree,
        check=True,
    )
    told: dict[str, Any] = json.loads(out.read_text())
    if pathlib.Path(told["package"]) != tree.resolve():
        raise RuntimeError(f"{told['package']} was imported, not {tree}")
    return told["cases"]


if __name__ == "__main__":
    sys.exit(main())
