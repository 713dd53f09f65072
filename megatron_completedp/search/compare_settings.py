"""What `search compare` is asked: finished studies of one space, a surrogate, equal budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from megatron_completedp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Samplers at equal budget: on a surrogate, and by the points that real searches held."""

    run: str = ""
    """YAML of the base run of the studies."""
    studies: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    """The trials.jsonl of each sampler's studies, one per repeat; none leaves real training out,
    and the surrogate is a synthetic one."""
    judged: str = "trust_region"
    """The sampler that the verdict is about."""
    budgets: tuple[int, ...] = (50, 100)
    """Trials after which the best point of each study is trained again."""
    heldout: tuple[str, ...] = ()
    """Prefixes of token files to evaluate it on, which no search chose by."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """It is trained with each of these seeds, of which no trial may have had one."""
    samplers: tuple[str, ...] = ("trust_region", "random", "qmc", "tpe", "cmaes")
    """Those to run on the surrogate."""
    runs: int = 200
    """Runs of each on the surrogate."""
    repeats: int = 5
    """Repeats of these, with other seeds; 3 or more."""
    workers: int = 0
    """Processes that train at once; 0 is one per GPU, or per core without any."""
    ranks: int = 1
    """Processes of each single run; more than one are started with torchrun."""

    def __post_init__(self) -> None:
        for named, where in ((self.samplers, "samplers"), (self.studies, "studies")):
            if named and (self.judged not in named or len(named) < 2):
                raise ConfigError(
                    f"{where} has {', '.join(named)}; expected {self.judged} (judged) and another."
                )
        if self.repeats < 3 or self.runs < 1:
            raise ConfigError(
                f"repeats is {self.repeats} and runs {self.runs}; expected at least 3 and 1."
            )
        if self.studies and not (self.run and self.heldout and self.seeds and self.budgets):
            raise ConfigError(
                "studies are given, but run, heldout, seeds or budgets is empty; their best points "
                "are trained again to compare them on text that they were not chosen by."
            )
        if empty := [name for name, paths in self.studies.items() if not paths]:
            raise ConfigError(
                f"studies.{empty[0]} is empty; name the trials.jsonl of its studies, or leave it "
                "out."
            )
        counts = {name: len(paths) for name, paths in self.studies.items()}
        if any(count > 1 for count in counts.values()) and min(counts.values()) < 2:
            raise ConfigError(
                f"studies has {', '.join(f'{count} of {name}' for name, count in counts.items())}; "
                "one study's seeds are no match for several studies: expected one of each sampler, "
                "or at least two of each."
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds is {list(self.seeds)}; expected different seeds.")
        if self.workers < 0 or self.ranks < 1:
            raise ConfigError(
                f"workers is {self.workers} and ranks {self.ranks}; expected at least 0 and 1."
            )
        if self.budgets and min(self.budgets) < 1:
            raise ConfigError(f"budgets is {list(self.budgets)}; expected trials, 1 or more.")
