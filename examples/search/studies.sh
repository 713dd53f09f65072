#!/usr/bin/env bash
# Every study of this folder in order; started again, it goes on where it was. Flags, such as
# --workers 2, go to every command that trains.
#
#   examples/search/studies.sh [flags]
set -euo pipefail
cd "$(dirname "$0")/../.."
search() { python -m megatron_completedp.search "$@"; }
folder=examples/search

tuned() { # run a search to its end, keep its recipe, show it
  search run --config "$folder/$1.yaml" "${@:2}"
  search recipe --config "$folder/$1.yaml" --to "$folder/$1/recipe.yaml" "${@:2}"
  search report --config "$folder/$1.yaml" --target "$folder/target.yaml"
}

tuned global "$@"
for level in types types_x_depth full; do tuned "$level" "$@"; done
for sampler in random tpe cmaes gp; do
  search run --config "$folder/types_$sampler.yaml" "$@"
  search report --config "$folder/types_$sampler.yaml" --target "$folder/target.yaml"
done
search compare --config "$folder/compare.yaml" "$@"
search transfer --config "$folder/transfer.yaml" "$@"
