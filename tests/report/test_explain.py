"""Tests the report of a run: hand-computed measures, the page, the command."""

import base64
import html.parser
import io
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from lakd_jax import explain
from lakd_jax.explain import conflict, measure, similarity, subject, taps
from lakd_jax.hme import report
from lakd_jax.report import grids, page
from lakd_jax.runs import command

# How ml_collections loads a config file is deprecated from Python 3.12 on.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

RNG = np.random.default_rng(0)

# ------------------------------------------------------------------ similarity


def test_cka_by_hand():
    """<K, L> / |K| |L| of centred Gram matrices, here of rank one each."""
    x = np.array([[1.0], [-1.0], [0.0]])
    y = np.array([[1.0], [1.0], [-2.0]])
    # x.y = 0: unrelated. With z = x + y: (x.z)^2 / (x.x z.z) = 4 / (2 * 8).
    assert similarity.linear_cka(x, y) == pytest.approx(0.0, abs=1e-12)
    assert similarity.linear_cka(x, x + y) == pytest.approx((2**2) / (2 * 8))


def test_cka_is_invariant_to_rotation_scale_and_shift():
    x = RNG.standard_normal((40, 5))
    rotation, _ = np.linalg.qr(RNG.standard_normal((5, 5)))
    assert similarity.linear_cka(x, 3.0 * x @ rotation + 7.0) == pytest.approx(1.0)
    assert similarity.linear_cka(x, RNG.standard_normal((40, 5))) < 0.4
    maps = x.reshape(40, 1, 5, 1)
    assert similarity.linear_cka(maps, x) == pytest.approx(1.0)


def test_cka_of_constant_features_is_zero_and_of_other_images_an_error():
    assert similarity.linear_cka(np.ones((4, 2)), RNG.standard_normal((4, 2))) == 0.0
    with pytest.raises(ValueError, match="same two or more images, got 4, 3"):
        similarity.linear_cka(np.ones((4, 2)), np.ones((3, 2)))


def test_probe_finds_what_is_linear_and_nothing_else():
    x = RNG.standard_normal((300, 4))
    plain, hidden = (x[:, 0] > 0), (x[:, 0] * x[:, 1] > 0)
    train, test = slice(0, 200), slice(200, 300)

    def accuracy(labels):
        y = labels.astype(int)
        return similarity.probe_accuracy(x[train], y[train], x[test], y[test])

    assert accuracy(plain) > 0.95
    assert accuracy(hidden) < 0.7


# ------------------------------------------------------------------ conflict


def test_conflict_is_the_mean_cosine_of_class_gradients():
    model = tiny.SMALL(num_classes=3)
    variables = tiny.variables(model)
    labels = np.array([0, 0, 1, 1, 2, 2])
    images = RNG.standard_normal((6, 8, 8, 3)).astype(np.float32)
    found = conflict.mean_cosines(model, variables, images, labels, np.arange(3))
    assert list(found) == ["stem", "stage1", "stage2", "stage3"]

    @jax.jit
    @jax.grad
    def slope(params, images, labels):
        out = model.apply({**variables, "params": params}, images, train=False)
        shares = jax.nn.log_softmax(out.logits)
        return -jnp.mean(shares[jnp.arange(2), labels])

    flat = []
    for c in range(3):
        members = slice(2 * c, 2 * c + 2)
        batch = images[members], labels[members]
        gradient = slope(variables["params"], *batch)["stage2"]
        g = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])
        flat.append(g / np.linalg.norm(g))
    pairs = [flat[0] @ flat[1], flat[0] @ flat[2], flat[1] @ flat[2]]
    assert found["stage2"] == pytest.approx(np.mean(pairs), abs=1e-4)


def test_conflict_of_equal_opposite_silent_and_missing_gradients():
    g = np.array([3.0, 4.0])
    assert conflict._mean_cosine([g, 2 * g, g]) == pytest.approx(1.0)
    assert conflict._mean_cosine([g, -g]) == pytest.approx(-1.0)
    assert conflict._mean_cosine([g, 0 * g]) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="each with images"):
        conflict.mean_cosines(None, None, None, np.array([0, 0]), np.arange(2))


# ------------------------------------------------------------------ the page


