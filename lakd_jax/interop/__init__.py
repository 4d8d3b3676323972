"""Conversion of weights from and to PyTorch, and our own files of variables."""

from lakd_jax.interop.files import (
    is_variables_file,
    load_torch_file,
    load_variables,
    save_torch_file,
    save_variables,
)
from lakd_jax.interop.state_dict import other_types
from lakd_jax.interop.torch_weights import from_torch, options_from_torch, to_torch

__all__ = [
    "from_torch",
    "is_variables_file",
    "load_torch_file",
    "load_variables",
    "options_from_torch",
    "other_types",
    "save_torch_file",
    "save_variables",
    "to_torch",
]
