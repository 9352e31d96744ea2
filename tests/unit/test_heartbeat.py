"""A process knows when it last got on, and where it stands."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import cloudpickle

from pocl_ray import heartbeat as module
from pocl_ray.heartbeat import Heartbeat


def test_age_counts_from_the_last_beat_and_stands_still_at_rest() -> None:
    now = SimpleNamespace(s=5.0)
    heartbeat = Heartbeat(lambda: now.s)
    now.s = 8.0
    assert heartbeat.process_status().age_s == 3.0
    heartbeat.beat("training")
    now.s = 10.0
    assert (heartbeat.process_status().age_s, heartbeat.process_status().doing) == (2.0, "training")
    heartbeat.rest()
    assert heartbeat.process_status().age_s == 0.0
    heartbeat.beat("again")
    assert heartbeat.process_status().age_s == 0.0


def test_the_place_is_the_line_of_ours_that_hangs_not_the_library_beneath_it() -> None:
    heartbeat, hangs, stands = Heartbeat(), threading.Event(), threading.Event()

    def code_that_hangs() -> None:
        heartbeat.beat("training")
        stands.set()
        hangs.wait()

    thread = threading.Thread(target=code_that_hangs)
    thread.start()
    stands.wait()
    seen = heartbeat.process_status()
    hangs.set()
    thread.join()
    assert "unit/test_heartbeat.py" in seen.place
    assert "code_that_hangs" in seen.place
    assert not seen.waits
    assert heartbeat.process_status().place == "a thread that is gone"


def test_what_is_sent_to_a_worker_reads_the_heartbeat_of_that_worker() -> None:
    module.beat("training")
    for function in (module.beat, module.touch, module.rest, module.process_status):
        assert cloudpickle.loads(cloudpickle.dumps(function)) is function
    assert cloudpickle.loads(cloudpickle.dumps(module.process_status))().doing == "training"
