"""Options declared with `fields.field`: what is listed of them, in which order."""

import dataclasses
import math

import pytest
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.config import listing


class Base(nn.Module, kw_only=True):
    weight: float = fields.field(check=fields.at_least(0))
    epochs: float = fields.field(0.0, "of the start", fields.at_least(0))


class Child(Base):
    weight: float = 2.0
    power: int = fields.field(3, "of all", fields.above(0))
    kind: str = "a"
    epochs: float = fields.field(5.0)


@dataclasses.dataclass(frozen=True)
class Plain:
    name: str = fields.field("x", "a | x", fields.one_of(("a", "x")))
    size: int = fields.field(1, source="other.size")


def by_name(owner):
    return {option.name: option for option in fields.options(owner)}


def test_a_plain_default_keeps_place_meaning_and_range():
    found = by_name(Child)
    assert found["weight"].default == 2.0
    assert found["weight"].check(-1.0) == "must be at least 0, is -1"
    assert Child().weight == 2.0 and Child(weight=1.0).weight == 1.0


def test_an_option_declared_again_moves_and_keeps_what_is_not_given():
    assert list(by_name(Child)) == ["weight", "power", "kind", "epochs"]
    again = by_name(Child)["epochs"]
    assert (again.default, again.doc) == (5.0, "of the start")
    assert again.check(-1.0) and not again.check(1.0)


def test_an_option_without_a_default_is_one_that_a_subclass_gives():
    assert by_name(Base)["weight"].default is fields.MISSING
    with pytest.raises(TypeError, match="weight"):
        Base()


def test_linens_own_fields_are_no_options_but_a_dataclass_may_have_a_name():
    assert set(by_name(Child)) == {"weight", "power", "kind", "epochs"}
    assert list(by_name(Plain)) == ["name", "size"]
    assert by_name(Plain)["size"].source == "other.size"


def test_require_names_the_option():
    fields.require(Plain())
    with pytest.raises(ValueError, match=r"^my name is 'y'; it must be one of a, x$"):
        fields.require(Plain(name="y"), "my ")


@pytest.mark.parametrize(
    ("check", "fine", "wrong", "fault"),
    [
        (fields.at_least(1), 1, math.inf, "must be at least 1, is inf"),
        (fields.above(0), 0.1, math.nan, "must be above 0, is nan"),
        (fields.below(1), 0, 1.0, "must be from 0 to below 1, is 1"),
        (fields.between(0, 1), 1, 1.5, "must be from 0 to 1, is 1.5"),
        (fields.whole(1), 2, 1.5, "must be whole numbers, is 1.5"),
        (fields.whole(0, 9), 9, 10, "must be from 0 to 9, is 10"),
        (fields.finite, "text", math.inf, "must be finite, is inf"),
        (fields.each(fields.above(0)), (), (1, 0), "must be above 0, is 0"),
        (fields.some(fields.above(0)), (1,), (), "must not be empty"),
        (fields.shares, (0.1, 1), (0.5, 0.2), "must be (least, most) with"),
    ],
)
def test_ranges(check, fine, wrong, fault):
    assert check(fine) == ""
    assert check(wrong).startswith(fault)


def test_no_two_blocks_have_one_name():
    names = [block.name for block in listing.every()]
    assert len(names) == len(set(names)) and not set(names) & set(listing.options())
