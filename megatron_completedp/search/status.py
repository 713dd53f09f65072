"""How far a search is, its best point and its cost, as text; reads the study and nothing else."""

from __future__ import annotations

import math
from datetime import datetime

import optuna
from optuna.trial import FrozenTrial, TrialState

from megatron_completedp.search.attributes import WORKER
from megatron_completedp.search.incumbent import incumbent
from megatron_completedp.search.ledger import ENDS, Ledger
from megatron_completedp.search.queue import begun
from megatron_completedp.search.settings import SearchSettings


def status(study: optuna.Study, settings: SearchSettings, *, target: str | None) -> str:
    """The lines that `search status` prints; `target` is the YAML of the run it is all for."""
    trials = study.get_trials(deepcopy=False)
    ledger = Ledger.of(trials, ranks=settings.ranks)
    tries = ", ".join(f"{ledger.count(end)} {end}" for end in ENDS if ledger.count(end))
    lines = [
        f"study      {settings.name}: {begun(trials)} of {settings.trials} trials begun",
        f"tries      {tries or 'none'}",
        f"best       {_best(study)}",
        f"cost       {ledger.flops:.3g} FLOPs, {ledger.device_seconds / 3600:.3g} device-hours",
    ]
    if target is not None:
        share, flops = ledger.share_of(target)
        lines.append(f"           {share:.3%} of the {flops:.3g} FLOPs of {target}")
    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    lines += [_running(trial) for trial in running]
    return "\n".join(lines)


def _best(study: optuna.Study) -> str:
    best = incumbent(study)
    if best is None:
        return "none yet"
    runs = len(best.trials)
    known = not math.isnan(best.standard_error)
    error = f" +- {best.standard_error:.4f} (standard error)" if known else ""
    diverged = f", {best.diverged} more diverged" if best.diverged else ""
    where = f"trial {best.trials[0]}, run {runs} times{diverged}"
    return f"{best.loss:.4f}{error} nats/token ({where})"


def _running(trial: FrozenTrial) -> str:
    since = ""
    if trial.datetime_start is not None:
        since = f", {(datetime.now() - trial.datetime_start).total_seconds():.0f} s"
    return f"running    trial {trial.number} by {trial.user_attrs.get(WORKER, '?')}{since}"
