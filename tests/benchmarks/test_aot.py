"""Tests what is compiled for chips that are not here, and how its text is read."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from benchmarks import aot, hlo

# TILE, CYCLES and SOURCE shorten the lines.
TEXT = """\
HloModule jit_f, entry_computation_layout={()->f32[2]}

%body (p: f32[8,130]) -> f32[8,130] {
  %p = f32[8,130]{1,0:TILE} parameter(0)
  ROOT %c.1 = f32[8,130]{1,0:TILE} copy(%p)
}

ENTRY %main (a: bf16[4,6]) -> f32[2] {
  %a = bf16[4,6]{1,0:TILE(2,1)} parameter(0)
  %b = f32[6,3]{1,0:TILE} parameter(1)
  %d = f32[4,3]{1,0:TILE} dot(%b, %b), SOURCE="jit(f)/jvp(LAKD)/adapter/dot"}
  %e = bf16[4,3]{1,0} dot(%a, %a), SOURCE="jit(f)/stem/dot"}
  %r = (f32[4]{0}, f32[2]{0}) all-reduce(%d, %e), CYCLES:"30"}
  %s = f32[5]{0} all-reduce-start(%e), CYCLES:"12"}, SOURCE="transpose(jvp(Net))/x"}
  %k = u8[100,3]{0,1:TILES(1)} copy(%a)
  ROOT %o = f32[2]{0} copy(%r)
}
"""
TEXT = TEXT.replace("TILE", "T(8,128)").replace("SOURCE", "metadata={op_name")
TEXT = TEXT.replace("CYCLES", 'backend_config={"estimated_cycles"')


def test_the_text_of_a_program_is_read():
    assert hlo.collectives(TEXT) == {"all-reduce": {"count": 2, "bytes": 44}}
    assert hlo.float32_products(TEXT) == ["jit(f)/jvp(LAKD)/adapter/dot"]
    assert hlo.cycles(TEXT) == {"rest": 30, "student backward": 12}
    assert hlo.copies(TEXT, 300) == [
        "f32[8,130]{1,0:T(8,128)}",
        "u8[100,3]{0,1:T(8,128)S(1)}",
    ]
    # Of what the program itself writes; 4x3 fill one tile of 8x128.
    assert hlo.worst_padding(TEXT) == {
        "array": "f32[4,3]{1,0:T(8,128)}",
        "bytes": 48,
        "padded": 4096,
    }


@pytest.mark.parametrize(("chip", "clock"), [("v5e", 1.5e9), ("v5p", 1.75e9)])
def test_the_clock_follows_from_the_arithmetic(chip, clock):
    assert aot.CHIPS[chip].clock == pytest.approx(clock, rel=0.01)


def test_what_the_compiler_of_gpus_does_not_tell_is_null():
    found = aot._speed({}, {}, aot.CHIPS["h200"])
    assert set(found) == {"flops", "bytes_accessed", "estimate_ms", "bound_ms"}
    assert set(found.values()) == {None} == {aot._total([1.0, None])}
    assert aot._total([1.0, 2.0]) == 3.0


def test_an_unknown_chip_is_refused(capsys):
    with pytest.raises(SystemExit):
        aot.parse(["--topology=v9:1x1"])
    assert "known are v5e, v5p, v6e" in capsys.readouterr().err


@pytest.mark.long
def test_a_step_compiled_for_tpus_moves_nothing_that_it_need_not(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    command = [sys.executable, "-m", "benchmarks.aot", "--case=tiny", "--level=O1"]
    command += ["--topology=v5e:2x2", "--program=many", f"--results={tmp_path}"]
    subprocess.run(command, check=True, env=os.environ | {"XLA_FLAGS": ""})
    path = tmp_path / "v5e-2x2-tiny-lakd-many-256.json"
    record = json.loads(path.read_text())
    (program,) = record["programs"]
    # Sums over all chips, and neither images nor teacher: fewer bytes than a batch.
    assert set(record["collectives"]) == {"all-reduce"}
    assert record["collectives"]["all-reduce"]["bytes"] < 256 * 32 * 32 * 3
    assert program["copies"] == []  # the split is not copied into another layout
    assert program["float32_products"]
    assert all("adapter" in source for source in program["float32_products"])
    assert 0 < record["temp_bytes"] <= record["peak_bytes"] < 16e9
    assert record["flops"] > 1e9 and record["estimate_ms"] > record["bound_ms"] > 0
