"""Interprets pickles as data: no name in a file is imported, no function of it called.

A pickle is a program for a small stack machine. This one knows all its operations, but
what a file calls is looked up in a table of our own functions. An object of any other
class becomes a `Placeholder`, without content; a function of the standard library, by
which pickles run code, is refused by name.
"""

import pickletools
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple, cast

MOST_STEPS = 2**22  # a network of a thousand tensors takes some fifty thousand

_KEYS = (str, int, float, bytes, type(None))  # what is hashed, and so compared
# Parts of the standard library whose objects checkpoints hold beside the weights.
_HARMLESS = frozenset(
    "argparse array collections copyreg datetime decimal enum fractions functools "
    "ipaddress pathlib random re time typing uuid zoneinfo".split()
)
_HARMLESS_NAMES = {"_io.BytesIO", "types.SimpleNamespace", "builtins.xrange"} | {
    f"builtins.{kind.__name__}"
    for kind in (bool, bytearray, bytes, complex, dict, float, frozenset, int, list)
    + (object, range, set, slice, str, tuple)
}
_FORMER_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # in Python 2


class Global(NamedTuple):
    """A class or function that a file names, such as "torch.FloatStorage"."""

    name: str


class Placeholder:
    """Stands for an object of a class that is not known here; it has no content."""

    def __init__(self, name: str):
        self.name = name


class Buildable:
    """An object whose state follows after it; the base of ours that have one."""

    def build(self, state: Any) -> None:
        """Takes the state from the file; raises ValueError if it is not valid."""
        raise NotImplementedError


class Refusal(Exception):
    """The file would run code; its argument is a clause that tells how."""


class _Bounded:
    """Reads at most `left` bytes of a file, whatever lengths it declares."""

    def __init__(self, file: BinaryIO, left: int):
        self.file, self.left = file, left

    def read(self, count: int) -> bytes:
        """Returns the next `count` bytes; raises ValueError if there are fewer."""
        if count > self.left:
            raise ValueError("it ends too early")
        self.left -= count
        return self.file.read(count)

    def readline(self) -> bytes:
        """Returns the rest of the line, at most `left` bytes."""
        line = self.file.readline(self.left)
        self.left -= len(line)
        return line


def load(
    file: BinaryIO,
    size: int,
    calls: Mapping[str, Callable[..., Any]],
    persistent: Callable[[Any], Any],
) -> Any:
    """Returns the object that a pickle describes; reads up to its end, not beyond.

    Sets become lists, and entries of dictionaries whose keys are not plain values are
    left out.

    Args:
        file: positioned at the pickle.
        size: bytes that the file has from there.
        calls: for each name that a file may call, what is called instead.
        persistent: returns what a persistent id stands for.

    Raises:
        Refusal: see the module.
        Exception: of any kind, if the pickle is damaged.
    """
    machine = _Machine(calls, persistent)
    bounded = cast(BinaryIO, _Bounded(file, size))  # of a file, this is what is used
    for step, (opcode, argument, _) in enumerate(pickletools.genops(bounded)):
        if step > MOST_STEPS:
            raise ValueError(f"its pickle takes more than {MOST_STEPS} steps")
        if opcode.name not in _OPERATIONS:
            raise ValueError(f"its pickle uses {opcode.name}, which no weights need")
        _OPERATIONS[opcode.name](machine, argument)
    return machine.stack.pop()


