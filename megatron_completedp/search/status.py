"""How far a search is, its best point and its cost, as text; reads the study and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from megatron_completedp.config.load import load_config
from megatron_completedp.errors import ConfigError
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.search.ledger import ENDS, Ledger
from megatron_completedp.search.queue import begun
from megatron_completedp.search.settings import DATABASE_FILE, SearchSettings, database_url
from megatron_completedp.search.storage import connect, load_study, persist


def read_study(settings: SearchSettings, out: Path) -> optuna.Study:
    """The search's study, to be read. Raises ConfigError when it has not been started."""
    file = out / DATABASE_FILE
    if not settings.database.url and not file.exists():
        raise ConfigError(f"there is no {file}; start the search with `run`, or correct --out.")

    def read() -> optuna.Study:
        storage = connect(database_url(settings, out), settings.database)
        return load_study(storage, settings.name)

    return persist(read, settings.database)


def status(settings: SearchSettings, out: Path, *, target: str | None) -> str:
    """The lines that `search status` prints."""
    study = read_study(settings, out)
    trials = study.get_trials(deepcopy=False)
    ledger = Ledger.of(trials, ranks=settings.ranks)
    tries = ", ".join(f"{ledger.count(end)} {end}" for end in ENDS if ledger.count(end))
    lines = [
        f"study      {settings.name}: {begun(trials)} of {settings.trials} trials begun",
        f"tries      {tries or 'none'}",
        f"best       {_best(trials)}",
        f"cost       {ledger.flops:.3g} FLOPs, {ledger.device_seconds / 3600:.3g} device-hours",
    ]
    if target is not None:
        flops = Plan.of(load_config(target)).budget.flops
        lines.append(f"           {ledger.flops / flops:.3%} of the {flops:.3g} FLOPs of {target}")
    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    lines += [_running(trial) for trial in running]
    return "\n".join(lines)


def _best(trials: Sequence[FrozenTrial]) -> str:
    """The lowest single value: what the sampler holds for the best one needs repetitions."""
    values = [
        (trial.value, trial.number)
        for trial in trials
        if trial.state == TrialState.COMPLETE
        and trial.value is not None
        and not trial.user_attrs.get("diverged")
    ]
    if not values:
        return "none yet"
    value, number = min(values)
    return f"{value:.4f} (trial {number})"


def _running(trial: FrozenTrial) -> str:
    since = ""
    if trial.datetime_start is not None:
        since = f", {(datetime.now() - trial.datetime_start).total_seconds():.0f} s"
    return f"running    trial {trial.number} by {trial.user_attrs.get('worker', '?')}{since}"
