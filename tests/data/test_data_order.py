"""Batch order: a pure function of (seed, step)."""

import numpy as np
import pytest

from lakd_jax.data import order


@pytest.mark.parametrize(
    ("examples", "batch", "drop_last", "steps"),
    [
        (10, 5, True, 2),
        (10, 5, False, 2),
        (11, 5, True, 2),
        (11, 5, False, 3),
        (3, 5, False, 1),
    ],
)
def test_steps_per_epoch(examples, batch, drop_last, steps):
    assert order.steps_per_epoch(examples, batch, drop_last) == steps


@pytest.mark.parametrize("drop_last", [True, False])
def test_every_epoch_is_another_permutation(drop_last):
    steps = order.steps_per_epoch(103, 10, drop_last)
    batches = [order.batch_indices(7, s, 103, 10, drop_last) for s in range(2 * steps)]
    epochs = [np.concatenate(batches[:steps]), np.concatenate(batches[steps:])]
    assert (epochs[0] != epochs[1]).any()
    for epoch in epochs:
        assert epoch.dtype == np.int32
        assert len(np.unique(epoch)) == len(epoch) == (100 if drop_last else 103)
        assert epoch.min() >= 0 and epoch.max() < 103
    assert len(batches[steps - 1]) == (10 if drop_last else 3)


def test_order_depends_on_seed_and_step_alone():
    """Promise 14: whichever batches were requested before."""
    forwards = [order.batch_indices(3, s, 50, 8, True).copy() for s in range(40)]
    order._permutation.cache_clear()
    for step in (39, 0, 17, 6, 5):
        np.testing.assert_array_equal(
            order.batch_indices(3, step, 50, 8, True), forwards[step]
        )
    assert (order.batch_indices(4, 0, 50, 8, True) != forwards[0]).any()
    # Seed and epoch are not interchangeable: seed 4, epoch 0 is not seed 3, epoch 1.
    assert (order.batch_indices(4, 0, 50, 8, True) != forwards[6]).any()


def test_order_stays_what_it_was():
    """A change of the order would break resuming runs of earlier versions."""
    first = order.batch_indices(0, 0, 10, 10, True)
    assert first.tolist() == [0, 7, 8, 6, 9, 5, 1, 3, 2, 4]
    assert order.batch_indices(-1, 3, 10, 5, True).tolist() == [5, 0, 6, 9, 3]


def test_a_far_step_draws_one_permutation(monkeypatch):
    """Promise 14: nothing is drawn for earlier steps and epochs."""
    drawn = []

    class Counting(np.random.Generator):
        def permutation(self, x, axis=0):
            drawn.append(len(x))
            return super().permutation(x, axis)

    monkeypatch.setattr(np.random, "Generator", Counting)
    order._permutation.cache_clear()
    found = order.batch_indices(0, 10**6, 50_000, 100, True)
    assert drawn == [50_000] and len(set(found.tolist())) == 100
    order.batch_indices(0, 10**6 + 1, 50_000, 100, True)
    assert drawn == [50_000]  # that of the epoch is cached


def test_first_places_are_uniform():
    firsts = [order.batch_indices(0, s, 10, 10, True)[0] for s in range(2000)]
    assert np.bincount(firsts, minlength=10).std() < 3 * np.sqrt(200)


def test_batches_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        order.batch_indices(0, 0, 10, 5, True)[0] = 3


@pytest.mark.parametrize(
    "arguments",
    [(0, -1, 10, 5, True), (0, 0, 0, 5, False), (0, 0, 4, 5, True), (0, 0, 4, 0, True)],
)
def test_impossible_requests_are_refused(arguments):
    with pytest.raises(ValueError):
        order.batch_indices(*arguments)
