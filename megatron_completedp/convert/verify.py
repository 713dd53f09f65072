"""The proof of a conversion: both models on the same real text, in fp32, on this machine's CPU.

An export in 16 bits has rounded weights. Megatron's are rounded in the same way before they are
compared, or else what rounding alone does to the logits would hide most mistakes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.convert.held_out import PROMPT_TOKENS, cut_windows, held_out_texts
from megatron_completedp.convert.mapping import entries
from megatron_completedp.convert.safetensors_folder import SafetensorsReader, TensorSpec
from megatron_completedp.convert.source import Source
from megatron_completedp.data.tokenizer import Tokenizer
from megatron_completedp.errors import ConversionError
from megatron_completedp.mcore.classify import classify_model
from megatron_completedp.mcore.model import build_model
from megatron_completedp.mcore.platform import detect_platform
from megatron_completedp.mcore.weights import load_model_weights

#: Largest difference of logits, as a part of the largest logit where that is above 1. fp32 sums in
#: another order leave some 1e-6. Of the mistakes in the tests the smallest, q and k gains swapped
#: after two steps that have hardly told them apart, leaves 7e-5; the others leave over 1e-3.
TOLERANCE = 1e-5

NEW_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was compared, and how it came out."""

    tokens: int
    """Token positions whose logits were compared."""
    max_difference: float
    mean_difference: float
    """Of logits, over all tokens and the whole vocabulary."""
    largest_logit: float
    """Of Megatron's, in absolute value."""
    limit: float
    """What `max_difference` may be: the tolerance, times the largest logit if that is above 1."""
    perplexity_megatron: float
    perplexity_hf: float
    """exp of the mean cross entropy over the same text, without padded vocabulary, both with
    weights rounded as exported."""
    tokenizer_agrees: bool
    """Whether AutoTokenizer gives the ids of the training tokenizer, without asking it for more."""
    greedy_agrees: bool
    """Whether both continue a prompt alike; a choice between equal logits may fall either way."""
    prompt: str
    continuation: str
    """By transformers' generate."""

    @property
    def problems(self) -> list[str]:
        """What does not agree; empty when the conversion is right."""
        found = []
        if not self.max_difference <= self.limit:  # NaN, too
            found.append(f"logits differ by up to {self.max_difference:.3g}")
        if not self.greedy_agrees:
            found.append("greedy continuations differ")
        if not self.tokenizer_agrees:
            found.append("the tokenizers give different ids")
        return found

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "problems": self.problems}

    def __str__(self) -> str:
        """For people."""
        return (
            f"logits over {self.tokens} tokens: largest difference {self.max_difference:.3g} "
            f"(limit {self.limit:.3g}), mean {self.mean_difference:.3g}\n"
            f"perplexity: Megatron {self.perplexity_megatron:.4f}, "
            f"transformers {self.perplexity_hf:.4f} (both with weights rounded as exported)\n"
            f"tokenizers {'agree' if self.tokenizer_agrees else 'DIFFER'}; "
            f"greedy continuations {'agree' if self.greedy_agrees else 'DIFFER'}\n"
            f"{self.prompt!r} -> {self.continuation!r}\n"
            + (f"FAILED: {'; '.join(self.problems)}" if self.problems else "verified")
        )


@torch.no_grad()
def verify(
    source: Source,
    hf_folder: Path,
    tokenizer: Tokenizer,
    *,
    text: str | None = None,
    samples: int = 4,
    tolerance: float = TOLERANCE,
) -> Verification:
    """Compare the model in `hf_folder` with the checkpoint it was made from.

    The text is that of the file or folder `text`, else of the run's validation data: `samples`
    sequences of the model's length. Needs `initialize_parallel` in a single process, and memory
    for both models in fp32. Raises ConversionError for numbers out of range, when there is too
    little text, when transformers finds weights that are missing or left over, and when the models
    have other vocabularies.
    """
    if not 0 < tolerance < math.inf:
        raise ConversionError(f"--tolerance is {tolerance}; expected more than 0.")
    shape = source.shape
    texts = held_out_texts(source, tokenizer, text)
    windows, used = cut_windows(texts, tokenizer, length=shape.seq_length, count=samples)
    hf_model, hf_tokenizer = _load_hf(hf_folder)
    if hf_model.config.vocab_size != shape.vocab_size:
        raise ConversionError(
            f"{hf_folder} has {hf_model.config.vocab_size} token ids, {source.checkpoint} "
            f"{shape.vocab_size}; they are not of one model. Name the export of this checkpoint."
        )
    megatron = _Megatron(source, SafetensorsReader(hf_folder).specs)
    sums: dict[str, float] = dict.fromkeys(("difference", "megatron", "hf"), 0.0)
    largest_difference = largest_logit = 0.0
    compared = predicted = 0
    for window in windows:
        ours, theirs = megatron(window), hf_model(window).logits
        difference = (ours - theirs).abs()
        # max() of NaN and a number depends on their order; NaN must win.
        largest_difference = float(torch.tensor([largest_difference, difference.max()]).max())
        largest_logit = max(largest_logit, float(ours.abs().max()))
        sums["difference"] += float(difference.mean(dtype=torch.float64)) * window.numel()
        for side, logits in (("megatron", ours), ("hf", theirs)):
            sums[side] += float(F.cross_entropy(logits[0, :-1], window[0, 1:], reduction="sum"))
        compared += window.numel()
        predicted += window.numel() - 1
    limit = tolerance * max(1.0, largest_logit)
    prompt = windows[0][:, :PROMPT_TOKENS]
    continuation = _generate(hf_model, prompt)
    return Verification(
        tokens=compared,
        max_difference=largest_difference,
        mean_difference=sums["difference"] / compared,
        largest_logit=largest_logit,
        limit=limit,
        perplexity_megatron=_perplexity(sums["megatron"] / predicted),
        perplexity_hf=_perplexity(sums["hf"] / predicted),
        tokenizer_agrees=_same_ids(used, tokenizer, hf_tokenizer),
        greedy_agrees=_is_greedy(megatron, prompt, continuation, slack=2 * limit),
        prompt=tokenizer.decode(prompt[0].tolist()),
        continuation=hf_tokenizer.decode(continuation, skip_special_tokens=True),
    )


