"""docs/configuration.md is what the comments in the code say now."""

import pathlib
import re
import types

import pytest

from lakd_jax import config as config_lib
from lakd_jax.config import methods, tree

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def maker(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from docs import make_configuration

    return make_configuration


def test_the_page_is_up_to_date(maker):
    same = maker.PAGE.read_text(encoding="utf-8") == maker.render()
    assert same, f"{maker.PAGE} is not what the code says; run {maker.COMMAND}"


def test_every_comment_on_a_field_is_in_the_page(maker):
    """Found without the parser: beside an assignment, or alone in a line above."""
    page = maker.render().replace("\\|", "|")
    for module in (tree, methods):
        source = pathlib.Path(module.__file__).read_text()
        source = source.partition("def with_pair")[0]  # behind what makes blocks
        beside = re.findall(r"^    \w+\.[\w.]+ = .*  # (.*)$", source, re.M)
        above = re.findall(r"^    # (.*)\n(?:    # .*\n)*    \w+\.\w", source, re.M)
        assert beside
        for comment in beside + above:
            assert comment in page


def test_comments_go_to_their_fields(maker, monkeypatch):
    source = (
        "def default():\n"
        "    c = block()\n"
        "    c.data = _data()\n\n"
        "def _base():\n"
        "    # Of all\n"
        "    b = block()  # of them\n"
        "    b.size = 1  # in pixels\n\n"
        "def _data():\n"
        "    d = _base()\n"
        "    # above,\n"
        "    # twice\n"
        "    d.kind = 'a'  # a | b\n"
        "    return d\n"
    )
    monkeypatch.setattr(maker.inspect, "getsource", lambda module: source)
    found = maker.Builders(types.ModuleType("config"))
    assert found.blocks("default") == {"data": "_data"}
    assert found.notes("_data") == {
        "": "Of all of them",
        "size": "in pixels",
        "kind": "above, twice a | b",
    }


def test_a_field_that_the_page_would_lack_is_named(maker, monkeypatch):
    monkeypatch.setattr(config_lib, "flat", lambda config: {"data.hidden": 1})
    with pytest.raises(ValueError, match="data.hidden"):
        maker.render()
