"""Writes docs/configuration.md: every field, its default and its meaning.

    python -m docs.make_configuration

All of it is declared in `lakd_jax.config.blocks` and by the methods.
"""

import pathlib

from lakd_jax import fields
from lakd_jax.config import listing
from lakd_jax.distill.base import registry, term

PAGE = pathlib.Path(__file__).with_name("configuration.md")
COMMAND = "python -m docs.make_configuration"

_HEAD = f"""\
# Configuration

Written by `{COMMAND}` from the declarations in
[blocks.py](../lakd_jax/config/blocks.py),
[optimiser.py](../lakd_jax/config/optimiser.py) and, for methods, their files in
[lakd_jax/distill](../lakd_jax/distill); change them there.

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
_MORE = """\
## more methods

Weights are those of the reference recipes for CIFAR-100. In every block `ce_weight` is
that of the cross-entropy with the labels, `weight` that of the method's own loss, and
`warmup_epochs` how long the latter grows to what it is, epoch by epoch. In a sum such
as dkd+at the cross-entropy has the first one's weight.
"""


def render() -> str:
    """Returns the page."""
    found = listing.every()
    more = [block for block in found if block.method and _is_term(block.name)]
    first = [block for block in found if block not in more]
    return "\n".join(
        [
            _HEAD,
            _contents([block.name for block in [*first, *more]]),
            *(section("##", block) for block in first),
            _MORE,
            *(section("###", block) for block in more),
        ]
    )


def _is_term(method: str) -> bool:
    return issubclass(registry.get(method).cls, term.Term)


def _contents(blocks: list[str]) -> str:
    links = [f"[{_title(b)}](#{_title(b).replace('.', '')})" for b in blocks]
    return " · ".join(links).replace("#the run", "#the-run") + "\n"


def _title(block: str) -> str:
    return block or "the run"


def section(level: str, block: listing.Block) -> str:
    """Returns the heading, the note and the table of one block."""
    lines = [f"{level} {_title(block.name)}", ""]
    if note := block.about:
        lines += [f"{note[:1].upper()}{note[1:].rstrip('.')}.", ""]
    lines += ["| field | default | meaning |", "| --- | --- | --- |"]
    lines += [_row(block.name, option) for option in block.options]
    return "\n".join(lines) + "\n"


def _row(block: str, option: fields.Option) -> str:
    name, doc = f"{block}.{option.name}".lstrip("."), option.doc.replace("|", "\\|")
    return f"| `{name}` | `{option.default!r}` | {doc} |"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
