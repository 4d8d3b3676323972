"""The notebook holds no results of anybody, and its cells run in order."""

import importlib.util
import json
import os
import subprocess
import sys

import commands
import pytest

NOTEBOOK = commands.ROOT / "notebooks" / "lakd_colab.ipynb"
# Stands in for a notebook's display where IPython is missing: says what was shown.
_DISPLAY = """\
class _Shown:
    def __init__(self, data="", **options):
        self.data, self.options = data, options

class HTML(_Shown): pass
class Image(_Shown): pass
class Markdown(_Shown): pass

def display(shown):
    if name := shown.options.get("filename"):
        assert open(name, "rb").read(4) == b"\\x89PNG", name
    else:
        assert shown.data
    print("shown:", type(shown).__name__)
"""


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def code(notebook):
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def test_it_is_a_notebook_without_results(notebook):
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    cells = notebook["cells"]
    assert len({c["id"] for c in cells}) == len(cells)
    for cell in cells:
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            keys |= {"execution_count", "outputs"}
            assert cell["outputs"] == [] and cell["execution_count"] is None
        assert cell.keys() == keys and cell["metadata"] == {}
        assert cell["cell_type"] in ("code", "markdown") and "".join(cell["source"])


def test_cells_are_python_without_magic(notebook):
    for number, source in enumerate(code(notebook), 1):
        compile(source, f"cell {number}", "exec")
    assert code(notebook)[0].count("SMALL = False") == 1


@pytest.mark.long
def test_all_cells_run_in_the_small_setting(notebook, tmp_path):
    script = "\n\n".join(code(notebook)).replace("SMALL = False", "SMALL = True", 1)
    (tmp_path / "cells.py").write_text(script)
    if importlib.util.find_spec("IPython") is None:
        (tmp_path / "IPython").mkdir()
        version = "version_info = (9, 0)\n"  # matplotlib asks for it
        (tmp_path / "IPython" / "__init__.py").write_text(version)
        (tmp_path / "IPython" / "display.py").write_text(_DISPLAY)
    done = subprocess.run(
        [sys.executable, "cells.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(commands.ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("Markdown", "Image", "HTML"):
        assert kind in done.stdout
    made = {p.name for p in (tmp_path / "runs" / "digits-lakd-small").iterdir()}
    assert {"table.md", "curves.png", "attention.png", "report.html"} <= made
