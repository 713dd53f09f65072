"""The configuration of one run: every section, and what the sections must agree on."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_completedp.config.parallel import ParallelConfig, check_layout
from megatron_completedp.config.schema import FROM_FILE, INLINE
from megatron_completedp.config.sections import (
    CheckpointConfig,
    DataConfig,
    DivergenceConfig,
    EvalConfig,
    LoggingConfig,
    RecipeOrigin,
    TrainingConfig,
)
from megatron_completedp.core.hyperparams import BaseHyperparams
from megatron_completedp.core.multipliers import Multipliers
from megatron_completedp.core.ratios import Ratios, Scale, ratios_between
from megatron_completedp.core.schedule import Schedule
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.core.tables import Rules
from megatron_completedp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that defines a run. A YAML file has these sections; flags override its values."""

    run_dir: str
    """Folder of the run: resolved config, metrics.jsonl, checkpoints."""
    seed: int = 1234
    """Seeds the initial weights and the order of the data."""
    recipe: RecipeOrigin | None = field(default=None, metadata=FROM_FILE)
    """File of a search's result: it brings the rules, base, hyperparams and multipliers."""
    rules: Rules = field(default_factory=Rules, metadata=INLINE)
    """Parametrization and its switches; their keys stand at the top level of the file."""
    base: Scale | None = None
    """Where the hyperparameters were tuned; none means here, so that every ratio is 1."""
    hyperparams: BaseHyperparams
    """Values tuned at the base."""
    multipliers: Multipliers = field(default_factory=Multipliers)
    """Per-module factors found by the search."""
    model: ModelShape
    """Shape of the model."""
    schedule: Schedule = field(default_factory=Schedule)
    """Shape of the learning rate over the run."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the run is split over ranks."""
    training: TrainingConfig
    """Batch, length and numerics."""
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    """What happens to a step that went wrong."""
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    """When the validation loss is measured."""
    data: DataConfig = field(default_factory=DataConfig)
    """Tokenized text."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are written."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """What is reported while training."""

    @property
    def batch_tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.training.global_batch_size * self.model.seq_length

    @property
    def train_tokens(self) -> int:
        """Tokens the run was asked for; m_D is their ratio to the base's."""
        tokens = self.training.train_tokens
        return tokens if tokens is not None else self.steps * self.batch_tokens

    @property
    def steps(self) -> int:
        """Optimizer steps: train_tokens / batch_tokens, rounded up, or train_steps as given."""
        if self.training.train_tokens is not None:
            return -(-self.training.train_tokens // self.batch_tokens)
        assert self.training.train_steps is not None, "TrainingConfig requires one of the two"
        return self.training.train_steps

    @property
    def scale(self) -> Scale:
        """Where this run stands on the four axes; write it into another run's `base`."""
        return Scale(
            hidden_size=self.model.hidden_size,
            ffn_hidden_size=self.model.ffn_hidden_size,
            num_attention_heads=self.model.num_attention_heads,
            head_dim=self.model.head_dim,
            num_layers=self.model.num_layers,
            batch_tokens=self.batch_tokens,
            train_tokens=self.train_tokens,
        )

    @property
    def ratios(self) -> Ratios:
        """This run over its base; all exactly 1 for a run that is its own base."""
        return Ratios() if self.base is None else ratios_between(self.base, self.scale)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; expected 0 or more.")
        check_layout(self.model, self.parallel)
        self._check_length()
        # Width, heads and d_ff must have grown together from the base: raises when they have not.
        _ = self.ratios
        base_layers = self.base.num_layers if self.base else self.model.num_layers
        self.multipliers.check_depth(base_layers)

    def _check_length(self) -> None:
        tokens, steps = self.training.train_tokens, self.training.train_steps
        batch = f"batch of {self.training.global_batch_size} x {self.model.seq_length} tokens"
        if tokens is not None and tokens < self.batch_tokens:
            raise ConfigError(
                f"training.train_tokens is {tokens}, less than one {batch} = {self.batch_tokens}; "
                "train longer or use a smaller batch."
            )
        if tokens is not None and steps is not None and steps != self.steps:
            raise ConfigError(
                f"training.train_steps is {steps}, but training.train_tokens = {tokens} with a "
                f"{batch} is {self.steps} steps; leave one of the two out."
            )


def check_world(config: RunConfig, world_size: int) -> None:
    """Raise ConfigError, naming the fix, when `world_size` ranks cannot run `config`.

    Megatron's interleaved pipeline schedule takes microbatches in groups of the pipeline size, so
    with virtual stages both the batch and the evaluation must fill whole groups on every rank.
    """
    parallel, training = config.parallel, config.training
    replica = parallel.model_parallel_size
    if world_size % replica:
        raise ConfigError(
            f"the world size is {world_size}, which tensor_model_parallel_size x "
            f"pipeline_model_parallel_size = {parallel.tensor_model_parallel_size} x "
            f"{parallel.pipeline_model_parallel_size} = {replica} does not divide; start a "
            f"multiple of {replica} ranks or change the layout."
        )
    data_parallel = world_size // replica
    unit = training.micro_batch_size * data_parallel
    meaning = f"micro_batch_size x data-parallel ranks = {training.micro_batch_size}"
    meaning += f" x {data_parallel}"
    if parallel.virtual_pipeline_model_parallel_size is not None:
        unit *= parallel.pipeline_model_parallel_size
        meaning += f", x {parallel.pipeline_model_parallel_size} pipeline stages (interleaved)"
    counts = [("training.global_batch_size", training.global_batch_size)]
    if config.evaluation.interval:
        counts.append(("evaluation.samples", config.evaluation.samples))
    for name, value in counts:
        if value % unit:
            raise ConfigError(
                f"{name} is {value}; expected a multiple of {unit} ({meaning}), e.g. "
                f"{max(value // unit, 1) * unit}."
            )
