"""What a search is asked: the base run, the space around it, the sampler, and where it is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_completedp.core.multipliers import Level
from megatron_completedp.errors import ConfigError

#: The SQLite database in the output folder.
DATABASE_FILE = "study.db"
#: The trials' run folders in the output folder.
TRIALS_FOLDER = "trials"


@dataclass(frozen=True, kw_only=True)
class DatabaseSettings:
    """Where the study is kept, and when a worker or the database counts as gone."""

    url: str = ""
    """SQLAlchemy's URL, such as postgresql+psycopg://user:password@host/name; empty is study.db in
    the output folder, for workers of one machine."""
    heartbeat_s: int = 60
    """Between the signs of life that a worker writes while it trains."""
    grace_s: int = 600
    """A trial without a sign of life for so long, and one heartbeat more, has lost its worker,
    whatever its lock says."""
    retry_s: float = 300.0
    """For so long an unreachable database is tried again, less and less often."""

    def __post_init__(self) -> None:
        _require_at_least("database.heartbeat_s", self.heartbeat_s, 1)
        if self.grace_s < 2 * self.heartbeat_s:
            raise ConfigError(
                f"database.grace_s is {self.grace_s}; expected at least twice heartbeat_s = "
                f"{self.heartbeat_s}, or a worker that is a little late would lose its trial."
            )
        if not 0 <= self.retry_s < math.inf:
            raise ConfigError(f"database.retry_s is {self.retry_s}; expected 0 seconds or more.")
        if self.retry_s + self.heartbeat_s >= self.grace_s:
            raise ConfigError(
                f"database.grace_s is {self.grace_s}; expected more than retry_s + heartbeat_s = "
                f"{self.retry_s + self.heartbeat_s:g}, or a worker that waits for the database "
                "would lose its trial to another."
            )


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """A search for the hyperparameters of one base run."""

    run: str
    """YAML of the base run: the proxy with its best known values. Its data.valid decides."""
    name: str = "search"
    """Of the study in the database."""
    level: Level = "types"
    """global: one factor on each base value. types: one for each module. types_x_depth: also one
    for each layer, shared by its modules. full: one for each module and layer."""
    bounds: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: MappingProxyType({}))
    """Other bounds of a dimension, or of a kind (lr, init_std, ...): [low, high], natural logs."""
    sampler: str = "trust_region"
    """Who proposes: trust_region, random, qmc, tpe, cmaes, gp or turbo."""
    sampler_options: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Other values for the sampler's numbers, by name, such as round_size; a switch is 0 or 1."""
    trials: int = 100
    """Points to train, those that diverge included; a repeated trial does not count again."""
    seed: int = 0
    """Of the proposals. The runs' seeds count up from the base run's."""
    seeds: int = 1
    """Runs of each trial; their mean is its value."""
    retries: int = 3
    """How often a trial whose worker died is trained again. Stops by a signal do not count."""
    workers: int = 0
    """Processes of `run` that train at once; 0 is one per GPU, or per core without any."""
    ranks: int = 1
    """Processes of each single run; more than one are started with torchrun."""
    prune: bool = False
    """Stop runs that fall behind the finished ones; biases comparisons of samplers."""
    heldout: tuple[str, ...] = ()
    """Prefixes of token files that no trial sees: `recipe` reports the loss on them."""
    database: DatabaseSettings = field(default_factory=DatabaseSettings)
    """Where the study is kept."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("name is empty; expected a name for the study in its database.")
        for name, least in (("trials", 1), ("seed", 0), ("seeds", 1), ("retries", 0)):
            _require_at_least(name, getattr(self, name), least)
        for name, least in (("workers", 0), ("ranks", 1)):
            _require_at_least(name, getattr(self, name), least)


def database_url(settings: SearchSettings, out: Path) -> str:
    """The URL of the study's database; OUT/study.db unless the settings name another."""
    return settings.database.url or f"sqlite:///{out / DATABASE_FILE}"


def _require_at_least(name: str, value: Any, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} is {value}; expected at least {least}.")
