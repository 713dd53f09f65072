"""A finished search whose trials a surrogate made up, for the unit and the browser tests."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import optuna

from megatron_completedp.config.load import build
from megatron_completedp.core.multipliers import Level
from megatron_completedp.search.access import Search
from megatron_completedp.search.samplers import make_sampler
from megatron_completedp.search.settings import SearchSettings
from megatron_completedp.search.surrogate import Surrogate, Valley
from megatron_completedp.search.trials_file import FILE, write_export

RUN = Path(__file__).parents[1] / "examples/search/base.yaml"
NOISE = 0.004
#: What the dimensions that matter are worth, and where runs diverge.
STEEP = Valley(low=-2, high=2, slope=-0.05, curvature=0.03, cliff_high=1.2)
FLAT = Valley(low=-2, high=2, slope=0.0, curvature=0.002)


def search(
    out: Path, *, level: Level = "types", sampler: str = "trust_region", **options: float
) -> Search:
    """Its settings, over examples/search/base.yaml; `options` are the sampler's."""
    settings = {"run": str(RUN), "level": level, "sampler": sampler, "sampler_options": options}
    return Search(build(SearchSettings, settings), out)


def surrogate_of(names: tuple[str, ...]) -> Surrogate:
    """Every tenth dimension is steep, the first included."""
    valleys = {name: FLAT if index % 10 else STEEP for index, name in enumerate(names)}
    return Surrogate(level=3.5, noise=NOISE, ceiling=math.log(1024), valleys=valleys)


def finished_study(of: Search, trials: int, *, still: bool = False, seed: int = 0) -> optuna.Study:
    """`trials` trials on the surrogate (`still`: on noise alone), exported into the search's out.

    The last one is still running.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    objective, settings = of.objective(), of.settings
    space = objective.space
    surrogate = surrogate_of(space.names)
    sampler = make_sampler(
        settings.sampler,
        seed=0,
        space=space.distributions(),
        **space.trust_region(),
        settings=settings.sampler_options,
    )
    study = optuna.create_study(sampler=sampler, study_name="sample")
    study.set_user_attr("identity", json.loads(json.dumps(of.identity())))
    study.set_user_attr("code", ["0.1.0"])
    study.set_user_attr("folder", "secret")
    noise = np.random.default_rng(seed)
    for _ in range(trials):
        trial = study.ask(space.distributions())
        point = dict.fromkeys(space.names, 0.0) if still else trial.params
        diverged, loss = surrogate.diverges(point), surrogate.observe(point, noise)
        facts = {
            "diverged": diverged,
            "losses": [None if diverged else loss],
            "configs": ["trials/secret.yaml"],
            "worker": "secret-host",
            "seconds": 13.0,
            "steps": 200,
            "tokens": 204_800,
            "flops": 2.8e11,
        }
        for name, item in facts.items():
            trial.set_user_attr(name, item)
        study.tell(trial, loss)
    study.ask(space.distributions())
    of.out.mkdir(parents=True, exist_ok=True)
    write_export(study, of.out / FILE)
    return study
