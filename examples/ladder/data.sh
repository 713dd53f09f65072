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
  awk 'NR % 50' "$out/jsonl/wiki.jsonl" >"$out/jsonl/train_wiki.jsonl"
  awk 'NR % 50 == 0' "$out/jsonl/wiki.jsonl" >"$out/jsonl/valid_wiki.jsonl"
  tail -n +2 "$out/jsonl/book.jsonl" >"$out/jsonl/train_book.jsonl"
  head -n 1 "$out/jsonl/book.jsonl" >"$out/jsonl/valid_book.jsonl"
  head -n 2000 "$out/jsonl/train_wiki.jsonl" >"$out/jsonl/tokenizer.jsonl"
  data tokenizer --inputs "$out/jsonl/tokenizer.jsonl" --out "$out/tokenizer.model" --vocab-size 1024
  for split in train valid; do
    data prepare --inputs "$out/jsonl/${split}_wiki.jsonl" "$out/jsonl/${split}_book.jsonl" \
      --prefix "$out/$split" --tokenizer "$out/tokenizer.model"
  done
  rm -r "$out/jsonl"
fi
