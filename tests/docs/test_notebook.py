"""The notebook holds no results of anybody, and its cells run in order."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import commands
import jax
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


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Without lakd_jax and a chip; returns what is on its PATH and the calls of pip."""
    if any(pathlib.Path("/dev").glob("accel*")) or pathlib.Path("/dev/vfio/0").exists():
        pytest.skip("this machine has a TPU, or what the notebook takes for one")
    find, run, calls = importlib.util.find_spec, subprocess.run, []

    def stand_in(command, **options):
        if command[0] != sys.executable:
            return run(command, **options)
        assert command[1:3] == ["-m", "pip"] and options == {"check": True}
        return calls.append(command[3:])

    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "lakd_jax" else find(n)
    )
    monkeypatch.setattr(subprocess, "run", stand_in)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path, calls


def driver(folder, answer, code=0):
    """Puts an nvidia-smi there that prints this."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\necho '{answer}'\nexit {code}\n")
    path.chmod(0o755)


def installed(folder, *names):
    """Makes these packages appear to be installed."""
    for name in names:
        info = folder / f"{name.replace('-', '_')}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name}\nVersion: 1\n")


def install(notebook):
    """Runs the cell that installs; returns its variables."""
    variables = {"SOURCE": str(commands.ROOT)}
    exec(code(notebook)[1], variables)
    return variables


@pytest.mark.parametrize(
    ("answer", "chip"),
    [
        ("580.82.07, 7.5", "cuda13"),  # a T4
        ("590.10, 9.0\n590.10, 9.0", "cuda13"),
        ("550.54.15, 7.5", "cuda12"),
        ("580.82.07, 7.0", "cuda12"),  # a V100, which CUDA 13 no longer knows
        ("525.60.13, 8.0", "cuda12"),
    ],
)
def test_the_driver_decides_on_the_build(answer, chip, notebook, machine, capsys):
    folder, calls = machine
    plugins = {c: (f"jax-{c}-pjrt", f"jax-{c}-plugin") for c in ("cuda12", "cuda13")}
    installed(folder, *plugins["cuda12"], *plugins["cuda13"])
    driver(folder, answer)
    install(notebook)
    (other,) = plugins.keys() - {chip}
    removal = ["uninstall", "-q", "-y", *plugins[other]]
    assert calls == [removal, ["install", "-q", str(commands.ROOT), f"jax[{chip}]"]]
    version = answer.split(",")[0]
    assert f"JAX for {chip}: the driver is {version}" in capsys.readouterr().out


def test_nothing_is_removed_that_is_not_there(notebook, machine):
    folder, calls = machine
    driver(folder, "580.82.07, 7.5")
    installed(folder, "jax-cuda13-plugin")
    install(notebook)
    assert calls == [["install", "-q", str(commands.ROOT), "jax[cuda13]"]]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "neither a TPU nor NVIDIA's driver was found"),
        ("No devices were found", "nvidia-smi finds no GPU: No devices were found"),
        ("470.82.01, 7.5", "the driver is 470.82.01, and CUDA 12 needs 525 or newer"),
    ],
)
def test_why_there_is_only_the_cpu(answer, reason, notebook, machine, capsys):
    folder, calls = machine
    if answer:
        driver(folder, answer, code=6)
    variables = install(notebook)
    assert calls == [["install", "-q", str(commands.ROOT)]]
    assert capsys.readouterr().out == f"JAX for the CPU: {reason}\n"
    assert shown_device(notebook, variables, "cpu", capsys).endswith(
        f": training on the CPU only, since {reason}"
    )


def shown_device(notebook, variables, platform, capsys):
    """Runs the cell that shows the device, with two of them; returns its line."""
    device = types.SimpleNamespace(platform=platform, device_kind="Tesla T4")
    display = types.SimpleNamespace(HTML=0, Image=0, Markdown=0, display=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: [device] * 2)
        patch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
        patch.setitem(sys.modules, "IPython.display", display)
        exec(code(notebook)[2], variables)
    (line,) = capsys.readouterr().out.splitlines()
    return line


def test_the_device_is_shown_in_a_line(notebook, capsys):
    variables = {"chip": "cuda12", "reason": "the driver is 550.1"}
    line = shown_device(notebook, variables, "gpu", capsys)
    assert line.endswith(": training on 2 x Tesla T4")
    line = shown_device(notebook, variables, "cpu", capsys)
    assert "on the CPU only" in line and "cuda12 (the driver is 550.1)" in line


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
