"""The configuration: every field with its default, its checks, its recipes."""

from lakd_jax.config.tree import (
    LITERAL,
    ConfigDict,
    changed,
    default,
    digest,
    flat,
    from_dict,
    resolve,
    teacher_config,
    to_dict,
    with_pair,
)

__all__ = [
    "LITERAL",
    "ConfigDict",
    "changed",
    "default",
    "digest",
    "flat",
    "from_dict",
    "resolve",
    "teacher_config",
    "to_dict",
    "with_pair",
]
