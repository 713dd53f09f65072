"""The tokenizer as files that `AutoTokenizer` loads: tokenizer.json and tokenizer_config.json.

A tokenizer.json is copied without its post-processor: that puts tokens around a text, and training
put none there but the end of a document. A SentencePiece model is rebuilt in the library
`tokenizers`, which transformers runs, and lies beside it as tokenizer.model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from megatron_completedp.data.tokenizer import SentencePieceTokenizer, Tokenizer
from megatron_completedp.errors import ConversionError

_SPACE = "\u2581"  # what SentencePiece writes for a space
#: Kinds of pieces in a SentencePiece model, and its two algorithms.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_MERGED = (_NORMAL, _USER_DEFINED, _UNUSED)
_UNIGRAM, _BPE = 1, 2


def write_tokenizer(folder: Path, tokenizer: Tokenizer, *, seq_length: int) -> None:
    """Write the files of `tokenizer`. Raises ConversionError for a kind that cannot be rebuilt."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_length,
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(tokenizer, SentencePieceTokenizer):
        proto = _parse(tokenizer)
        rebuilt = _rebuild(proto)
        rebuilt.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer.model").write_bytes(tokenizer.content)
        # A control token spelt in a text is text to SentencePiece.
        config["split_special_tokens"] = True
    else:
        # As text: the library changes the last digit of some scores when it reads and saves them.
        tree = json.loads(tokenizer.content)
        tree |= {"post_processor": None, "truncation": None, "padding": None}
        content = json.dumps(tree, ensure_ascii=False)
        (folder / "tokenizer.json").write_text(content, encoding="utf-8")
        rebuilt = tokenizers.Tokenizer.from_str(content)
    eod = rebuilt.id_to_token(tokenizer.eod)
    config |= {"eos_token": eod, "bos_token": eod, "unk_token": _unknown_token(rebuilt)}
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _unknown_token(tokenizer: tokenizers.Tokenizer) -> str | None:
    token: str | None = getattr(tokenizer.model, "unk_token", None)
    return token


def _parse(tokenizer: SentencePieceTokenizer) -> Any:
    """The model's pieces, scores and settings."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(tokenizer.content)
    return proto


def _rebuild(proto: Any) -> tokenizers.Tokenizer:
    pieces = proto.pieces
    unknown = next(piece.piece for piece in pieces if piece.type == _UNKNOWN)
    byte_fallback = bool(proto.trainer_spec.byte_fallback)
    kind = proto.trainer_spec.model_type
    if kind == _BPE:
        vocab = {piece.piece: index for index, piece in enumerate(pieces)}
        model: models.Model = models.BPE(
            vocab=vocab,
            merges=_merges(proto),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    elif kind == _UNIGRAM:
        model = models.Unigram(
            [(piece.piece, piece.score) for piece in pieces],
            unk_id=proto.trainer_spec.unk_id,
            byte_fallback=byte_fallback,
        )
    else:
        raise ConversionError(
            f"the SentencePiece model is of type {kind}; expected {_BPE} (bpe) or {_UNIGRAM} "
            "(unigram), which transformers can run. Train one of these."
        )
    rebuilt = tokenizers.Tokenizer(model)
    rebuilt.normalizer = _normalizer(proto.normalizer_spec)
    rebuilt.decoder = _decoder(dummy_prefix=proto.normalizer_spec.add_dummy_prefix)
    for piece in pieces:
        if piece.type in (_UNKNOWN, _CONTROL):
            rebuilt.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == _USER_DEFINED:
            rebuilt.add_tokens([AddedToken(piece.piece, normalized=False, special=False)])
    return rebuilt


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best score first.

    SentencePiece merges the neighbours whose joint piece scores best, and of equal ones the first
    in the text. Pieces put in by hand, runs of spaces above all, have equal scores: there the
    longest left side wins, which makes the first run of spaces grow before the next begins.
    """
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type in _MERGED}
    ranked = []
    for whole, score in scores.items():
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in scores and right in scores:
                ranked.append((-score, -len(left), left, right))
    return [(left, right) for _, _, left, right in sorted(ranked)]


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _decoder(*, dummy_prefix: bool) -> decoders.Decoder:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)
