#!/usr/bin/env bash
# The text of the search studies: English Wikipedia and books of $COMPLETEDP_DATA in three parts that
# share no document. The search chooses by `valid`; reports quote `heldout`, which no choice has seen.
# Each has every 50th article and one book. A SentencePiece model trained on a part of `train` makes the
# tokens. Skips what is there.
#
#   COMPLETEDP_DATA=/path/to/data examples/search/data.sh [FOLDER [IDS]]
#
# FOLDER is runs/search/data and IDS, the size of the vocabulary, 1024 if not given.
set -euo pipefail
: "${COMPLETEDP_DATA:?names no folder; set it to one with corpus/wikipedia and corpus/book}"
out=${1:-runs/search/data} ids=${2:-1024}
data() { python -m megatron_completedp.data "$@"; }
rows() { zstd -dcq "$COMPLETEDP_DATA/corpus/$1"; }

if [ ! -e "$out/heldout.json" ]; then
  text=$out/jsonl
  mkdir -p "$text"
  { rows wikipedia/wiki.jsonl.zst | awk 'NR % 50 && NR % 50 != 25'
    rows book/book.jsonl.zst | tail -n +3; } >"$text/train.jsonl"
  { rows wikipedia/wiki.jsonl.zst | awk 'NR % 50 == 0'
    rows book/book.jsonl.zst | awk 'NR == 1'; } >"$text/valid.jsonl"
  { rows wikipedia/wiki.jsonl.zst | awk 'NR % 50 == 25'
    rows book/book.jsonl.zst | awk 'NR == 2'; } >"$text/heldout.jsonl"
  awk 'NR <= 2000' "$text/train.jsonl" >"$text/tokenizer.jsonl"
  data tokenizer --inputs "$text/tokenizer.jsonl" --out "$out/tokenizer.model" --vocab-size "$ids"
  data preprocess --sources "$text/train.jsonl" "$text/valid.jsonl" "$text/heldout.jsonl" \
    --tokenizer "$out/tokenizer.model" --out "$out/pairs"
  for split in train valid heldout; do mv "$out/pairs/$split/$split".* "$out"; done
  rm -r "$text" "$out/pairs"
fi
