"""Checks that processes for decoding can be started from the user's script.

A new process imports the script that was started, so a script that trains outside of
`if __name__ == "__main__":` would train again in each of them.
"""

import ast
import multiprocessing
import pathlib
import sys

from lakd_jax import errors

GUARD = 'if __name__ == "__main__":'
REMEDY = (
    f"put what trains into a function and call it below `{GUARD}`, or set "
    "data.workers=0 to decode in threads."
)


def require_guard() -> None:
    """Raises DataError if the script that was started cannot be imported again."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    if not file:  # a notebook or a prompt, which new processes do not import
        return
    try:
        parsed = ast.parse(pathlib.Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):  # not a script: a zip file, a binary
        return
    compared = (n for n in ast.walk(parsed) if isinstance(n, ast.Compare))
    names = (n for c in compared for n in ast.walk(c) if isinstance(n, ast.Name))
    if not any(name.id == "__name__" for name in names):
        raise errors.DataError(
            f"data.workers: each process that decodes images imports {file}, which "
            f"would train again there:\n{REMEDY}"
        )


def refuse_in_worker() -> None:
    """Raises DataError in a process that is importing the script, see `require_guard`.

    That process would otherwise wait for the directory of the run that started it.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise errors.DataError(
            "this process was started to decode images (data.workers) and imports a "
            f"script that trains:\n{REMEDY}"
        )
