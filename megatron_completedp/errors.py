"""Errors a user can act on. Each message names the value, what was expected and what to do.

Exit codes of the commands: 0 done, 1 an error, 2 usage or configuration, 75 stopped by a signal.
"""

from __future__ import annotations

from typing import Literal

#: A run that saved and left because it was asked to: start it again. EX_TEMPFAIL of sysexits.h,
#: which no error uses and which batch systems can be told to requeue.
REQUEUE_EXIT_CODE = 75


class CompletedPError(Exception):
    """Base of every error raised for the user; commands print it without a traceback."""

    exit_code = 1


class ConfigError(CompletedPError):
    """A configuration value is unknown, malformed or contradicts another one."""

    exit_code = 2


class HyperparamError(CompletedPError):
    """A resolved hyperparameter left its valid range, e.g. a beta outside (0, 1)."""

    exit_code = 2


class ClassificationError(CompletedPError):
    """A model parameter has no role, has two, or the inventory does not add up."""


class DataError(CompletedPError):
    """An input file is missing, empty, truncated or not what its header says."""


class CheckpointError(CompletedPError):
    """A checkpoint is missing, incomplete or belongs to another run."""


class LaunchError(CompletedPError):
    """A job cannot be queued, started or queued again."""


class ConversionError(CompletedPError):
    """A model cannot be converted: its files are not whole, or the other side cannot compute it."""


class TrainingDiverged(CompletedPError):
    """A step must not become part of the model; whoever catches it decides how to go on.

    Raised before an update is applied: weights, moments and step are as they were before it.
    """

    def __init__(
        self,
        message: str,
        *,
        cause: Literal["nonfinite", "spike", "validation"],
        groups: tuple[str, ...] = (),
    ) -> None:
        """`cause`: NaN or inf in loss or gradients, a loss spike, or a non-finite validation loss.

        `groups` names the parameter groups with non-finite gradients.
        """
        super().__init__(message)
        self.cause = cause
        self.groups = groups
