"""Who started a process, off its environment."""

import pytest

from soflow_fast.errors import ConfigError
from soflow_fast.launch import PORTS, launched

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node3",
    "MASTER_PORT": "1",
}  # fmt: skip
SLURM = {
    "SLURM_STEP_NUM_TASKS": "11", "SLURM_PROCID": "6", "SLURM_LOCALID": "2", "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "98765",
    "SLURM_STEP_NODELIST": "gpu[07-08,12]-ib,login1", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NTASKS": "11",
}  # fmt: skip


def test_a_process_that_nobody_started_beside_others_is_alone() -> None:
    assert launched({}) is None
    assert launched({"RANK": "0", "WORLD_SIZE": "1"}) is None


def test_torchrun() -> None:
    found = launched(TORCHRUN)
    assert found is not None and found[:6] == (5, 8, 1, 4, "node3", 1) and found.host


def test_ranks_set_by_hand_are_on_one_machine() -> None:
    found = launched({"RANK": "1", "WORLD_SIZE": "2"})
    assert found is not None and found[:6] == (1, 2, 1, 2, "127.0.0.1", 29_500)


def test_srun() -> None:
    found = launched(SLURM)
    assert found is not None and found[:5] == (6, 11, 2, 4, "gpu07-ib") and found.port == PORTS[98765 % 10_000]
    assert launched({**SLURM, "SLURM_NODEID": "2", "SLURM_PROCID": "8", "SLURM_LOCALID": "0"})[3] == 3  # pyright: ignore
    moved = launched({**SLURM, "MASTER_ADDR": "there", "MASTER_PORT": "7"})
    assert moved is not None and moved[4:6] == ("there", 7)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        *((nodes, "gpu07") for nodes in ("gpu07", "gpu07,gpu09", "gpu[07,09]", "gpu[07-12],x")),
        ("rack[0-1]node[3-5],x", "rack0node3"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    found = launched({**SLURM, "SLURM_STEP_NODELIST": nodes})
    assert found is not None and found.address == first


def test_a_world_size_of_the_batch_script_does_not_hide_srun() -> None:
    assert launched({**SLURM, "WORLD_SIZE": "11", "MASTER_PORT": "7"}) == launched({**SLURM, "MASTER_PORT": "7"})


def test_a_batch_script_of_slurm_is_alone() -> None:
    """It has the variables of its job, and those of a first task, but is no task of a step."""
    assert launched({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"RANK": "8"}, "do not fit together"),
        ({"LOCAL_RANK": "4"}, "do not fit together"),
        ({"LOCAL_WORLD_SIZE": "9"}, "do not fit together"),
        ({"RANK": "one"}, "RANK: must be a whole number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: must be a whole number"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT: must be a whole number"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT: must be in 1..65535, got 0"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT: must be in 1..65535, got 99999"),
    ],
)
def test_variables_that_do_not_fit_are_named(change: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        launched({**TORCHRUN, **change})


def test_a_variable_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        launched({"RANK": "0"})
    with pytest.raises(ConfigError, match="RANK: is missing"):
        launched({"WORLD_SIZE": "2"})
