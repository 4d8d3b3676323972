"""docs/configuration.md is what the declarations in the code say now."""

import pathlib

import pytest

from lakd_jax import config as config_lib
from lakd_jax import fields
from lakd_jax.config import listing

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def maker(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from docs import make_configuration

    return make_configuration


def test_the_page_is_up_to_date(maker):
    same = maker.PAGE.read_text(encoding="utf-8") == maker.render()
    assert same, f"{maker.PAGE} is not what the code says; run {maker.COMMAND}"


def test_every_field_is_in_the_page_once(maker):
    rows = [line.split("`")[1] for line in maker.render().splitlines() if "| `" in line]
    assert sorted(rows) == sorted(config_lib.flat(config_lib.default()))


def test_a_row_has_default_and_meaning_and_a_block_its_note(maker):
    option = fields.Option("kind", "a", str, "a | b: of which kind")
    text = maker.section("##", listing.Block("data", (option,), "of all images."))
    assert "| `data.kind` | `'a'` | a \\| b: of which kind |" in text
    assert text.startswith("## data\n\nOf all images.\n\n| field")
