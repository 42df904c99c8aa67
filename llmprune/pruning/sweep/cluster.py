"""Shards of a sweep as jobs of a SLURM cluster, by submitit (extra `cluster`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmprune.errors import DeviceError, MissingPackageError, RecipeError
from llmprune.pruning.sweep.ledger import JOBS_NAME
from llmprune.pruning.sweep.shards import Shard
from llmprune.pruning.sweep.sweep import sweep
from llmprune.recipe.grid import Grid
from llmprune.storage.folders import expanded

# Options that are counted, by submitit's names; all others are handed on to sbatch as they are.
_COMMON = {"time": "timeout_min", "mem_gb": "mem_gb", "cpus": "cpus_per_task", "gpus": "gpus_per_node"}


# How often a job may run out of time and continue; submitit's own limit is 3.
_TIMES = 1000


@dataclass(frozen=True)
class ShardJob:
    """One shard, as a job: called on a node, and submitted again when its time is over.

    Attributes:
        model: as for `sweep`.
        recipe: as for `sweep`.
        grid: as for `sweep`.
        output: as for `sweep`.
        shard: which part.
    """

    model: str
    recipe: str | dict[str, Any]
    grid: Grid
    output: str
    shard: Shard

    def __call__(self) -> list[str]:
        """Make the shard's runs; returns the names of those that failed."""
        return [row.name for row in sweep(self.model, self.recipe, self.grid, self.output, shard=self.shard).failed]

    def checkpoint(self) -> Any:
        """What submitit submits in place of a job that is out of time: the same, which continues."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def require_submitit() -> None:
    """Refuse a cluster without the package that talks to it.

    Raises:
        MissingPackageError: submitit is not installed.
    """
    if find_spec("submitit") is None:
        raise MissingPackageError.of("submitit", "a sweep on a cluster")


def submit(
    model: str,
    recipe: str | dict[str, Any],
    grid: Grid,
    output: str | Path,
    jobs: int,
    options: Mapping[str, str],
    cluster: str = "slurm",
) -> list[Any]:
    """Submit a sweep as a job array; nothing is waited for.

    Args:
        model: as for `sweep`; the nodes must find it under the same name.
        recipe: as for `sweep`.
        grid: as for `sweep`.
        output: as for `sweep`; on a file system that all nodes share.
        jobs: into how many shards it is cut, at least 1.
        options: of each job: time (minutes), mem_gb, cpus, gpus, and any option of sbatch, such as partition.
        cluster: "slurm", or "local": processes of this machine.

    Returns:
        submitit's jobs.

    Raises:
        MissingPackageError: submitit is not installed.
        RecipeError: an option has a wrong value.
        DeviceError: SLURM is not there, or refuses the jobs.
    """
    require_submitit()
    import submitit

    folder = expanded(output)
    try:
        executor = submitit.AutoExecutor(folder / JOBS_NAME / "%j", cluster=cluster, slurm_max_num_timeout=_TIMES)
        executor.update_parameters(**_parameters(options))
        with executor.batch():
            found = [
                executor.submit(ShardJob(model, recipe, grid, str(folder), Shard(number + 1, jobs)))
                for number in range(jobs)
            ]
    except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
        raise DeviceError(
            f"the jobs cannot be submitted: {str(error).strip().splitlines()[0]}",
            expected="a machine from which sbatch submits jobs, and options that the cluster accepts",
            fix="try the options with sbatch, or make shards by hand: llmprune sweep ... --shard 1/2",
        ) from error
    return list(found)


def _parameters(options: Mapping[str, str]) -> dict[str, Any]:
    """Submitit's parameters."""
    found: dict[str, Any] = {}
    for name in _COMMON.keys() & options.keys():
        if not options[name].isdecimal():
            raise RecipeError(f"--slurm {name}={options[name]}", expected="a whole number")
        found[_COMMON[name]] = int(options[name])
    if own := {name: value for name, value in options.items() if name not in _COMMON}:
        found["slurm_additional_parameters"] = own
    return found
