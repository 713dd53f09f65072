"""The layouts of a run on some GPUs, best first."""

from __future__ import annotations

from megatron_completedp.config.run import RunConfig
from megatron_completedp.errors import ConfigError
from megatron_completedp.plan.devices import Device
from megatron_completedp.plan.layouts import TIE, Layout, Ranking, complexity, every_layout
from megatron_completedp.plan.words import why_none_divides, why_none_fits


def rank_layouts(
    config: RunConfig, device: Device, *, gpus: int, utilization: float = 0.4
) -> Ranking:
    """Every layout of `config`'s model and batch on `gpus` GPUs, ranked by step time.

    Those are the layouts of `every_layout`; optimizer state is sharded and its communication
    overlapped where there are data-parallel ranks. Among step times that differ by less than the
    estimate is good for, the simpler layout wins.

    Raises ConfigError for numbers out of range, a precision without a GPU peak, a world that no
    layout divides, and a model that fits in none: by how much, and what would fit.
    """
    if gpus < 1:
        raise ConfigError(f"--gpus is {gpus}; expected at least 1.")
    if not 0 < utilization <= 1:
        raise ConfigError(f"--utilization is {utilization}; expected more than 0 and at most 1.")
    if config.training.precision != "bf16":
        raise ConfigError(
            f"training.precision is {config.training.precision}; GPU estimates are for bf16. Add "
            "--training.precision bf16."
        )
    layouts = list(every_layout(config, device, gpus, utilization))
    if not layouts:
        raise ConfigError(why_none_divides(config, gpus))
    fitting = sorted((layout for layout in layouts if layout.fits), key=_preference)
    too_large = sorted(
        (layout for layout in layouts if not layout.fits), key=lambda layout: layout.memory.total
    )
    if not fitting:
        raise ConfigError(why_none_fits(config, device, gpus, too_large[0]))
    fastest = fitting[0].cost.step_s
    ties = [layout for layout in fitting if layout.cost.step_s <= TIE * fastest]
    best = min(ties, key=complexity)
    fitting.remove(best)
    return Ranking(
        device=device,
        gpus=gpus,
        utilization=utilization,
        steps=config.steps,
        fitting=(best, *fitting),
        too_large=tuple(too_large),
    )


def _preference(layout: Layout) -> tuple[float, tuple[int, ...]]:
    return layout.cost.step_s, complexity(layout)
