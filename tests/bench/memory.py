"""Peak memory of short training runs on CPU against what `plan` predicts.

    python tests/bench/memory.py

The runs and how they are measured are in tests/dist/memory_cases.py: every byte of torch's CPU
allocator. The last line is one JSON object: worst = largest relative difference of any rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the cases lie beside the tests

from tests.dist.harness import run_cases  # noqa: E402
from tests.dist.memory_cases import CASES  # noqa: E402


def main() -> None:
    two = [name for name in CASES if any(word in name for word in ("dp2", "tp2", "pp2"))]
    one = [name for name in CASES if name not in two]
    worst = 0.0
    print(f"{'run':<24} rank  measured MB  predicted MB  ratio")
    for processes, names in ((1, one), (2, two)):
        results = run_cases("tests.dist.memory_cases", names, processes=processes, timeout_s=900)
        for name in names:
            for rank, numbers in enumerate(results(name)):
                ratio = numbers["predicted"] / numbers["measured"]
                worst = max(worst, abs(ratio - 1))
                print(
                    f"{name:<24} {rank:>4}  {numbers['measured'] / 1e6:>11.2f}  "
                    f"{numbers['predicted'] / 1e6:>12.2f}  {ratio:.3f}"
                )
    print(json.dumps({"worst": round(worst, 4)}))


if __name__ == "__main__":
    main()
