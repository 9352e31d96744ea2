"""A run from Python: the same steps, in the same directory, as `pocl-ray run`.

Heavy imports are inside the function, so that a wrong key of a config answers at once.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from pocl_ray.config import Config
from pocl_ray.errors import GaveUpError, UserError
from pocl_ray.ray_cluster.startup import collect_again, put_off_collections

if TYPE_CHECKING:
    from pocl_ray.run_directory.storage import RunDirectory


def run_until(config: Config, step: str = "report", resume_with_changes: bool = False) -> RunDirectory:
    """Do a step and all steps that it depends on; finished steps are not done again.

    It uses the Ray that this process is connected to, or else the cluster that `RAY_ADDRESS` names, or else one of its
    own on this machine, which ends with the call.

    Args:
        config: Config of the run.
        step: Property of `Pipeline`: `ranking` (scores and ranks), `distilled`, `tasks` (everything but the report) or
            `report`.
        resume_with_changes: Whether to go on in a directory whose config differs; affected steps run again.

    Returns:
        The run directory.

    Raises:
        UserError: An input is missing or does not fit, or the directory belongs to another config.
        GaveUpError: A step failed more often than `scaling.max_failures` allows.
    """
    put_off_collections()
    from pocl_ray.pipeline import Pipeline
    from pocl_ray.ray_cluster.session import ray_session
    from pocl_ray.run_directory.disk import machine_fault

    collect_again()
    with ExitStack() as stack:

        def connect() -> None:
            stack.enter_context(ray_session())
            stack.callback(pipeline.trainings.close)  # what runs in the background ends before Ray does

        pipeline = Pipeline(config, resume_with_changes, connect)
        stack.callback(pipeline.close)
        try:
            getattr(pipeline, step)
        except UserError:
            pipeline.withdraw()
            raise
        except GaveUpError:
            raise
        except Exception as error:  # libraries in Rust report a full disk as an error of their own
            if fault := machine_fault(error, "the run writes"):
                raise fault from None
            raise
    return pipeline.run_dir
