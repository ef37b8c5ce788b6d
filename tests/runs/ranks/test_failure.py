"""Which errors are causes, and how one is told in a line."""

import torch.distributed as dist

from soflow_fast.errors import ConfigError, Interrupted
from soflow_fast.runs.ranks.failure import Failure, described, from_json, kind_of


def test_errors_of_connections_follow_from_other_ranks() -> None:
    text = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.1.1]:24567"
    assert kind_of(RuntimeError(text)) == kind_of(dist.DistBackendError("x")) == "lost"
    assert kind_of(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == kind_of(KeyError("gloo")) == "error"
    assert kind_of(ConfigError("gloo")) == "error"
    assert kind_of(Interrupted(15)) == "signal"


def test_a_failure_in_a_line() -> None:
    failure = Failure(3, "gpu07", "--data x: is gone", 2, "error")
    assert from_json(failure.to_json()) == failure
    assert failure.line() == "error: rank 3 (gpu07): --data x: is gone"
    assert failure.line(common=True) == "error: --data x: is gone"
    assert Failure(3, "", "x", 2, "error").line() == "error: rank 3: x"
    told = Failure(3, "gpu07", "cannot save: rank 1 (gpu07): No space left on device", 2, "error")
    assert told.line() == "error: cannot save: rank 1 (gpu07): No space left on device"
    assert Failure(3, "gpu07", "stopped", 143, "signal").line() == "stopped"
    assert Failure(3, "gpu07", "", 0, "error").line() == ""


def test_an_error_of_the_program_says_where() -> None:
    try:
        from_json("{")
    except ValueError as error:
        text = described(error)
    assert text.startswith("JSONDecodeError: Expecting property name") and "(at failure.py:" in text
    assert described(ConfigError("--steps 0")) == "--steps 0"
    assert described(RuntimeError("one\ntwo")) == "RuntimeError: one"
