"""One training step on Megatron: forward and backward in any layout, clipping, update, schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model

from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.hyperparams import Resolved
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import TrainingDiverged
from megatron_completedp.mcore.classify import ClassifiedParameter, classify_model
from megatron_completedp.mcore.data_parallel import (
    connect_schedules,
    synchronous_parameters,
    wrap_chunks,
)
from megatron_completedp.mcore.groups import groups_with_nonfinite_gradients, hyperparam_groups
from megatron_completedp.mcore.init import initialize_parameters
from megatron_completedp.mcore.inventory import (
    Inventory,
    check_inventory,
    inventory,
    sum_inventories,
)
from megatron_completedp.mcore.model import LanguageModel, build_model
from megatron_completedp.mcore.optimizer import (
    apply_update,
    build_optimizer,
    build_scheduler,
    gradient_norm,
)
from megatron_completedp.mcore.platform import Platform

#: A micro batch: `tokens` and `labels`, int64 of shape (micro_batch_size, seq_length).
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, equal on every rank."""

    loss: float
    """Mean cross entropy of the global batch in nats per token, without z-loss."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    """Learning rate of this step as a part of each module's peak."""


class Engine:
    """A model, its optimizer and its schedule, wrapped for the run's layout."""

    def __init__(self, config: RunConfig, resolved: Resolved, platform: Platform) -> None:
        """Build, initialize and wrap the model of `config`; needs `initialize_parallel`."""
        self.config = config
        self.resolved = resolved
        self.device = platform.device
        chunks = build_model(
            config.model,
            config.parallel,
            platform=platform,
            precision=config.training.precision,
            residual=resolved.residual,
            logit_multiplier=resolved.logit_multiplier,
            z_loss=config.training.z_loss,
        )
        self.parameters: tuple[ClassifiedParameter, ...] = classify_model(
            chunks, config.model, config.parallel
        )
        self.inventory = _whole_inventory(self.parameters, config.model)
        initialize_parameters(
            self.parameters,
            config.model,
            lambda module, layer: resolved.get(module, layer).init_std,
            seed=config.seed,
        )
        self.groups = hyperparam_groups(resolved)
        self.chunks = wrap_chunks(chunks, config.parallel)
        self.optimizer = build_optimizer(
            self.chunks,
            self.parameters,
            self.groups,
            precision=config.training.precision,
            parallel=config.parallel,
            schedule=config.schedule,
        )
        self.scheduler = build_scheduler(self.optimizer, config.schedule, config.steps)
        connect_schedules(self.chunks, self.optimizer, config.parallel)
        self._forward_backward = get_forward_backward_func()
        self.stop_requested: Callable[[], bool] = lambda: False
        """Whether this rank was asked to stop; asked once in every step and evaluation."""
        self.stop_agreed = False
        """Whether any rank had been, at the last step or evaluation; the same on every rank."""
        self.loop_state: dict[str, Any] = {}
        """JSON values that the training loop finds in a checkpoint again."""

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return self.scheduler.num_steps

    def move_to(self, step: int) -> None:
        """Take `step` steps as finished: the learning rate follows, weights and moments stay."""
        self.scheduler.num_steps = 0
        self.scheduler.step(step)

    def train_step(self, batches: Sequence[Batch], *, loss_limit: float = math.inf) -> StepResult:
        """One optimizer step over this rank's micro batches.

        Raises TrainingDiverged before any weight, moment or count moves, on every rank alike: when
        the loss or the gradient norm is not finite, naming the step and the groups with non-finite
        gradients, or when the loss is above `loss_limit` nats per token.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = self._run(batches, forward_only=False)
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}")
        if loss > loss_limit:
            raise TrainingDiverged(
                f"step {self.step + 1}: the loss is {loss:.4f}, a spike above {loss_limit:.4f}.",
                cause="spike",
            )
        lr = self.config.schedule.at(self.step, self.config.steps)
        grad_norm = gradient_norm(self.optimizer)
        # Data-parallel ranks norm copies of the same gradients, each for itself, and one of them
        # may be damaged: the sum is finite where all are, and the same on every rank.
        norms = torch.tensor(grad_norm, dtype=torch.float64, device=self.device)
        dist.all_reduce(norms)
        if not math.isfinite(norms):
            raise self._diverged(f"the gradient norm is {norms.item()} at a loss of {loss:.4f}")
        apply_update(self.optimizer, norm=grad_norm, clip_grad=self.config.training.clip_grad)
        self.scheduler.step(1)
        return StepResult(loss=loss, grad_norm=grad_norm, lr=lr)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Mean cross entropy over `batches` in nats per token, without z-loss."""
        with synchronous_parameters(self.chunks, self.config.parallel):
            for chunk in self.chunks:
                chunk.eval()
            try:
                return self._run(batches, forward_only=True)
            finally:
                for chunk in self.chunks:
                    chunk.train()

    def _run(self, batches: Sequence[Batch], *, forward_only: bool) -> float:
        iterators = [iter(batches) for _ in self.chunks]
        outputs = self._forward_backward(
            forward_step_func=self._forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=self.config.model.seq_length,
            micro_batch_size=self.config.training.micro_batch_size,
            forward_only=forward_only,
        )
        return self._agree(outputs)

    def _agree(self, outputs: Sequence[dict[str, torch.Tensor]]) -> float:
        """The mean loss over all ranks, and in the same collective whether to stop."""
        sums = torch.zeros(2, device=self.device)
        # Only the last stage has losses, and its TP ranks have the same ones: one of them counts.
        if outputs and parallel_state.get_tensor_model_parallel_rank() == 0:
            sums[0] = torch.stack([output["loss"] for output in outputs]).mean()
        # Asked now, not before the step: a signal that comes during it ends it.
        sums[1] = self.stop_requested()
        dist.all_reduce(sums)
        loss, requests = sums.tolist()
        self.stop_agreed = self.stop_agreed or requests > 0
        return loss / parallel_state.get_data_parallel_world_size()

    def _forward_step(self, batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
        batch = next(batches)
        tokens = batch["tokens"].to(self.device, non_blocking=True)
        labels = batch["labels"].to(self.device, non_blocking=True)
        # Rotary embeddings need no position ids and causal attention no mask.
        output = model(tokens, None, None, labels=labels)
        return output, partial(_mean_loss, unwrap_model(model))

    def _diverged(self, what: str) -> TrainingDiverged:
        mine = groups_with_nonfinite_gradients(self.parameters, self.groups)
        gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, mine)
        bad = {name for names in gathered for name in names}
        names = tuple(group.name for group in self.groups if group.name in bad)
        where = "every group" if len(names) == len(self.groups) else " and ".join(names) or "none"
        return TrainingDiverged(
            f"step {self.step + 1}: {what}. Groups with non-finite gradients: {where}.",
            cause="nonfinite",
            groups=names,
        )


def _mean_loss(
    model: LanguageModel, per_token: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss to differentiate, and the cross entropy to report; the last stage alone calls it."""
    assert model.cross_entropy is not None
    return per_token.mean(), {"loss": model.cross_entropy.mean()}


def _whole_inventory(parameters: Sequence[ClassifiedParameter], shape: ModelShape) -> Inventory:
    """Elements by (module, layer) over the ranks of this model replica.

    Raises ClassificationError unless they are exactly those of `shape`.
    """
    group = parallel_state.get_model_parallel_group()
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (place, inventory(parameters)), group=group)
    # Sorted, because the ranks of a stage are compared with its TP rank 0.
    total = sum_inventories(dict(sorted(gathered, key=lambda item: item[0])))
    check_inventory(total, shape)
    return total