def test_page_escapes_and_embeds(tmp_path):
    file = tmp_path / "dot.png"
    file.write_bytes(b"\x89PNG")
    parts = [
        page.text("a < b & c", note=True),
        page.code("a tree", "<tree>"),
        page.table(["class", "<n>"], [["cat & dog", "1"]]),
        page.picture(file, 'the "dot"'),
    ]
    out = page.render("<title>", [("heading & more", parts)])
    assert "a &lt; b &amp; c" in out
    assert "<td>cat &amp; dog</td><td>1</td>" in out
    assert "&lt;title&gt;" in out
    assert "<summary>a tree</summary><pre>&lt;tree&gt;</pre>" in out
    assert 'src="data:image/png;base64,iVBORw==" alt="the &quot;dot&quot;"' in out
    seen = Page(out)
    assert seen.is_self_contained() and len(seen.pictures) == 1


class Page(html.parser.HTMLParser):
    """Collects what a page would fetch or run, and its pictures; checks nesting."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self, text):
        super().__init__()
        self.references, self.scripts, self.pictures, self._open = [], [], [], []
        self.feed(text)
        assert not self._open
        self.references += re.findall(r"url\(\s*([^)]*)|@import\s+(\S+)", text)
        self.references += re.findall(r"https?://", text)

    def is_self_contained(self):
        data = all(str(r).startswith("data:") for r in self.references)
        return data and not self.scripts

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.references.append(value)
            if name.startswith("on") or name == "http-equiv":
                self.scripts.append(name)
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])
        if tag in ("script", "iframe", "object", "embed", "base"):
            self.scripts.append(tag)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag


@pytest.mark.parametrize(
    "body",
    [
        '<img src="http://127.0.0.1/x.png">',
        '<link rel="dns-prefetch" href="http://elsewhere.invalid">',
        "<style>p { background: url(//elsewhere.invalid/x) }</style>",
        "<script>f()</script>",
        '<p onclick="f()">x</p>',
    ],
)
def test_a_page_that_fetches_or_runs_something_is_noticed(body):
    assert Page("<p><br></p>").is_self_contained()
    assert not Page(f"<p>{body}</p>").is_self_contained()


# ------------------------------------------------------------------ matrices, trees


def picture(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_matrices_and_trees_are_drawn(tmp_path):
    matrix = np.array([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
    grids.matrices(
        tmp_path / "m.png",
        [("first", matrix), ("second $", matrix / 2)],
        rows=["a", "b"],
        columns=["x", "y", "z_{$"],
        row_title="row",
        column_title="column",
    )
    yellow = np.all(picture(tmp_path / "m.png") == (253, 231, 36), axis=-1)
    assert yellow.sum() > 100  # the largest value, in the first panel only
    levels = [
        [("1.1", None, 0.5), ("1.2", None, 0.5)],
        [("cat", 0, 1.0), ("dog", 0, 0.2), ("a very long name of a class", 1, 0.9)],
    ]
    grids.tree(tmp_path / "t.png", levels)
    assert picture(tmp_path / "t.png").std() > 5


def test_section_on_experts(tmp_path):
    """Two classes per expert of the last level; the others chose their first parent."""
    rows = {"stage2": (4, 2), "stage3": (8, 4)}
    params = {}
    for stage, (children, parents) in rows.items():
        logits = np.zeros((children, parents))
        logits[:, 0] = 9.0
        params[stage] = {"block1": {"gate": {"logits": logits}}}
    last = np.full((10, 8), 0.0)
    last[np.arange(10), np.arange(10) // 2] = 9.0
    params["head"] = {"gate": {"logits": last}}
    names = tuple(f"class{i}" for i in range(10))
    text = "".join(report.section(params, names, "cifar10", tmp_path))
    # One expert is alive in each of levels 1 and 2, five in level 3.
    assert (
        "7 of 14 experts serve no class; the 10 classes take 5 different paths" in text
    )
    assert "<td>level 1</td><td>100.0 %</td><td>100.0 %</td>" in text
    # Of 21 related pairs (6 vehicles, 15 animals), 0-1, 8-9, 2-3, 4-5 and 6-7 meet.
    assert (
        f"<td>level 3</td><td>{100 * 5 / 21:.1f} %</td><td>{100 * 5 / 45:.1f}" in text
    )
    assert "digraph tree" in text
    assert "cifar" not in "".join(report.section(params, names, "digits", tmp_path))


def test_entropy_of_taps_is_of_the_axis_that_sums_to_one(tmp_path):
    one_hot = np.zeros((4, 3, 5))
    one_hot[..., 0] = 1.0  # every student tap attends to the first teacher tap

    def subject_of(method):
        return types.SimpleNamespace(config=tiny.config(tmp_path, method=method))

    assert taps._entropy(subject_of("rtk"), one_hot) == 0.0
    even = np.full((4, 3, 5), 1 / 3)  # over students
    assert taps._entropy(subject_of("afd"), even) == pytest.approx(1.0)
    rows = "".join(taps._chosen(one_hot))
    assert "<td>teacher 1</td><td>100.0 %</td>" in rows
    assert "<td>teacher 2</td><td>0.0 %</td>" in rows


@pytest.mark.long
@pytest.mark.parametrize("method", ["afd", "rtk"])
def test_attention_between_taps_is_read_from_checkpoints(method, finished, tmp_path):
    fields = {"epochs": 1, "checkpoint__every_steps": 2, "method": method}
    teacher = next((finished.parent / "teachers").iterdir())
    config = tiny.small(tmp_path, teacher__init=str(teacher), **fields)
    command.run(config, tmp_path / "run", **tiny.quiet())
    found = taps.over_training(subject.load(tmp_path / "run", **tiny.quiet()))
    assert [epoch for epoch, _ in found] == [0.5, 1.0]
    axis = {"afd": 1, "rtk": 2}[method]
    for _, attention in found:
        assert attention.shape == (45, 3, 3)
        np.testing.assert_allclose(attention.sum(axis), 1.0, rtol=1e-5)
    assert not np.allclose(found[0][1], found[1][1])
    text = explain.run(tmp_path / "run", **tiny.quiet()).read_text()
    assert "Which taps attend to which" in text
    assert ("representative" in text) == (method == "rtk")


# ------------------------------------------------------------------ a full run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Yields a finished LAKD run on tiny data, inside `tiny.environment`."""
    directory = tmp_path_factory.mktemp("explained")
    with tiny.environment():
        fields = {"epochs": 1, "baselines": ("none",), "checkpoint__every_steps": 2}
        config = tiny.small(directory, **fields)
        run = directory / "run"
        command.run(config, run, **tiny.quiet())
        explain.run(run, **tiny.quiet())
        yield run


