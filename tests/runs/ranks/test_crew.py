"""The ranks as the loop of a run sees them."""

from pathlib import Path

from soflow_fast.config.presets import preset
from soflow_fast.config.schema import override
from soflow_fast.launch import Launch
from soflow_fast.runs.ranks.crew import assemble
from soflow_fast.runs.ranks.notes import of_rank
from soflow_fast.runs.ranks.watch import Watch
from tests.forked import on_ranks


def keep(launch: Launch, folder: Path) -> bool:
    config = override(preset("digits"), {"run.device": "cpu", "batch_size": 8})
    crew, _ = assemble(config, launch, Watch())
    crew.keep_notes(folder)
    of_rank(launch.rank).note("a traceback")
    return crew.notes is None


def test_every_rank_keeps_tracebacks_and_the_first_prints_all_else(tmp_path: Path) -> None:
    assert on_ranks(2, keep, tmp_path) == [True, False]
    for rank in (0, 1):
        assert "a traceback" in (tmp_path / f"warnings-rank-{rank:05d}.txt").read_text()


def make(launch: Launch, folder: Path, each_machine: bool) -> list[str]:
    """What a rank finds on the disk when its turn comes; ranks 0 and 1 are on one machine, rank 2 on another."""
    launch = launch._replace(local_rank=launch.rank % 2, local_world=2)
    config = override(preset("digits"), {"run.device": "cpu", "batch_size": 6})
    crew, _ = assemble(config, launch, Watch())

    def leave() -> list[str]:
        found = sorted(path.name for path in folder.iterdir())
        (folder / str(launch.rank)).touch()
        return found

    return crew.first_then_others(leave, each_machine=each_machine)


def test_others_begin_when_the_first_is_done(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    first, *others = on_ranks(3, make, tmp_path / "one", False)
    assert first == [] and all("0" in found for found in others)
    (tmp_path / "each").mkdir()
    first, second, other = on_ranks(3, make, tmp_path / "each", True)
    assert "1" not in first and "1" not in other and {"0", "2"} <= set(second)
