"""The training command under torchrun: the same run on two ranks, and errors without a hang."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from tests.mcore.train_runs import STEPS, finish, losses, make_corpus, start, write_run

#: fp32 sums in another order: 1e-7 per step, which twenty updates carry on. Seen: 7e-7.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def test_two_ranks_train_like_one(corpus: Path, tmp_path: Path) -> None:
    values = []
    for ranks in (1, 2):
        folder = tmp_path / f"tp{ranks}"
        config = write_run(folder, corpus, checkpoint={"interval": 0, "save_at_end": False})
        flags = ["--tensor-model-parallel-size", str(ranks)]
        code, log = finish(start(config, *flags, ranks=ranks))
        assert code == 0, log
        assert log.count("= the whole model") == 1, "rank 0 alone reports"
        values.append(losses(folder) + losses(folder, "eval"))
    one, two = values
    assert len(one) == STEPS + 2
    assert [step for step, _ in one] == [step for step, _ in two]
    for (_, expected), (_, got) in zip(one, two, strict=True):
        assert got == pytest.approx(expected, rel=TOLERANCE)


def test_a_bad_value_is_said_once(corpus: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", corpus, data__train=[str(corpus / "trian")])
    code, log = finish(start(config, "--tensor-model-parallel-size", "2", ranks=2))
    assert code != 0
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, log
    assert "trian.bin does not exist" in errors[0]
    assert "correct the data prefix" in errors[0]
    assert "megatron_completedp/" not in log, "torchrun prints a traceback, of its own files alone"
