"""The sbatch command of a job, and what is checked before it is queued."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_completedp.config.run import RunConfig, check_world
from megatron_completedp.errors import ConfigError, LaunchError
from megatron_completedp.launch import slurm
from megatron_completedp.launch.attempts import Attempts
from megatron_completedp.launch.settings import ClusterSettings
from megatron_completedp.plan.cost import step_cost
from megatron_completedp.plan.devices import Device
from megatron_completedp.plan.layouts import USABLE_MEMORY, Layout
from megatron_completedp.plan.memory import Workload, peak_memory
from megatron_completedp.plan.ranking import rank_layouts
from megatron_completedp.plan.words import describe
from megatron_completedp.train import folder as run_folder

#: What slurm_array.sbatch runs in every task, by the word that selects it.
ARRAY_COMMANDS = {
    "preprocess": ("-m", "megatron_completedp.data", "preprocess"),
    "ladder": ("-m", "megatron_completedp.check", "transfer"),
    "search": ("-m", "megatron_completedp.search", "worker"),
}


@dataclass(frozen=True)
class Submission:
    """An sbatch command with the environment that its script reads."""

    command: tuple[str, ...]
    environment: dict[str, str]
    folder: Path | None = None
    """Of the job's log, which SLURM does not make."""

    def __str__(self) -> str:
        """As one would type it."""
        made = "" if self.folder is None else f"mkdir -p {shlex.quote(str(self.folder))} && "
        return made + slurm.command_text(self.command, self.environment)

    def submit(self) -> str:
        """Queue the job; its number. Raises LaunchError when that is refused."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        return slurm.submit(self.command, self.environment)


def training_job(
    config: RunConfig, cluster: ClusterSettings, arguments: Sequence[str]
) -> Submission:
    """The job that trains `config`; `arguments` are those of the training command that say so."""
    run_dir = Path(config.run_dir)
    folder = run_dir / run_folder.LAUNCH
    command = [
        "sbatch",
        "--parsable",
        f"--job-name={run_dir.name}",
        f"--comment={slurm.comment(run_dir)}",
        f"--output={folder / 'job-%j.log'}",
        f"--nodes={cluster.nodes}",
        f"--cpus-per-task={cluster.processes_per_node * cluster.cpus_per_process}",
        *_gpus(0 if config.training.device == "cpu" else cluster.processes_per_node),
        *cluster.options,
        str(slurm.script("slurm.sbatch")),
        *arguments,
    ]
    environment = {
        **_environment(cluster),
        "COMPLETEDP_PROCESSES": str(cluster.processes_per_node),
        "COMPLETEDP_TRIES": str(cluster.tries),
    }
    return Submission(tuple(command), environment, folder)


def array_job(tasks: int, cluster: ClusterSettings, arguments: Sequence[str]) -> Submission:
    """An array of `tasks` tasks that all run the command that `arguments` begin with.

    Raises ConfigError for a number below 1 and for a word that is no command of an array.
    """
    if tasks < 1:
        raise ConfigError(f"--tasks is {tasks}; expected at least 1.")
    if not arguments or arguments[0] not in ARRAY_COMMANDS:
        raise ConfigError(
            f"an array's command is {' '.join(arguments[:1]) or 'missing'}; expected after -- one "
            f"of {', '.join(ARRAY_COMMANDS)} and its flags."
        )
    command = [
        "sbatch",
        "--parsable",
        f"--job-name={arguments[0]}",
        f"--array=0-{tasks - 1}",
        f"--cpus-per-task={cluster.cpus_per_process}",
        # A task is on one node.
        *_gpus(cluster.gpus_per_task),
        *cluster.options,
        str(slurm.script("slurm_array.sbatch")),
        *arguments,
    ]
    return Submission(tuple(command), _environment(cluster))


def check_queue(config: RunConfig) -> None:
    """Raise LaunchError if a job of this run waits or runs: two would write over one another."""
    starts = Attempts(Path(config.run_dir)).all
    for job in slurm.jobs_of(Path(config.run_dir), starts[-1].job if starts else None) or ():
        raise LaunchError(
            f"job {job.number} of {config.run_dir} is {job.state} {job.where}; two jobs would "
            f"write over one another. Wait for it, or scancel {job.number} first."
        )


def layout_text(config: RunConfig, cluster: ClusterSettings) -> str:
    """How the run is split over the job's ranks. Raises ConfigError if they do not divide it."""
    check_world(config, cluster.world_size)
    parallel, work = config.parallel, _workload(config, cluster)
    chunks = parallel.virtual_pipeline_model_parallel_size
    return (
        f"{cluster.nodes} nodes x {cluster.processes_per_node} processes = {cluster.world_size} "
        f"ranks: TP {parallel.tensor_model_parallel_size}, "
        f"PP {parallel.pipeline_model_parallel_size}{f' x VPP {chunks}' if chunks else ''}, "
        f"DP {work.data_parallel_size}; {work.micro_batches} micro batches of "
        f"{work.micro_batch_size} sequences a step"
    )


def estimate_text(
    config: RunConfig, cluster: ClusterSettings, device: Device, utilization: float
) -> str:
    """Memory and time of the run in its layout on `device`, by `plan`'s formulas.

    Raises ConfigError as `rank_layouts` does, and when this layout does not fit: by how much, and
    the one that `plan` recommends.
    """
    work, parallel = _workload(config, cluster), config.parallel
    ranking = rank_layouts(config, device, gpus=cluster.world_size, utilization=utilization)
    layout = Layout(
        parallel=parallel,
        workload=work,
        memory=peak_memory(config.model, parallel, work),
        cost=step_cost(config.model, parallel, work, device, utilization=utilization),
        limit_bytes=USABLE_MEMORY * device.memory_bytes,
    )
    needed, usable = layout.memory.total / 1e9, layout.limit_bytes / 1e9
    if not layout.fits:
        raise ConfigError(
            f"{describe(layout)} needs {needed:.1f} GB a GPU, {needed - usable:.1f} GB more than "
            f"the {usable:.1f} GB of {device.name} that are usable. {describe(ranking.best)} "
            f"fits: {ranking.best.flags}"
        )
    step_s = layout.cost.step_s
    return (
        f"{needed:.1f} of {usable:.1f} GB a GPU ({device.name}), {step_s:.3g} s a step, "
        f"{config.steps * step_s / 3600:.3g} h, {ranking.gpu_hours(layout):,.4g} GPU-hours at "
        f"utilization {utilization:g}, without saves and waiting"
    )


def _gpus(on_each_node: int) -> list[str]:
    return [f"--gpus-per-node={on_each_node}"] if on_each_node else []


def _environment(cluster: ClusterSettings) -> dict[str, str]:
    """The checkout and the interpreter that submit are those that run, unless in a container."""
    own = {} if cluster.container else {"COMPLETEDP_VENV": sys.prefix}
    return {"COMPLETEDP_ROOT": str(slurm.repository()), **own, **cluster.environment}


def _workload(config: RunConfig, cluster: ClusterSettings) -> Workload:
    training = config.training
    replicas = cluster.world_size // config.parallel.model_parallel_size
    return Workload(
        data_parallel_size=replicas,
        micro_batch_size=training.micro_batch_size,
        micro_batches=training.global_batch_size // (training.micro_batch_size * replicas),
        precision=training.precision,
    )
