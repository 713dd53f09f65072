"""Errors a user can act on. Each message names the value, what was expected and what to do."""


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


class TrainingDiverged(CompletedPError):
    """The loss or a gradient stopped being a finite number."""
