"""Writes docs/configuration.md: every field with its default and its comment.

    python -m docs.make_configuration

Defaults are those of `config.default()`. Meanings are the comments in the functions
that make the blocks, next to an assignment or in the lines above it.
"""

import ast
import inspect
import io
import pathlib
import tokenize
from types import ModuleType
from typing import Any

from lakd_jax import config as config_lib
from lakd_jax.config import methods as methods_lib
from lakd_jax.config import tree

PAGE = pathlib.Path(__file__).with_name("configuration.md")
COMMAND = "python -m docs.make_configuration"

_HEAD = f"""\
# Configuration

Written by `{COMMAND}` from the comments in
[lakd_jax/config/tree.py](../lakd_jax/config/tree.py) and
[lakd_jax/config/methods.py](../lakd_jax/config/methods.py); change them there.

A field is set on the command line, `--config.optim.lr=0.1`
(tuples as `--config.seeds=0,1,2`), in a file like those in `configs/`, or in Python:

```python
import lakd_jax

config = lakd_jax.config.default()
config.optim.lr = 0.1
```

Where values stand between bars, they are all there are. Q1 to Q14 are questions that
the paper of LAKD leaves open, see [design.md](design.md#lakd). Where no meaning is
given, the name says it.
"""

Notes = dict[str, str]  # by field, in order; the block's own note under ""


class Builders:
    """Reads the comments on fields in a module's functions that make blocks."""

    def __init__(self, module: ModuleType):
        source = inspect.getsource(module)
        self._comments, self._comment_lines = _comments(source)
        functions = ast.walk(ast.parse(source))
        self._functions = {
            f.name: f for f in functions if isinstance(f, ast.FunctionDef)
        }

    def notes(self, name: str) -> Notes:
        """Returns the notes of the function `name` and of the functions it extends."""
        found: Notes = {}
        for statement in self._functions[name].body:
            note = self._note(statement)
            if base := self._called(statement):
                found |= self.notes(base) if not _field(statement) else {}
            if field := _field(statement):
                found[field] = note
            elif note:
                found[""] = f"{found.get('', '')} {note}".strip()
        return found

    def blocks(self, name: str) -> dict[str, str]:
        """Returns block -> the function that makes it, as used in function `name`."""
        found = {}
        for node in ast.walk(self._functions[name]):
            if isinstance(node, ast.Assign) and _field(node) and self._called(node):
                found[_field(node)] = self._called(node)
            elif isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and (made := self._name(value)):
                        found[key.value] = made
        return found

    def _called(self, statement: ast.stmt) -> str:
        """Returns the function of this module that is called for the value, or ""."""
        return self._name(getattr(statement, "value", None))

    def _name(self, value: Any) -> str:
        name = getattr(getattr(value, "func", None), "id", "")
        return name if name in self._functions else ""

    def _note(self, statement: ast.stmt) -> str:
        """Returns the comments above the statement, then those next to it."""
        first = statement.lineno
        while first - 1 in self._comment_lines:
            first -= 1
        lines = range(first, (statement.end_lineno or statement.lineno) + 1)
        return " ".join(self._comments[n] for n in lines if n in self._comments)


def _comments(source: str) -> tuple[dict[int, str], set[int]]:
    """Returns the comments by line, and the lines that only hold a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = [t for t in tokens if t.type == tokenize.COMMENT]
    comment_lines = {t.start[0] for t in found if t.line.lstrip().startswith("#")}
    return {t.start[0]: t.string.lstrip("# ") for t in found}, comment_lines


def _field(statement: ast.stmt) -> str:
    """Returns "student.vam" for `c.student.vam = ...`; "" for other statements."""
    if not isinstance(statement, ast.Assign):
        return ""
    target = statement.targets[0]
    if not isinstance(target, ast.Attribute):
        return ""
    return ast.unparse(target).partition(".")[2]


def render() -> str:
    """Returns the page.

    Raises:
      ValueError: a field of the defaults is missing from the page, or appears twice.
    """
    run, methods = Builders(tree), Builders(methods_lib)
    sections = {"": run.notes("default")}
    for block, function in run.blocks("default").items():
        sections[block] = run.notes(function)
    method_blocks = methods.blocks("blocks").items()
    others = {block: methods.notes(function) for block, function in method_blocks}
    sections[""] = {f: n for f, n in sections[""].items() if f not in sections}

    shown = [
        f"{block}.{field}".lstrip(".")
        for block, notes in (sections | others).items()
        for field in notes
        if field
    ]
    values = config_lib.flat(config_lib.default())
    if sorted(shown) != sorted(values):
        odd = sorted(set(shown) ^ set(values)) or "some appear twice"
        raise ValueError(f"{PAGE.name}: not written like the other fields: {odd}")

    parts = [_HEAD, _contents([*sections, *others])]
    parts += [_section("##", b, notes, values) for b, notes in sections.items()]
    _, _, text = (inspect.getdoc(methods_lib) or "").partition("\n\n")
    parts.append(f"## more methods\n\n{text}\n")
    parts += [_section("###", b, notes, values) for b, notes in others.items()]
    return "\n".join(parts)


def _contents(blocks: list[str]) -> str:
    links = [f"[{_title(b)}](#{_title(b).replace('.', '')})" for b in blocks]
    return " · ".join(links).replace("#the run", "#the-run") + "\n"


def _title(block: str) -> str:
    return block or "the run"


def _section(level: str, block: str, notes: Notes, values: dict[str, Any]) -> str:
    lines = [f"{level} {_title(block)}", ""]
    if note := notes.get(""):
        lines += [f"{note[:1].upper()}{note[1:].rstrip('.')}.", ""]
    lines += ["| field | default | meaning |", "| --- | --- | --- |"]
    for field, note in notes.items():
        if field:
            name = f"{block}.{field}".lstrip(".")
            note = note.replace("|", "\\|")
            lines.append(f"| `{name}` | `{values[name]!r}` | {note} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
