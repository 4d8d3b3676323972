"""The configuration: every field with its default, its checks, its recipes."""

from lakd_jax.config.tree import (
    ConfigDict,
    changed,
    default,
    digest,
    flat,
    from_dict,
    to_dict,
    with_pair,
)

__all__ = [
    "ConfigDict",
    "changed",
    "default",
    "digest",
    "flat",
    "from_dict",
    "to_dict",
    "with_pair",
]
