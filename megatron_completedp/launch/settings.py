"""Where jobs go: what a cluster wants to know that a run's YAML does not say."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_completedp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """Size of a job and where it is queued. A YAML file has these keys; flags override them."""

    nodes: int = 1
    """Machines of a training job."""
    processes_per_node: int = 1
    """Ranks on each of them, one per GPU."""
    cpus_per_process: int = 1
    """CPU cores of each rank; of each task of an array."""
    partition: str | None = None
    """Partition to queue in; none means the cluster's default."""
    account: str | None = None
    """Account to charge; none means the user's default."""
    time_limit_hours: float | None = None
    """Of one stay in the nodes, not of the run: a job saves before it and is queued again."""
    tries: int = 3
    """Starts in a row without a new checkpoint after which a job is not queued again."""
    container: str | None = None
    """Image for srun --container-image (the pyxis plugin), with this package inside."""
    container_mounts: tuple[str, ...] = ()
    """Folders for srun --container-mounts, such as /data:/data; the repository must be one."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch without their dashes, such as qos=high or mem-per-cpu=4G."""

    def __post_init__(self) -> None:
        for name in ("nodes", "processes_per_node", "cpus_per_process", "tries"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}; expected at least 1.")
        hours = self.time_limit_hours
        if hours is not None and not 0 < hours < math.inf:
            raise ConfigError(
                f"time_limit_hours is {hours}; expected a positive number of hours, or nothing for "
                "the partition's own limit."
            )
        if self.container_mounts and self.container is None:
            raise ConfigError(
                f"container_mounts has {self.container_mounts[0]}, but container names no image; "
                "add it, or leave the mounts out."
            )
        for option in self.sbatch:
            if not option.lstrip("-"):
                raise ConfigError(f"sbatch has {option!r}; expected an option, such as qos=high.")

    @property
    def world_size(self) -> int:
        """Ranks of a training job."""
        return self.nodes * self.processes_per_node

    @property
    def options(self) -> list[str]:
        """The options of sbatch that every kind of job has."""
        hours = self.time_limit_hours
        named = {
            "partition": self.partition,
            "account": self.account,
            # SLURM counts in minutes; half of one more would be lost.
            "time": None if hours is None else str(math.ceil(hours * 60)),
        }
        given = [f"--{name}={value}" for name, value in named.items() if value is not None]
        return given + [f"--{option.lstrip('-')}" for option in self.sbatch]

    @property
    def environment(self) -> dict[str, str]:
        """What the scripts of every kind of job read from their environment."""
        if self.container is None:
            return {}
        return {
            "COMPLETEDP_CONTAINER": self.container,
            "COMPLETEDP_CONTAINER_MOUNTS": ",".join(self.container_mounts),
        }
