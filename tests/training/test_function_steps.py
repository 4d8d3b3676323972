"""Steps from a teacher that is a function: those from the same network, to rounding."""

import functools

import jax
import numpy as np
import pytest
import test_train_step as steps
import tiny

from lakd_jax.models import frozen


def function_of(build):
    """Returns a network as a function of images; its maps are the ends of stages."""
    model = build(num_classes=3)
    variables = tiny.variables(model)

    def fn(images):
        outputs = model.apply(variables, images, train=False)
        return outputs.logits, {f"{i}": s[-1] for i, s in enumerate(outputs.blocks)}

    return frozen.of(fn, name="mine", features=None, image_size=8)


def setting_of(tmp_path, function, **fields):
    """Returns `steps.small` with the function as the teacher."""
    sizes = (1,) * len(function.maps)
    build = functools.partial(frozen.Frozen, function=function, stage_sizes=sizes)
    spec, state, _, data = steps.small(
        tmp_path, 1, tiny.SMALL, teacher_network=build, **fields
    )
    arrays = {f"array{i}": array for i, array in enumerate(function.arrays)}
    return spec, state, {"params": arrays}, data


@pytest.mark.long
@pytest.mark.parametrize(
    "fields",
    [
        {"method": "lakd"},  # every module alone
        {"method": "kd"},
        {"method": "lakd", "optim__accumulate": 2},
        {"method": "crd+at", "crd__negatives": 8},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_a_network_as_a_function_trains_the_same_student(fields, tmp_path):
    """It is the sceptic's test: bits may differ only as XLA fuses otherwise."""
    network = steps.train(steps.small(tmp_path, 1, **fields), steps.rows(2))
    function = function_of(tiny.SMALL)
    setting = setting_of(tmp_path, function, **fields)
    assert setting[0].isolated == (fields["method"] == "lakd")
    assert setting[0].partition.teacher_joints[-1] == "stage3.block1"
    after = steps.train(setting, steps.rows(2))
    np.testing.assert_allclose(
        steps.losses_of(after), steps.losses_of(network), rtol=1e-6
    )
    for metrics, expected in zip(after, network, strict=True):
        steps.assert_same_metrics(metrics[1], expected[1], rtol=1e-5)
    steps.assert_close(after[-1][0].params, network[-1][0].params, atol=1e-6)


def test_other_weights_are_other_losses(tmp_path):
    """The weights are those that the step is given, so none is a constant in it."""
    spec, state, variables, data = setting_of(
        tmp_path, function_of(tiny.SMALL), method="kd"
    )
    zeros = jax.tree.map(np.zeros_like, variables)
    both = [
        steps.losses_of(steps.train((spec, state, given, data), steps.rows(1)))
        for given in (variables, zeros)
    ]
    assert both[0] != both[1]
