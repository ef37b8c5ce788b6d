"""The ranks as the loop of a run sees them."""

from pathlib import Path

from forked import on_ranks

from soflow_fast.config.presets import preset
from soflow_fast.config.schema import override
from soflow_fast.launch import Launch
from soflow_fast.runs.ranks.crew import assemble
from soflow_fast.runs.ranks.notes import of_rank
from soflow_fast.runs.ranks.watch import Watch


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