class _Megatron:
    """Logits [1, sequence, vocabulary] of ids [1, sequence], in fp32.

    Weights are rounded as the tensors `exported`, by name, are, multipliers folded in.
    """

    def __init__(self, source: Source, exported: Mapping[str, TensorSpec]) -> None:
        platform = detect_platform("cpu")
        chunks = build_model(
            source.shape,
            ParallelConfig(),
            platform=platform,
            precision="fp32",
            residual=source.multipliers.residual,
            logit_multiplier=source.multipliers.logit,
        )
        load_model_weights(chunks, source.checkpoint)
        _round_weights(chunks, source, exported)
        (self._model,) = chunks
        self._model.eval()
        self._vocab_size = source.shape.vocab_size

    def __call__(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._model(ids, None, None)
        return logits[..., : self._vocab_size]


def _round_weights(
    chunks: Sequence[nn.Module], source: Source, exported: Mapping[str, TensorSpec]
) -> None:
    """Round each weight so that the export's, which is the weight times its fold, is exact."""
    ways = {}
    for entry in entries(source.shape, source.multipliers):
        spec = exported.get(entry.hf_name)  # none in another model, whose logits then differ
        if spec is not None:
            ways[entry.module, entry.layer] = (entry.fold, spec.dtype)
    for item in classify_model(chunks, source.shape, ParallelConfig()):
        for rows in item.ranges:
            fold, dtype = ways.get((rows.module, item.layer), (1.0, torch.float32))
            if dtype != torch.float32:
                part = item.parameter.data[rows.start : rows.stop]
                part.copy_((part * fold).to(dtype).float() / fold)


def _load_hf(folder: Path) -> tuple[Any, Any]:
    """The model in fp32 and its tokenizer, from the files in `folder` alone.

    Raises ConversionError unless every weight finds its place.
    """
    # Else transformers takes the path for the name of a model on the internet.
    if not (folder / "config.json").is_file():
        raise ConversionError(
            f"{folder} has no config.json; expected a folder written by convert_checkpoint.py "
            "to-hf."
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # Its type does not say that this asks for a pair.
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ConversionError(f"transformers cannot load {folder}: {error}") from error
    model, loading = loaded
    problems = {kind: sorted(map(str, names)) for kind, names in loading.items() if names}
    if problems:
        raise ConversionError(
            f"transformers loads {folder}, but not all of it: {problems}. Convert it again."
        )
    return model.eval(), tokenizer


def _generate(model: Any, prompt: Tensor) -> list[int]:
    """The ids that transformers continues `prompt` with, greedily."""
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
    )
    ids: list[int] = output[0, prompt.shape[1] :].tolist()
    return ids


def _is_greedy(
    megatron: _Megatron, prompt: Tensor, continuation: Sequence[int], *, slack: float
) -> bool:
    """Whether Megatron, too, finds each id of `continuation` best, within `slack` of a logit."""
    ids = torch.cat([prompt, torch.tensor([continuation])], dim=1)
    logits = megatron(ids)[0, prompt.shape[1] - 1 : -1]
    chosen = logits.gather(1, torch.tensor(continuation).unsqueeze(1)).squeeze(1)
    return bool((chosen >= logits.max(dim=1).values - slack).all())


def _same_ids(texts: Sequence[str], ours: Tokenizer, theirs: Any) -> bool:
    # With the special tokens that a user gets who does not ask for none: training had none.
    return all(
        ours.encode(text) == theirs(text)["input_ids"] for text in itertools.islice(texts, 100)
    )


def _perplexity(cross_entropy: float) -> float:
    return math.exp(min(cross_entropy, 700.0))
