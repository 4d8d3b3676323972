"""Renders a report as one self-contained HTML file: text, tables and pictures."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
p { max-width: 44rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; border-bottom: 2px solid #999; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; }
.note { color: #595959; }
"""


def render(title: str, sections: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Returns the page as HTML.

    Args:
        title: title of the page, plain text.
        sections: (heading, parts); the functions below return parts.
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    for heading, parts in sections:
        body += [f"<h2>{html.escape(heading)}</h2>", *parts]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # Without an icon here, a browser requests one.
            '<link rel="icon" href="data:,">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{_STYLE}</style></head><body>",
            *body,
            "</body></html>",
            "",
        ]
    )


def text(words: str, *, note: bool = False) -> str:
    """Returns a paragraph of plain text, in a fainter colour if it is a note."""
    kind = ' class="note"' if note else ""
    return f"<p{kind}>{html.escape(words)}</p>"


def code(title: str, words: str) -> str:
    """Returns preformatted text that unfolds when its title is clicked."""
    head = f"<summary>{html.escape(title)}</summary>"
    return f"<details>{head}<pre>{html.escape(words)}</pre></details>"


def unfolding(title: str, part: str) -> str:
    """Returns a part that unfolds when its title is clicked."""
    return f"<details><summary>{html.escape(title)}</summary>{part}</details>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of plain text; all columns but the first are right-aligned."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = [
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    ]
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def picture(path: Path, description: str) -> str:
    """Returns an embedded PNG file with `description` as its alternative text."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    alt = html.escape(description, quote=True)
    return f'<img src="data:image/png;base64,{data}" alt="{alt}">'
