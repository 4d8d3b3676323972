"""Training gives the losses and states that were recorded; see `recordings`."""

import copy

import pytest
import recordings
import recordings_cases

from lakd_jax import distill

RELATIVE = 5e-5  # processors round otherwise: NST was 2.5e-5 off on another one
FLOOR = 1e-7  # of the largest value of the same kind: below it all is rounding


@pytest.fixture(scope="module")
def held():
    return recordings.read()


# ------------------------------------------------------------------ the comparison


def kinds(part):
    """{kind: {name: (scale, values)}} of one part of a case.

    The scale is what the relative tolerance is of; a leaf's is its norm.
    """
    found = {"metrics": {n: (max(map(abs, v)), v) for n, v in part["metrics"].items()}}
    for name, (norm, product) in part["leaves"].items():
        kind = "/".join(name.split("/")[:2])  # train/params, train/opt_state, ...
        found.setdefault(kind, {})[name] = (norm, [norm, product])
    return found


def differences(expected, got):
    """A line for each value of a case that is not what was recorded."""
    if expected.keys() != got.keys():
        return [f"parts {sorted(got)}, recorded {sorted(expected)}"]
    lines = []
    for part in expected:
        ours, theirs = kinds(got[part]), kinds(expected[part])
        for kind in sorted(ours.keys() | theirs.keys()):
            mine, other = ours.get(kind, {}), theirs.get(kind, {})
            lines += [f"{part}: {name} is new" for name in mine.keys() - other.keys()]
            lines += [f"{part}: {name} is gone" for name in other.keys() - mine.keys()]
            largest = max((scale for scale, _ in other.values()), default=0.0)
            for name in sorted(mine.keys() & other.keys()):
                lines += unlike(f"{part}: {name}", mine[name], other[name], largest)
    return lines


def unlike(name, ours, theirs, largest):
    (_, got), (scale, expected) = ours, theirs
    if len(got) != len(expected):
        return [f"{name}: {got}, recorded {expected}"]
    tolerance = RELATIVE * scale + FLOOR * largest
    far = [abs(g - e) for g, e in zip(got, expected, strict=True)]
    if all(distance <= tolerance for distance in far):
        return []
    return [f"{name}: {got}, recorded {expected}, off by {max(far) / scale:.1e} of it"]


def test_what_differs_is_found(held):
    expected = held["lakd-fused-cut"]

    def changed(change):
        got = copy.deepcopy(expected)
        change(got["run"])
        return differences(expected, got)

    leaf = "train/opt_state/2/trace/student/stem/conv/kernel"
    norm, product = expected["run"]["leaves"][leaf]
    assert changed(lambda run: None) == []
    within = [norm * (1 + 3e-5), product]
    assert changed(lambda run: run["leaves"].update({leaf: within})) == []
    for values in ([norm * (1 + 1e-4), product], [norm, -product]):
        (line,) = changed(lambda run, v=values: run["leaves"].update({leaf: v}))
        assert line.startswith(f"run: {leaf}: ")
    assert changed(lambda run: run["leaves"].pop(leaf)) == [f"run: {leaf} is gone"]
    (line,) = changed(lambda run: run["metrics"].update(loss=[1.0, 2.0, 3.0]))
    assert line.startswith("run: loss: [1.0, 2.0, 3.0]")
    assert len(changed(lambda run: run["metrics"]["loss"].pop())) == 1
    assert differences(expected, {}) == ["parts [], recorded ['run']"]


# ------------------------------------------------------------------------ the table


def test_every_method_has_a_case():
    assert recordings_cases._NEEDS.keys() <= set(distill.names())
    for name in distill.names():
        assert recordings.CASES[name]["method"] == name


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("local.engine", {"dispatch", "pipeline"}),
        ("local.cut_scale", {0.0, 0.5, 1.0}),
        ("student.name", {"hme"}),
        ("student.vam.gate", {"dynamic"}),
        ("optim.dot_delta", {0.075}),
        ("teacher.views", {2}),
    ],
)
def test_other_parts_have_cases(field, values):
    assert values <= {case.get(field) for case in recordings.CASES.values()}


def test_every_case_is_recorded(held):
    assert sorted(held) == sorted(recordings.CASES)
    for name, parts in held.items():
        hme = recordings.CASES[name].get("student.name") == "hme"
        assert list(parts) == (["run", "stage1"] if hme else ["run"]), name
        for part in parts.values():
            steps = 4 if name.startswith("short-batch") else 3
            assert part["metrics"]["step"] == [*range(1, steps + 1)], name
            assert part["leaves"]["train/step"][0] == steps, name


# -------------------------------------------------------------------------- the runs


@pytest.mark.long
@pytest.mark.parametrize("name", recordings.CASES)
def test_training_gives_what_was_recorded(name, held, tmp_path):
    lines = differences(held[name], recordings.numbers(recordings.run(name, tmp_path)))
    assert not lines, "\n".join(
        [
            f"{len(lines)} values of {name} are not as recorded:",
            *lines[:12],
            "If they are to change:",
            f"    python -m tests.support.recordings --only='{name}'",
        ]
    )
