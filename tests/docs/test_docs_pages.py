"""What the pages show does what they say: their blocks are run as they stand."""

import json
import os
import pathlib
import re
import subprocess
import sys

import commands
import pytest

from lakd_jax import distill, models

DOCS = commands.ROOT / "docs"
PAGES = ("quickstart.md", "your_own.md", "deploy.md")
NEEDS = {"ONNX Runtime": ("jax2onnx", "onnxruntime"), "PyTorch": ("torch",)}
_BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.M | re.S)

# Runs blocks in one process, so that a later one knows what an earlier one defined.
# Tracebacks give the page's own lines.
_DRIVER = """\
import json, os, pathlib, subprocess, sys
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
sys.path.insert(0, os.getcwd())
page, blocks = sys.argv[1], json.load(sys.stdin)
for language, file, line, code in blocks:
    if file:
        pathlib.Path(file).write_text(code)
    elif language == "bash":
        subprocess.run(["bash", "-e", "-c", code], check=True)
    else:
        exec(compile("\\n" * line + code, page, "exec"), globals())
"""


def sections(page):
    """{heading: [(language, file or "", lines before it in the page, code)]}."""
    text = (DOCS / page).read_text(encoding="utf-8")
    heads = [(m.start(), m.group(1)) for m in re.finditer(r"^## (.*)$", text, re.M)]
    found = {}
    for match in _BLOCK.finditer(text):
        language, file, code = match.groups()
        if language in ("python", "bash"):
            head = [name for start, name in heads if start < match.start()][-1]
            line = text[: match.start(3)].count("\n")
            found.setdefault(head, []).append((language, file or "", line, code))
    return found


CASES = [(page, head) for page in PAGES for head in sections(page)]


def run(page, blocks, folder):
    """The finished process of these blocks, in a folder that looks like a checkout."""
    for name in ("main.py", "configs"):
        (folder / name).symlink_to(commands.ROOT / name)
    return subprocess.run(
        [sys.executable, "-c", _DRIVER, page],
        input=json.dumps(blocks),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(commands.ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.long
@pytest.mark.parametrize(("page", "head"), CASES)
def test_blocks_run(page, head, tmp_path):
    for package in NEEDS.get(head, ()):
        pytest.importorskip(package)
    done = run(page, sections(page)[head], tmp_path)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def test_a_block_that_fails_is_found_with_its_line(tmp_path):
    blocks = [
        ("python", "mine.py", 0, "x = 3\n"),
        ("python", "", 0, "import mine\n"),
        ("bash", "", 0, "test -f mine.py\npython -c 'import mine' > seen\n"),
        ("python", "", 40, "assert mine.x == 3\nassert open('seen').read()\n"),
    ]
    done = run("some.md", blocks, tmp_path)
    assert done.returncode == 1 and 'File "some.md", line 42' in done.stderr


def test_every_section_with_code_is_known():
    assert dict.fromkeys(CASES).keys() == {
        ("quickstart.md", "From the command line"),
        ("quickstart.md", "From Python"),
        ("your_own.md", "Your own data"),
        ("your_own.md", "Weights of other classes"),
        ("your_own.md", "Your own network"),
        ("your_own.md", "A teacher from anywhere"),
        ("your_own.md", "Your own method"),
        ("your_own.md", "Your own tracker"),
        ("deploy.md", "Python with lakd_jax"),
        ("deploy.md", "JAX alone"),
        ("deploy.md", "ONNX Runtime"),
        ("deploy.md", "PyTorch"),
    }


@pytest.mark.parametrize("page", sorted(p.name for p in DOCS.glob("*.md")))
def test_links_lead_somewhere(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https:)([^)#:]+)[^)]*\)", text):
        assert pathlib.Path(DOCS, target).exists(), f"{page}: {target}"


def test_the_readme_counts_what_there_is():
    text = (commands.ROOT / "README.md").read_text(encoding="utf-8")
    methods = len(distill.names()) - 1  # "none" is no method
    assert f"{methods} methods and {len(models.names())} networks" in text
    assert f"| losses | {methods}, and sums |" in text
    assert len(text.splitlines()) <= 130
    for name in set(distill.names()) - {"none"}:
        assert f"`{name}`" in text, name
