"""The output folder of a job: whose it is, and the tokenizer that made its ids."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_completedp.config.load import read_yaml, to_tree, to_yaml
from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.data.claims import claim
from megatron_completedp.data.readers import read_texts
from megatron_completedp.data.settings import NOT_THE_SHARDS, PreprocessConfig, TrainTokenizer
from megatron_completedp.data.sources import SourceFile
from megatron_completedp.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_completedp.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

SETTINGS_NAME = "preprocess.yaml"
#: A copy by these names lies in every output folder, so that its pairs can always be read.
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model")


def claim_folder(config: PreprocessConfig, files: Sequence[SourceFile]) -> Tokenizer:
    """Make `config.out` this job's, with its tokenizer and settings in it, or find it so.

    Several processes may call this at once; one of them trains or copies the tokenizer. Raises
    ConfigError when the folder was made with other settings or another tokenizer.
    """
    out = Path(config.out)
    with claim(out / "preprocess.lock", wait=True):
        _check_settings(config, out / SETTINGS_NAME)
        tokenizer = _keep_tokenizer(config, files)
        # Last: where the settings are, the tokenizer is.
        with atomic_write(out / SETTINGS_NAME) as stream:
            stream.write(to_yaml(config).encode())
    return tokenizer


def find_tokenizer(prefix: Path, sha256: str) -> Tokenizer:
    """The tokenizer with this hash that was kept in a folder above the pair at `prefix`.

    Raises DataError when there is none.
    """
    for folder in prefix.resolve().parents:
        for name in TOKENIZER_NAMES:
            if (folder / name).is_file():
                tokenizer = load_tokenizer(folder / name)
                if tokenizer.sha256 == sha256:
                    return tokenizer
    raise DataError(
        f"{prefix} was made with a tokenizer of sha256 {sha256}, which is in no folder above it as "
        f"{' or '.join(TOKENIZER_NAMES)}; copy it beside the pair."
    )


def _check_settings(config: PreprocessConfig, path: Path) -> None:
    """Raise ConfigError when `path` holds the settings of a job that would make other shards."""
    if not path.is_file():
        return
    found, wanted = _shard_settings(read_yaml(path)), _shard_settings(to_tree(config))
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing:
        changes = "; ".join(
            f"{key}: {found.get(key)} there, {wanted[key]} now" for key in differing
        )
        raise ConfigError(
            f"{config.out} was made with other settings ({changes}). Choose another folder, or put "
            f"the settings of {path} back. To keep the finished shards and add to them, remove "
            "that file: each shard is still held to the settings in its own manifest."
        )


def _shard_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in NOT_THE_SHARDS}


def _keep_tokenizer(config: PreprocessConfig, files: Sequence[SourceFile]) -> Tokenizer:
    """The tokenizer in the output folder, which is copied or trained there when it is absent."""
    out = Path(config.out)
    kept = [out / name for name in TOKENIZER_NAMES if (out / name).is_file()]
    if config.tokenizer is None:
        assert config.train_tokenizer is not None, "the config holds exactly one of the two"
        if kept:
            return load_tokenizer(kept[0])
        texts = list(_sample(files, config.train_tokenizer))
        logger.info("training a tokenizer on %d documents", len(texts))
        return train_sentencepiece(
            texts, config.train_tokenizer.vocab_size, out / "tokenizer.model"
        )
    given = load_tokenizer(Path(config.tokenizer))
    for path in kept:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != given.sha256:
            raise ConfigError(
                f"{config.out} was made with a tokenizer of sha256 {found} ({path}); "
                f"{config.tokenizer} has {given.sha256}. Choose another folder, or give the "
                "tokenizer that the folder holds."
            )
    copy = out / ("tokenizer.json" if given.path.suffix == ".json" else "tokenizer.model")
    if not kept:
        with atomic_write(copy) as stream:
            stream.write(given.path.read_bytes())
    return load_tokenizer(copy)


def _sample(files: Sequence[SourceFile], settings: TrainTokenizer) -> Iterator[str]:
    """The first texts of every subset, in equal shares of `sample_mb`."""
    subsets = sorted({file.subset for file in files})
    share = settings.sample_mb * 1e6 / len(subsets)
    for subset in subsets:
        left = share
        for text in read_texts([file for file in files if file.subset == subset]):
            yield text
            left -= len(text.encode())
            if left <= 0:
                break