class _Machine:
    """Stack, marks and memo of a pickle; a method for each kind of operation."""

    def __init__(
        self,
        calls: Mapping[str, Callable[..., Any]],
        persistent: Callable[[Any], Any],
    ):
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.calls, self.persistent = calls, persistent

    def push(self, value: Any) -> None:
        """Puts a value on the stack."""
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        """Marks the top of the stack."""
        self.marks.append(len(self.stack))

    def pop(self, _: Any = None) -> Any:
        """Removes the top of the stack, or the mark that lies there."""
        if self.marks and self.marks[-1] == len(self.stack):
            return self.marks.pop()
        return self.stack.pop()

    def since_mark(self, _: Any = None) -> list[Any]:
        """Removes and returns everything above the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def last(self, count: int) -> list[Any]:
        """Removes and returns the last values, the top one last."""
        return [self.stack.pop() for _ in range(count)][::-1]

    def put(self, index: int | None) -> None:
        """Remembers the top of the stack; None takes the next free number."""
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def get(self, index: int) -> None:
        """Pushes what was remembered."""
        self.push(self.memo[index])

    def extend(self, items: list[Any]) -> None:
        """Appends to the list on top; a placeholder ignores it."""
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif not isinstance(target, Placeholder):
            raise ValueError("it appends to what is no list")

    def update(self, items: list[Any]) -> None:
        """Adds keys and values, by turns, to the dictionary on top."""
        target = self.stack[-1]
        pairs = zip(items[::2], items[1::2], strict=True)
        if type(target) is dict:
            target.update((k, v) for k, v in pairs if isinstance(k, _KEYS))
        elif not isinstance(target, Placeholder):
            raise ValueError("it adds entries to what is no dictionary")

    def dictionary(self, _: Any) -> None:
        """Pushes a dictionary of the keys and values since the mark."""
        items = self.since_mark()
        self.push({})
        self.update(items)

    def build(self, _: Any) -> None:
        """Gives the state on top to the object below it."""
        state = self.stack.pop()
        # The attributes of other objects hold no weights.
        if isinstance(self.stack[-1], Buildable):
            self.stack[-1].build(state)

    def name(self, argument: str) -> None:
        """Pushes what a text "module name" means."""
        module, _, name = argument.partition(" ")
        self.push(Global(f"{_FORMER_MODULES.get(module, module)}.{name}"))

    def stack_name(self, _: Any) -> None:
        """Pushes what the module and the name on top mean."""
        self.name(" ".join(self.last(2)))

    def call(self, function: Any, arguments: Any) -> None:
        """Pushes the result of a call, by our own table of functions."""
        if isinstance(function, Global):
            self.push(self._called(function.name, arguments))
        elif isinstance(function, Placeholder):
            self.push(Placeholder(function.name))
        else:
            raise ValueError("it calls what is no function")

    def _called(self, name: str, arguments: Any) -> Any:
        if name in self.calls:
            return self.calls[name](*arguments)
        module = name.partition(".")[0]
        harmless = module in _HARMLESS or name in _HARMLESS_NAMES
        if module in sys.stdlib_module_names and not harmless:
            raise Refusal(f"it calls {name}")
        return Placeholder(name)

    def construct(self, argument: str) -> None:
        """Calls the class named by `argument` with all since the mark."""
        items = self.since_mark()
        self.name(argument)
        self.call(self.stack.pop(), items)

    def construct_first(self, _: Any) -> None:
        """Calls the first object since the mark with the others."""
        function, *items = self.since_mark()
        self.call(function, items)


def _nothing(machine: _Machine, _: Any) -> None:
    """Does what an operation that only helps to read the file ahead has to do."""


# What is in neither of these is an error: extensions, and buffers outside of the file.
_ARGUMENTS = """INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING
    SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE
    SHORT_BINUNICODE BINUNICODE BINUNICODE8 FLOAT BINFLOAT""".split()
_OPERATIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(_ARGUMENTS, _Machine.push),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _nothing),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_SET": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.since_mark,
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.last(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.last(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.last(3))),
    "LIST": lambda machine, _: machine.push(machine.since_mark()),
    "FROZENSET": lambda machine, _: machine.push(machine.since_mark()),
    "DICT": _Machine.dictionary,
    "APPEND": lambda machine, _: machine.extend(machine.last(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "ADDITEMS": lambda machine, _: machine.extend(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.update(machine.last(2)),
    "SETITEMS": lambda machine, _: machine.update(machine.since_mark()),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stack_name,
    "REDUCE": lambda machine, _: machine.call(*machine.last(2)),
    "NEWOBJ": lambda machine, _: machine.call(*machine.last(2)),
    "NEWOBJ_EX": lambda machine, _: machine.call(*machine.last(3)[:2]),
    "INST": _Machine.construct,
    "OBJ": _Machine.construct_first,
    "BUILD": _Machine.build,
    "BINPERSID": lambda machine, _: machine.push(
        machine.persistent(machine.stack.pop())
    ),
}