@pytest.mark.long
def test_the_report_is_whole_fetches_nothing_and_runs_nothing(finished):
    text = (finished / "report.html").read_text()
    headings = re.findall("<h2>(.*?)</h2>", text)
    assert headings == [
        "The run",
        "Where it errs",
        "Where the networks look",
        "What each module has learnt",
        "What modules and masks contribute",
        "Feature error in training",
        "Knowledge conflict",
    ]
    # Two checkpoints with three modules each, and what these and their masks contribute
    # to both networks; plain and LAKD side by side.
    assert len(re.findall("<td>module[123]</td>", text)) == 6 + 3 + 6
    assert "<th>lakd</th><th>none</th>" in text
    seen = Page(text)
    assert seen.is_self_contained() and len(seen.pictures) == 5
    for address in seen.pictures:
        data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
        pixels = picture(io.BytesIO(data))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


@pytest.mark.long
def test_a_baseline_without_teacher_has_a_report_too(finished):
    text = explain.run(finished / "none", **tiny.quiet()).read_text()
    assert Page(text).is_self_contained()
    assert "Where the networks look" not in text
    assert "<td>-</td>" in text


@pytest.mark.long
def test_right_and_wrong_images_are_right_and_wrong(finished):
    s = subject.load(finished, **tiny.quiet())
    chosen = measure.right_and_wrong(s, 4)
    test = s.environment.dataset.test
    args = (s.student.model, s.student.variables, s.pixels)
    logits, _ = subject.observe(*args, test.images, ())
    right = logits.argmax(-1) == test.labels
    count = min(4, right.sum())
    assert right[chosen[:count]].all()
    assert not right[chosen[count:]].any()
    assert len(chosen) == count + min(4, (~right).sum())
    direct = s.student.model.apply(
        s.student.variables, s.pixels(jnp.asarray(test.images[:3])), train=False
    )
    np.testing.assert_allclose(logits[:3], direct.logits, atol=1e-4)


def test_explain_on_the_command_line(main, tmp_path):
    code, _, err = main("--mode=explain")
    assert code == 2
    assert "--workdir is missing, which --mode=explain needs" in err
    code, _, err = main("--mode=explain", f"--workdir={tmp_path}")
    assert code == 2
    assert "is not a run" in err
