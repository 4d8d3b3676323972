"""The configuration: every field with its default, its checks, its recipes."""

from lakd_jax.config.tree import (
    LITERAL,
    ConfigDict,
    add_block,
    added_blocks,
    changed,
    default,
    digest,
    flat,
    from_dict,
    method_blocks,
    resolve,
    teacher_config,
    to_dict,
    with_pair,
)

__all__ = [
    "LITERAL",
    "ConfigDict",
    "add_block",
    "added_blocks",
    "changed",
    "default",
    "digest",
    "flat",
    "from_dict",
    "method_blocks",
    "resolve",
    "teacher_config",
    "to_dict",
    "with_pair",
]
