#!/usr/bin/env bash
# The text of the ladder studies: English Wikipedia and books of $COMPLETEDP_DATA, tokenized with a
# SentencePiece model of 1,024 ids that is trained on a part of it. Held out: every 50th article, and
# one book. Skips what is there.
#
#   COMPLETEDP_DATA=/path/to/data examples/ladder/data.sh [FOLDER]     (default runs/ladder/data)
set -euo pipefail
: "${COMPLETEDP_DATA:?names no folder; set it to one with corpus/wikipedia and corpus/book}"
out=${1:-runs/ladder/data}
data() { python -m megatron_completedp.data "$@"; }

if [ ! -e "$out/valid.json" ]; then
  mkdir -p "$out/jsonl"
  zstd -dcq "$COMPLETEDP_DATA/corpus/wikipedia/wiki.jsonl.zst" >"$out/jsonl/wiki.jsonl"
  zstd -dcq "$COMPLETEDP_DATA/corpus/book/book.jsonl.zst" >"$out/jsonl/book.jsonl"
  { awk 'NR % 50' "$out/jsonl/wiki.jsonl"; tail -n +2 "$out/jsonl/book.jsonl"; } >"$out/jsonl/train.jsonl"
  { awk 'NR % 50 == 0' "$out/jsonl/wiki.jsonl"; head -n 1 "$out/jsonl/book.jsonl"; } >"$out/jsonl/valid.jsonl"
  head -n 2000 "$out/jsonl/train.jsonl" >"$out/jsonl/tokenizer.jsonl"
  data tokenizer --inputs "$out/jsonl/tokenizer.jsonl" --out "$out/tokenizer.model" --vocab-size 1024
  data preprocess --sources "$out/jsonl/train.jsonl" "$out/jsonl/valid.jsonl" \
    --tokenizer "$out/tokenizer.model" --out "$out/pairs"
  mv "$out"/pairs/train/train.* "$out"/pairs/valid/valid.* "$out"
  rm -r "$out/jsonl" "$out/pairs"
fi
