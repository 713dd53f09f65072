"""How the end of a worker reaches whoever started it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_completedp.errors import CompletedPError
from megatron_completedp.study.crew import Crew, Stop, StudyStopped


def stopped_while_waiting(*, number: int, stop: Stop) -> None:
    """A signal came while the worker waited for its database."""
    stop.value = True
    raise StudyStopped("stopped by a signal while the database could not be reached.")


def failing(*, number: int, stop: Stop) -> None:
    raise CompletedPError("no data")


def test_a_stop_is_a_stop_and_an_error_an_error(tmp_path: Path) -> None:
    with pytest.raises(StudyStopped, match="start the same command again"):
        Crew(work=stopped_while_waiting, logs=tmp_path, workers=1, ranks=1).run(lambda: False)
    with pytest.raises(CompletedPError, match="no data") as error:
        Crew(work=failing, logs=tmp_path, workers=1, ranks=1).run(lambda: False)
    assert not isinstance(error.value, StudyStopped)
