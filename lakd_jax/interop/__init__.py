"""Weights from PyTorch, and our own variables in and out of safetensors."""

from lakd_jax.interop.files import (
    is_variables_file,
    load_torch_file,
    load_variables,
    save_variables,
)
from lakd_jax.interop.torch_weights import from_torch, options_from_torch

__all__ = [
    "from_torch",
    "is_variables_file",
    "load_torch_file",
    "load_variables",
    "options_from_torch",
    "save_variables",
]
