"""What `search transfer` is asked: recipes, the sizes to carry them to, how long to train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_completedp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SizeSettings:
    """One size, as multiples of the base run's, trained for several durations."""

    width: float = 1.0
    """Multiple of the hidden size, in whole heads."""
    depth: float = 1.0
    """Multiple of the layers."""
    batch: float = 1.0
    """Multiple of the sequences per step."""
    durations: tuple[float, ...]
    """Multiples of the base run's tokens; each is a run of its own, with its own schedule."""
    reference: float
    """The one of them whose loss, with the baseline, the others are to reach with fewer tokens."""
    least_ratio: float = 1.0
    """Least token ratio that passes; 1 is as many tokens as the baseline."""

    def __post_init__(self) -> None:
        if len(set(self.durations)) < 2 or min(self.durations) <= 0:
            raise ConfigError(
                f"durations is {list(self.durations)}; expected two or more different multiples "
                "above 0, between which the loss is interpolated."
            )
        if self.reference not in self.durations:
            raise ConfigError(
                f"reference is {self.reference:g}; expected one of the durations "
                f"{', '.join(f'{each:g}' for each in self.durations)}."
            )
        if not self.least_ratio > 0:
            raise ConfigError(f"least_ratio is {self.least_ratio}; expected a positive number.")


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """Recipes of one base, carried to larger sizes in the same way."""

    run: str
    """YAML of the base run, at which every recipe was tuned."""
    recipes: Mapping[str, str]
    """Recipe files by name, the baseline's too; "" is the base run's own numbers."""
    baseline: str = "global"
    """The recipe that the others are held against."""
    judged: str = "recipe"
    """The recipe that the verdict is about."""
    sizes: Mapping[str, SizeSettings]
    """Sizes by name, from small to large."""
    heldout: tuple[str, ...]
    """Prefixes of token files to evaluate on, which no search chose by."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Each run is trained with each of these seeds (initial weights and order of the data)."""
    workers: int = 0
    """Processes that train at once; 0 is one per GPU, or per core without any."""
    ranks: int = 1
    """Processes of each single run; more than one are started with torchrun."""

    def __post_init__(self) -> None:
        for name, value in (("baseline", self.baseline), ("judged", self.judged)):
            if value not in self.recipes:
                raise ConfigError(
                    f"{name} is {value!r}; expected one of the recipes {', '.join(self.recipes)}."
                )
        if self.baseline == self.judged:
            raise ConfigError(
                f"baseline and judged are both {self.judged!r}; name two different recipes."
            )
        if not self.sizes:
            raise ConfigError("sizes is empty; give the sizes to train.")
        if not self.heldout:
            raise ConfigError(
                "heldout is empty; name token files that no search chose by, or the recipe would "
                "be reported by what it was chosen by."
            )
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise ConfigError(f"seeds is {list(self.seeds)}; expected different seeds, at least 1.")
        if self.workers < 0 or self.ranks < 1:
            raise ConfigError(
                f"workers is {self.workers} and ranks {self.ranks}; expected at least 0 and 1."
            )
