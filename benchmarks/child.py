"""Trains one subject in a process of its own, as `benchmarks.same_run` requests.

    python -m benchmarks.child NAME WORK_FILE MDISTILLER_FOLDER

Requests are lines of JSON on the standard input, answered by lines on what was the
standard output; what libraries print goes to the standard error.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import subjects, timing
from benchmarks import work as work_lib


def main() -> None:
    """Makes the subject, reports its facts, and serves requests until input ends."""
    name, path, checkout = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    work = work_lib.load(Path(path))
    try:
        subject = _subject(name, work, checkout)
    except Exception as error:  # whatever a library may raise; the parent decides
        text = str(error).strip().splitlines() or [""]
        kind = "" if isinstance(error, timing.Unusable) else type(error).__name__
        print(json.dumps({"failed": f"{kind}: {text[0]}".lstrip(": ")}), file=answers)
        raise
    print(json.dumps({"facts": subject.facts}), file=answers)
    for line in sys.stdin:
        print(json.dumps(_answer(subject, work, json.loads(line))), file=answers)


def _subject(name: str, work: work_lib.Work, checkout: str) -> timing.Subject:
    if name != subjects.OURS:
        return subjects.make(name, work, checkout)
    from benchmarks import ours  # JAX is in this process only
    from lakd_jax import data
    from lakd_jax.runtime import backend

    backend.prepare(cache="")
    names = (work.teacher, work.student, work.method)
    config = ours.configure(*names, work.batch_size, work.dtype, work.fields)
    ids = np.arange(len(work.labels), dtype=np.int32)
    made = ours.setup(config, data.Split(work.images, work.labels, ids))
    return ours.Ours(made, 1, work.order)


def _answer(
    subject: timing.Subject, work: work_lib.Work, request: dict[str, Any]
) -> dict[str, Any]:
    """Carries out {"run": STEPS}, {"peak": true} or {"test": true}."""
    if "run" in request:
        began = time.process_time()
        subject.run(request["run"])
        return {"cpu_s": time.process_time() - began}
    if "test" in request:
        assert work.test_images is not None
        logits = subject.predict(work_lib.normalised(work, work.test_images))
        return {"right": int((logits.argmax(1) == work.test_labels).sum())}
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"bytes": 1024 * kibibytes}


if __name__ == "__main__":
    main()
