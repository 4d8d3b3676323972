"""A lock in a bucket has one owner, who renews it; a dead one's is taken over."""

import dataclasses
import json
import os
import subprocess
import threading

import pytest

from lakd_jax import errors, paths
from lakd_jax.store import bucket, locks

FAR = {"host": "far", "machine": "another", "process": 7}


class Object:
    """An object of a bucket, in memory; `lost` answers are not those of the bucket."""

    def __init__(self):
        self._lock = threading.Lock()
        self.stored, self.lost, self.writes = None, 0, 0

    def read(self):
        return self.stored

    def write(self, content, generation):
        with self._lock:
            self.writes += 1
            have = self.stored.generation if self.stored else 0
            if generation != have:
                return None
            self.stored = bucket.Stored(content, self.writes)
            self.lost -= 1
            return None if self.lost >= 0 else self.writes

    def delete(self, generation):
        with self._lock:
            if self.stored and self.stored.generation == generation:
                self.stored = None


def claim(stored, *, beat=0.01, stale=60.0, **owner):
    """A claim of this process, or one with other facts."""
    made = locks.Claim(stored, "gs://bucket/run", beat, stale)
    made._owner = dataclasses.replace(made._owner, **owner)
    return made


def silent(stored, **owner):
    """What a process left behind that was killed, or does not answer any more."""
    made = claim(stored, **owner)
    assert made._write(0)
    return made


def ended_process():
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_second_claim_is_refused_until_the_first_is_released():
    stored = Object()
    first = claim(stored)
    first.acquire()
    with pytest.raises(errors.WorkdirError, match=f"in use by process {os.getpid()}"):
        claim(stored).acquire()
    first.release()
    assert stored.read() is None
    second = claim(stored)
    second.acquire()
    second.release()


def test_the_owner_on_another_machine_is_waited_for_and_found_alive(caplog):
    stored = Object()
    first = claim(stored, beat=0.05, **FAR)
    first.acquire()
    before = stored.writes
    with pytest.raises(errors.WorkdirError, match="in use by process 7 on far"):
        claim(stored).acquire()
    assert stored.writes > before + 1  # the attempt to create it, and a renewal
    assert "was in use by process 7 on far" in caplog.text
    first.release()


def test_a_silent_owner_on_another_machine_is_taken_over(caplog):
    stored = Object()
    lost = silent(stored, **FAR)
    second = claim(stored, stale=0.1)
    second.acquire()
    waited, taken = caplog.messages
    assert "was in use by process 7 on far; if that does not answer" in waited
    assert taken == "gs://bucket/run: taken over from process 7 on far"
    # The first wakes up: it neither renews nor deletes what is not its own.
    assert not lost._write(lost._generation)
    lost._thread.start()
    lost.release()
    assert json.loads(stored.read().content)["process"] == os.getpid()
    second.release()
    assert stored.read() is None


@pytest.mark.skipif(not locks._machine(), reason="dead processes are known on Linux")
def test_a_dead_process_of_this_machine_is_taken_over_at_once():
    for facts in (
        {"process": ended_process()},
        {"process": os.getppid(), "began": "1"},  # its number was used again
        {},  # this process, which could not delete it
    ):
        stored = Object()
        silent(stored, **facts)
        second = claim(stored)
        second.acquire()
        assert stored.writes == 3  # the first's, one that is refused, the second's
        second.release()


@pytest.mark.skipif(not locks._machine(), reason="dead processes are known on Linux")
def test_a_live_process_of_this_machine_is_not_waited_for():
    stored, parent = Object(), os.getppid()
    silent(stored, process=parent, began=locks._began(parent))
    with pytest.raises(errors.WorkdirError, match=f"in use by process {parent} on "):
        claim(stored).acquire()


def test_a_write_whose_answer_was_lost_is_not_another_owners():
    stored = Object()
    stored.lost = 1
    first = claim(stored)
    first.acquire()
    first.release()
    assert stored.read() is None


def test_of_two_that_take_over_one_succeeds():
    stored = Object()
    silent(stored, **FAR)
    claims = [claim(stored, stale=0.2, host=str(i), machine=str(i)) for i in range(2)]
    outcomes = []

    def attempt(one):
        try:
            one.acquire()
            outcomes.append("has it")
        except errors.WorkdirError:
            outcomes.append("refused")

    threads = [threading.Thread(target=attempt, args=(one,)) for one in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["has it", "refused"]
    for one in claims:
        if one._thread.ident:
            one.release()


@pytest.mark.parametrize("content", [b"", b"text", b"[1]", b'{"host": "far"}'])
def test_content_of_another_kind_is_an_owner_elsewhere(content, caplog):
    stored = Object()
    stored.write(content, 0)
    second = claim(stored, stale=0.05)
    second.acquire()
    assert len(caplog.messages) == 2  # it was waited for
    second.release()


def test_a_lost_lock_stops_the_process(monkeypatch):
    stored = Object()
    monkeypatch.setattr(bucket, "Object", lambda path: stored)
    place = paths.of("gs://bucket/run")
    release = locks.hold(place)
    locks.require_held(place)
    silent_one = locks.Owner(**FAR)
    content = json.dumps(dataclasses.asdict(silent_one)).encode()
    stored.stored = bucket.Stored(content, 1000)
    with pytest.raises(errors.WorkdirError, match="taken over by process 7 on far"):
        locks.require_held(place)
    stored.stored = None
    with pytest.raises(errors.WorkdirError, match="its .lock was deleted"):
        locks.require_held(place)
    release()


def test_a_bucket_that_does_not_answer_is_not_a_lost_lock(monkeypatch):
    stored = Object()
    monkeypatch.setattr(bucket, "Object", lambda path: stored)

    def fail():
        raise OSError("no route")

    place = paths.of("gs://bucket/run")
    release = locks.hold(place)
    monkeypatch.setattr(stored, "read", fail)
    with pytest.raises(errors.CheckpointWriteError, match="no route: nothing is saved"):
        locks.require_held(place)
    release()


def test_a_renewal_survives_a_lost_connection(monkeypatch):
    stored = Object()
    first = claim(stored)
    failures = iter([1, 1, 1])
    write = stored.write

    def failing(content, generation):
        if generation and next(failures, None):
            raise OSError("no route")
        return write(content, generation)

    monkeypatch.setattr(stored, "write", failing)
    first.acquire()
    while stored.writes < 3:
        assert first._thread.is_alive()
    first.release()
    assert stored.read() is None
