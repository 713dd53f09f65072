"""Where jobs go: what a cluster wants to know that a run's YAML does not say."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_completedp.errors import ConfigError

#: SLURM may be so much too early with the signal before a time limit.
SIGNAL_EARLY_S = 60
#: The longest lead that sbatch --signal takes.
MAX_LEAD_S = 65_535


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """Where a job of any kind is queued."""

    cpus_per_process: int = 1
    """CPU cores of each rank; of each task of an array."""
    partition: str | None = None
    """Partition to queue in; none means the cluster's default."""
    account: str | None = None
    """Account to charge; none means the user's default."""
    time_limit_hours: float | None = None
    """Of one stay in the nodes, not of the work: a job stops before it and is queued again."""
    stop_lead_s: int = 120
    """Seconds before the time limit at which a job is asked to stop; a step and a save must fit."""
    container: str | None = None
    """Image for srun --container-image (the pyxis plugin), with this package inside."""
    container_mounts: tuple[str, ...] = ()
    """Folders for srun --container-mounts, such as /data:/data; the repository must be one."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch without their dashes, such as qos=high or mem-per-cpu=4G."""

    def __post_init__(self) -> None:
        _check_at_least(1, cpus_per_process=self.cpus_per_process, stop_lead_s=self.stop_lead_s)
        self._check_times()
        if self.container_mounts and self.container is None:
            raise ConfigError(
                f"container_mounts has {self.container_mounts[0]}, but container names no image; "
                "add it, or leave the mounts out."
            )
        for option in self.sbatch:
            if not option.lstrip("-"):
                raise ConfigError(f"sbatch has {option!r}; expected an option, such as qos=high.")

    def _check_times(self) -> None:
        hours, lead = self.time_limit_hours, self.stop_lead_s
        if lead > MAX_LEAD_S:
            raise ConfigError(
                f"stop_lead_s is {lead}; expected at most {MAX_LEAD_S}, SLURM's own bound."
            )
        if hours is None:
            return
        if not 0 < hours < math.inf:
            raise ConfigError(
                f"time_limit_hours is {hours}; expected a positive number of hours, or nothing for "
                "the partition's own limit."
            )
        if hours * 3600 <= lead + SIGNAL_EARLY_S:
            raise ConfigError(
                f"time_limit_hours is {hours}, {hours * 3600:.0f} s, and stop_lead_s is {lead}: a "
                f"job would be asked to stop as soon as it starts. Expected more than {lead} + "
                f"{SIGNAL_EARLY_S} s, for SLURM may be a minute early; raise the limit or lower "
                "the lead."
            )

    @property
    def options(self) -> list[str]:
        """The options of sbatch that every kind of job has."""
        hours = self.time_limit_hours
        named = {
            "partition": self.partition,
            "account": self.account,
            # SLURM counts in minutes; half of one more would be lost.
            "time": None if hours is None else str(math.ceil(hours * 60)),
            "signal": f"TERM@{self.stop_lead_s}",
        }
        given = [f"--{name}={value}" for name, value in named.items() if value is not None]
        return given + [f"--{option.lstrip('-')}" for option in self.sbatch]

    @property
    def environment(self) -> dict[str, str]:
        """What the scripts of every kind of job read from their environment."""
        # torchrun kills ranks that have not saved by then: not before SLURM would.
        own = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(self.stop_lead_s)}
        if self.container is None:
            return own
        return {
            **own,
            "COMPLETEDP_CONTAINER": self.container,
            "COMPLETEDP_CONTAINER_MOUNTS": ",".join(self.container_mounts),
        }


@dataclass(frozen=True, kw_only=True)
class TrainSettings(JobSettings):
    """Size of a training job and where it is queued."""

    nodes: int = 1
    """Machines of a training job."""
    processes_per_node: int = 1
    """Ranks on each of them, one per GPU."""
    tries: int = 3
    """Starts in a row without a new checkpoint after which a training job is not queued again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least(
            1, nodes=self.nodes, processes_per_node=self.processes_per_node, tries=self.tries
        )

    @property
    def world_size(self) -> int:
        """Ranks of a training job."""
        return self.nodes * self.processes_per_node


@dataclass(frozen=True, kw_only=True)
class ArraySettings(JobSettings):
    """Size of an array's tasks and where they are queued."""

    gpus_per_task: int = 0
    """GPUs of each task of an array; preprocessing uses none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least(0, gpus_per_task=self.gpus_per_task)


@dataclass(frozen=True, kw_only=True)
class ClusterSettings(TrainSettings, ArraySettings):
    """What a cluster's YAML may hold: one file serves runs and arrays."""


def _check_at_least(least: int, **values: int) -> None:
    """Raise ConfigError for the first of the named values that is below `least`."""
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"{name} is {value}; expected at least {least}.")
