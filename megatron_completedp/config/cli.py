"""Flags over YAML over defaults, merged before anything is checked.

The flags are generated from the config dataclasses: `--section.field-name` with the field's
docstring as help, and Megatron's flat name where it has one. Per-module factors
(`multipliers.types` and `.layers`) are found by the search and come from YAML alone.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, TypeVar, get_args, get_origin

import tyro

from megatron_completedp.config.load import build_run, read_run
from megatron_completedp.config.run import RunConfig
from megatron_completedp.config.schema import Entry, keys
from megatron_completedp.config.tree import merge, read_yaml
from megatron_completedp.errors import CompletedPError

E = TypeVar("E")

#: Megatron-LM's flat flags for our fields. Scripts that drive Megatron work unchanged with these.
MEGATRON_FLAGS: dict[str, str] = {
    "model.num_layers": "--num-layers",
    "model.hidden_size": "--hidden-size",
    "model.ffn_hidden_size": "--ffn-hidden-size",
    "model.num_attention_heads": "--num-attention-heads",
    "model.num_query_groups": "--num-query-groups",
    "model.head_dim": "--kv-channels",
    "model.seq_length": "--seq-length",
    "model.vocab_size": "--vocab-size",
    "model.vocab_multiple": "--make-vocab-size-divisible-by",
    "model.rotary_base": "--rotary-base",
    "model.norm_epsilon": "--norm-epsilon",
    "parallel.tensor_model_parallel_size": "--tensor-model-parallel-size",
    "parallel.pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "parallel.virtual_pipeline_model_parallel_size": "--virtual-pipeline-model-parallel-size",
    "parallel.sequence_parallel": "--sequence-parallel",
    "parallel.use_distributed_optimizer": "--use-distributed-optimizer",
    "parallel.overlap_grad_reduce": "--overlap-grad-reduce",
    "parallel.overlap_param_gather": "--overlap-param-gather",
    "parallel.recompute_granularity": "--recompute-granularity",
    "training.micro_batch_size": "--micro-batch-size",
    "training.global_batch_size": "--global-batch-size",
    "training.train_steps": "--train-iters",
    "training.clip_grad": "--clip-grad",
    "hyperparams.lr": "--lr",
    "hyperparams.weight_decay": "--weight-decay",
    "hyperparams.beta1": "--adam-beta1",
    "hyperparams.beta2": "--adam-beta2",
    "hyperparams.eps": "--adam-eps",
    "schedule.kind": "--lr-decay-style",
    "schedule.warmup_fraction": "--lr-warmup-fraction",
    "evaluation.interval": "--eval-interval",
    "checkpoint.interval": "--save-interval",
    "logging.interval": "--log-interval",
}

_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}


def load_run(
    argv: Sequence[str], *, prog: str, description: str, extra: type[E]
) -> tuple[RunConfig, E]:
    """The run that `--config` and the flags in `argv` describe, and the command's own flags.

    Arguments and errors as for `read_arguments`; a bad value raises ConfigError.
    """
    tree, own = read_arguments(
        argv, RunConfig, prog=prog, description=description, extra=extra, read=read_run
    )
    return build_run(tree), own


def read_arguments(
    argv: Sequence[str],
    config: type,
    *,
    prog: str,
    description: str,
    extra: type[E],
    read: Callable[[str | Path], dict[str, Any]] = read_yaml,
    file_flag: str = "config",
) -> tuple[dict[str, Any], E]:
    """The tree, not yet checked, from which `build` makes a `config`, and the command's own flags.

    `config` is a config dataclass; `extra` is a dataclass with the command's own flags. A flag
    overrides the value in the YAML of `--config` (or another `file_flag`), as `read` gives it,
    which overrides the default; only the merged whole is to be checked. Usage errors and `--help`
    leave through SystemExit (2 and 0); a YAML file that cannot be read raises ConfigError.
    """
    arguments = make_dataclass(
        "Arguments",
        [
            (file_flag, Annotated[str | None, _FILE_FLAG], None),
            ("extra", Annotated[extra, tyro.conf.arg(name="")], MISSING),
            ("values", Annotated[_flags(config), tyro.conf.arg(name="")], MISSING),
        ],
        kw_only=True,
    )
    given: Any = tyro.cli(arguments, prog=prog, description=description, args=list(argv))
    path = getattr(given, file_flag)
    tree = {} if path is None else read(path)
    return merge(tree, given.values), given.extra


def run_command(command: Callable[[Sequence[str]], int]) -> int:
    """Run `command` on the process's arguments and return its exit code.

    A CompletedPError becomes one message on stderr and the error's own exit code; anything else is
    a defect and keeps its traceback.
    """
    # Megatron warns at its import of packages that are not there, which says nothing about a
    # command; which layers a run has, and why, is in its log.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    try:
        code = command(sys.argv[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader, head or less, has seen enough. What is left must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except CompletedPError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _flags(section: type, prefix: str = "") -> Any:
    """A TypedDict type with one optional key per field of `section`; nested for its sections.

    total=False is what tells a flag that was given from one that was not.
    """
    found: dict[str, Any] = {}
    for entry in keys(section):
        path = prefix + entry.name
        if entry.is_section:
            nested = _flags(entry.annotation, f"{path}.")
            found[entry.name] = Annotated[nested, tyro.conf.arg(help=entry.doc)]
        elif get_origin(entry.annotation) in (None, Literal, tuple):
            found[entry.name] = _flag(entry, path)
    # Built at run time, which type checkers have no notion of.
    return TypedDict(section.__name__, found, total=False)  # type: ignore[operator]


def _flag(entry: Entry, path: str) -> Any:
    """The annotated type of one flag.

    Numbers are taken as text and converted with the YAML's rules, so that 1.6e9 tokens or 3e-3 mean
    the same in both places and a mistake gets the same message.
    """
    kind, metavar = entry.annotation, None
    if entry.from_file:
        kind, metavar = str, "PATH"
    elif get_origin(kind) is tuple:
        item = get_args(kind)[0]
        # An item that is a section of its own, such as a source, is named by one word of text.
        metavar = f"[{_METAVARS.get(item, item.__name__.upper())} ...]"
        kind = tuple[str, ...]
    elif kind in _METAVARS:
        metavar = _METAVARS[kind] + (" | None" if entry.optional else "")
        kind = str | None if entry.optional else str
    alias = MEGATRON_FLAGS.get(path)
    return Annotated[
        kind,
        tyro.conf.arg(
            help=entry.doc,
            metavar=metavar,
            aliases=[alias] if alias else None,
            help_behavior_hint=_default_text(entry),
        ),
    ]


def _default_text(entry: Entry) -> str:
    if entry.default is MISSING:
        return "(required)"
    if entry.default in (None, ()):
        return ""
    return f"(default: {entry.default})"


_FILE_FLAG = tyro.conf.arg(
    metavar="PATH",
    help="YAML file with these settings; flags override its values.",
    help_behavior_hint="",
)
