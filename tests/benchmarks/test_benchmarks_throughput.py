"""The throughput benchmark: its record, and that its baseline does the same work."""

import json
import sys

import jax
import numpy as np
import pytest

from benchmarks import ours, subjects, throughput, timing
from lakd_jax import interop
from lakd_jax.training import step

torch = pytest.importorskip("torch")
from benchmarks import torch_step  # noqa: E402

# PyTorch's own, when its optimisers and fused modules are first used.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

TINY = ["--pair=resnet8,resnet8", "--batch=4", "--rounds=3", "--warm_up=0"]
TINY += ["--matmul_side=64", "--copy_mib=1"]


def setup(method, **changes):
    """resnet8 from resnet8 at batch 4, without random crops."""
    fixed = {"data.pad": 0, "data.flip": False} | changes
    pair = ("resnet8", "resnet8", method)
    return ours.setup(ours.configure(*pair, 4, "float32", fixed))


def two_steps_of_ours(made, rows):
    """Losses of two steps, and the student after them in PyTorch's names."""
    run = jax.jit(lambda *a: step.run_steps(made.spec, *a))
    state, losses = made.state, []
    for row in rows:
        state, metrics = run(state, made.teacher, made.device_data, row[None])
        losses.append(float(metrics["loss"][0]))
    variables = jax.device_get(state.variables("student"))
    return losses, interop.to_torch("resnet8", variables)


@pytest.mark.parametrize("method", ["kd", pytest.param("lakd", marks=pytest.mark.long)])
def test_the_baseline_takes_our_steps(method, monkeypatch):
    made = setup(method)
    rows = made.rows(2, 7)
    losses, student = two_steps_of_ours(made, rows)
    monkeypatch.setattr(torch_step.Torch, "run", lambda self, steps: None)
    work = made.work(made.rows(4, 1), anew=False)
    baseline = torch_step.Torch(work, "eager")
    theirs = [float(baseline.step(torch.tensor(row).long())) for row in rows]
    np.testing.assert_allclose(theirs, losses, rtol=1e-4)
    after = baseline.student.state_dict()
    for key, ours_now in student.items():
        if "running_var" not in key:  # PyTorch's is unbiased
            np.testing.assert_allclose(after[key], ours_now, atol=1e-4, err_msg=key)
    moved = np.abs(student["conv1.weight"] - made.student_torch["conv1.weight"])
    assert moved.max() > 1e-3  # so that the comparison sees gradients


def test_a_crop_of_the_baseline_is_a_window_of_the_padded_image(monkeypatch):
    made = setup("none", **{"data.pad": 2, "data.flip": True})
    monkeypatch.setattr(torch_step.Torch, "run", lambda self, steps: None)
    work = made.work(made.rows(4, 1), anew=False)
    baseline = torch_step.Torch(work, "eager")
    config, seen = made.config.data, set()
    image = np.pad(made.split.images[5], ((2, 2), (2, 2), (0, 0)))
    unit = (image / 255 - np.array(config.mean)) / np.array(config.std)
    windows = {
        (y, x, flip): unit[y : y + 32, x : x + 32][:, :: -1 if flip else 1]
        for y in range(5)
        for x in range(5)
        for flip in (False, True)
    }
    for crop in baseline._pixels(torch.full((40,), 5)).permute(0, 2, 3, 1).numpy():
        close = [k for k, w in windows.items() if np.abs(w - crop).max() < 1e-4]
        assert len(close) == 1
        seen |= set(close)
    assert len(seen) > 20  # of 50


