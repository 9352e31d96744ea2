"""Ray's text about a process that died becomes one line without ids."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError

from pocl_ray.ray_cluster.ray_errors import MAX_CHARS, explain_death, one_line

HEAD = """The actor died unexpectedly before finishing this task.
\tclass_name: RayTrainWorker
\tactor_id: 0123456789abcdef
\tpid: 17
"""
ENDED = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            ENDED + "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include",
            "its process was killed or crashed (out of memory, perhaps)",
        ),
        (
            ENDED + "Task was killed due to the node running low on memory.",
            "Task was killed due to the node running low on memory.",
        ),
        (
            "The actor died because its node has died.\n\tNode Id: 0123456789abcdef",
            "The actor died because its node has died.",
        ),
    ],
)
def test_the_reason_of_a_death_is_told_without_ids(said: str, expected: str) -> None:
    error = ActorDiedError()
    error.error_msg = HEAD + said
    assert explain_death(error) == expected


def test_a_long_text_is_cut_to_one_line() -> None:
    assert one_line("a\n  b\tc") == "a b c"
    cut = one_line("word " * 100)
    assert len(cut) == MAX_CHARS and cut.endswith("...")
