"""Reads the text of a compiled program: collectives, products, padding, cycles."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = re.compile(r"\d+")
_ARRAY = re.compile(r"\b(pred|bf16|[fsu]\d+)\[([\d,]*)\](?:\{([^{}]*)\})?")
_LINE = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")
_TILE = re.compile(r"T\((\d+),(\d+)\)")
_SOURCE = re.compile(r'op_name="([^"]+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "send",
)
# Instructions that write nothing of their own.
_VIEWS = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant")


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of an array: of its elements, its dimensions, the compiler's layout."""

    type: str
    dims: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> int:
        """Returns the size without padding."""
        return math.prod(self.dims) * self._width

    @property
    def padded(self) -> int:
        """Returns the size with both minor dimensions filled up to whole tiles."""
        order, _, tiles = self.layout.partition(":")
        tile = _TILE.search(tiles)
        if not tile or not self.dims:
            return self.bytes
        dims = [self.dims[int(axis)] for axis in order.split(",")]  # minor first
        for axis, side in enumerate((int(tile[2]), int(tile[1]))):
            if axis < len(dims):
                dims[axis] = -(-dims[axis] // side) * side
        return math.prod(dims) * self._width

    @property
    def _width(self) -> int:
        bits = _BITS.search(self.type)
        return max(int(bits[0]) // 8, 1) if bits else 1

    def __str__(self) -> str:
        return f"{self.type}[{','.join(map(str, self.dims))}]{{{self.layout}}}"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the text.

    Attributes:
      computation: where it is; "ENTRY" for the program itself.
      name, opcode: as the compiler has them.
      arrays: what it writes.
      rest: of the line, with operands, attributes and metadata.
    """

    computation: str
    name: str
    opcode: str
    arrays: tuple[Array, ...]
    rest: str

    @property
    def source(self) -> str:
        """Returns the operation of JAX that it comes from; "" if it is not known."""
        found = _SOURCE.search(self.rest)
        return found[1] if found else ""


def instructions(text: str) -> Iterator[Instruction]:
    """Yields all instructions of a program."""
    computation = ""
    for line in text.splitlines():
        if line.startswith(("ENTRY", "%")) and line.rstrip().endswith("{"):
            entry = line.startswith("ENTRY")
            computation = "ENTRY" if entry else line.split()[0].strip("%")
        elif found := _LINE.match(line):
            name, kind, opcode, rest = found.groups()
            yield Instruction(computation, name, opcode, _arrays(kind), rest)


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(kind, tuple(int(d) for d in dims.split(",") if d), layout or "")
        for kind, dims, layout in _ARRAY.findall(text)
    )


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Returns how many there are of each kind, and the bytes that they exchange."""
    found: dict[str, collections.Counter[str]] = {}
    for one in instructions(text):
        kind = one.opcode.removesuffix("-start")
        if kind in _COLLECTIVES:
            size = sum(array.bytes for array in one.arrays)
            found.setdefault(kind, collections.Counter()).update(count=1, bytes=size)
    return {kind: dict(counts) for kind, counts in found.items()}


def float32_products(text: str) -> list[str]:
    """Returns the sources of convolutions and matrix products of float32 arrays."""
    rows = list(instructions(text))
    types = {one.name: one.arrays[0].type for one in rows if one.arrays}
    found = []
    for one in rows:
        if one.opcode not in ("convolution", "dot"):
            continue
        operands = one.rest.split(")")[0]
        inline = [array.type for array in _arrays(operands)]
        named = [types.get(name, "") for name in re.findall(r"%([\w.-]+)", operands)]
        if "f32" in (inline or named):
            found.append(one.source or one.name)
    return found


def worst_padding(text: str) -> dict[str, object]:
    """Returns the array of the program itself that its tiles make larger by the most.

    Returns:
      `array`, `bytes` and `padded` of it; {} if nothing is padded.
    """
    written = (
        array
        for one in instructions(text)
        if one.computation == "ENTRY" and one.opcode not in _VIEWS
        for array in one.arrays
        if "S(" not in array.layout  # in the memory of the chip, not in its caches
    )
    worst = max(written, key=lambda array: array.padded - array.bytes, default=None)
    if worst is None or worst.padded == worst.bytes:
        return {}
    return {"array": str(worst), "bytes": worst.bytes, "padded": worst.padded}


def copies(text: str, least: int) -> list[str]:
    """Returns the arrays of at least `least` bytes that are only copied."""
    return [
        str(array)
        for one in instructions(text)
        if one.opcode in ("copy", "copy-start")
        for array in one.arrays[:1]
        if array.bytes >= least
    ]


def cycles(text: str) -> dict[str, int]:
    """Returns the compiler's estimate of cycles by part of the step.

    The body of a loop counts once. Parts are "student forward", "student backward",
    "teacher", "method" and "rest", by the names of the operations' sources.
    """
    parts: collections.Counter[str] = collections.Counter()
    for one in instructions(text):
        found = _CYCLES.search(one.rest)
        if found and not one.computation.startswith("fused_computation"):
            parts[_part(one.source)] += int(found[1])
    return dict(parts)


def _part(source: str) -> str:
    if "transpose(" in source:
        return "student backward"
    if "jvp(" not in source:
        return "teacher" if re.search(r"stage|stem|block", source) else "rest"
    return "student forward" if re.search(r"stage|stem|block", source) else "method"