def test_a_record_has_all_that_is_promised(tmp_path, capsys):
    flags = [*TINY, "--method=kd", "--peer=torch-eager", f"--results={tmp_path}"]
    throughput.main(flags)
    record = json.loads((tmp_path / "cpu-resnet8-resnet8-b4-float32.json").read_text())
    assert record["pair"] == ["resnet8", "resnet8"]
    assert (record["batch"], record["dtype"], record["device"]) == (4, "float32", "cpu")
    kd = record["methods"]["kd"]
    assert kd["subjects"].keys() == {"ours", "torch eager"}
    assert {"jax", "torch", "python"} <= kd["versions"].keys()
    assert kd["threads"] >= 1 and kd["rounds"] == 3 and not kd["failed"]
    assert str(tmp_path) not in json.dumps(record)
    assert kd["ratios"]["torch eager"]["min"] > 0
    own = kd["subjects"]["ours"]
    assert own["flops"] > 3e8 and own["temp_bytes"] > 0 and own["argument_bytes"] > 0
    assert own["first_step_s"] > own["compile_s"] > 0
    step_s = own["step_s"]
    assert step_s["min"] <= step_s["median"] <= step_s["max"]
    assert own["images_per_s"] == pytest.approx(4 / step_s["median"])
    reached, best = own["reached"], kd["ceilings"]
    shares = [reached[r] / best[r] for r in ("flops_per_s", "bytes_per_s")]
    assert reached["roofline_share"] == pytest.approx(max(shares))
    capsys.readouterr()
    throughput.main(flags)  # measures nothing again
    assert "has kd" in capsys.readouterr().out
    throughput.main(["--table", f"--results={tmp_path}"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "| ours |" in lines[2] and "| torch eager |" in lines[3]


def test_what_is_left_to_the_device_is_filled_in():
    chosen = throughput.resolve(throughput.parse([]))
    assert (chosen.peer, chosen.steps) == ([], 1)  # tests run on CPUs


@pytest.mark.parametrize(
    "flag",
    [
        "--method=afd",
        "--dtype=int8",
        "--peer=fast",
        "--peer=mdistiller",
        "--epochs=1",
        "--images=DIR",
    ],
)
def test_what_nobody_can_measure_is_refused(flag, capsys):
    with pytest.raises(SystemExit):
        throughput.parse([flag])
    assert flag.split("=")[0] in capsys.readouterr().err


def test_a_name_stands_for_the_subjects_that_have_the_method():
    both = ["torch", "keras", "torch-eager"]
    compiled = ["ours", "torch eager", "torch compile"]
    assert subjects.names(both, "kd") == [*compiled, "keras"]
    assert subjects.names(both, "lakd") == compiled
    assert subjects.names(["mdistiller"], "lakd") == ["ours"]


def test_turns_and_pairs():
    order = []

    class Fake:
        facts = {}

        def __init__(self, name):
            self.name = name

        def run(self, steps):
            order.append((self.name, steps))

    two = [Fake("ours"), Fake("other")]
    times = timing.interleaved(two, rounds=2, steps=5, warm_up=1)
    assert order == 3 * [("ours", 5), ("other", 5)]
    assert [len(t) for t in times.values()] == [2, 2]
    pairs = timing.ratios({"ours": [1.0, 2.0], "other": [2.0, 8.0]}, "ours")
    assert pairs["other"]["min"] == 2 and pairs["other"]["median"] == 3


# A checkout with as much in it as the adapter needs; it keeps what it is given.
CHECKOUT = {
    "models": """
import torch
class Net(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1)), {}
    def load_state_dict(self, state, strict):
        assert "layer1.0.conv1.weight" in state
        return [], []
def net(num_classes):
    return Net(3072, num_classes)
cifar_model_dict = {"resnet8": (net, None)}
""",
    "distillers": """
import torch
class KD(torch.nn.Module):
    def __init__(self, student, teacher, cfg):
        super().__init__()
        self.student, self.cfg = student, cfg
distiller_dict = {"KD": KD}
""",
    "engine/cfg": """
from unittest import mock
CFG = mock.Mock(**{"clone.return_value": mock.Mock()})
""",
    "engine/utils": "AverageMeter = dict",
    "engine/trainer": """
seen = []
class BaseTrainer:
    def __init__(self, name, distiller, train_loader, val_loader, cfg):
        self.distiller, self.cfg = distiller, cfg
    def train_iter(self, data, epoch, train_meters):
        image = data[0].cuda(non_blocking=True)
        logits, _ = self.distiller.module.student(image)
        seen.append((self.cfg, self.distiller.training, logits.shape))
""",
}


def test_a_checkout_makes_steps_with_its_own_trainer(tmp_path, monkeypatch):
    for name, text in CHECKOUT.items():
        file = tmp_path / "mdistiller" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    made = setup("kd")
    work = made.work(made.rows(4, 1), anew=False)
    peer = subjects.make("mdistiller", work, str(tmp_path))
    peer.run(2)
    assert peer.predict(np.zeros((3, 32, 32, 3), np.float32)).shape == (3, ours.CLASSES)
    seen = sys.modules["mdistiller.engine.trainer"].seen
    for name in [n for n in sys.modules if n.split(".")[0] == "mdistiller"]:
        del sys.modules[name]
    assert len(seen) == 3 and peer.facts["first_step_s"] > 0  # one to warm up
    settings, training, shape = seen[-1]
    assert training and shape == (4, ours.CLASSES)
    assert (settings.KD.TEMPERATURE, settings.SOLVER.MOMENTUM) == (4.0, 0.9)


def test_missing_pytorch_is_reported_before_any_work(monkeypatch, capsys):
    monkeypatch.setattr(throughput.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        throughput.parse([*TINY, "--peer=torch,keras"])
    assert "pip install keras torch" in capsys.readouterr().err
