"""`sample` and `kill -9`: no file is ever seen half written, and the same command makes the rest of the same bytes."""

import json
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from soflow_fast.runs.images import is_whole_png

FLAGS = ["--n", "300", "--batch-size", "16", "--format", "both", "--labels", "random", "--times", "1,0.4"]


@pytest.fixture
def whole(call: Any, finished: Any, files: Any, tmp_path: Path) -> dict[str, bytes]:
    """What the command makes without a kill."""
    assert call("sample", finished.folder, "--out", tmp_path / "whole", *FLAGS).code == 0
    return files(tmp_path / "whole")


def unfinished(whole: dict[str, bytes]) -> dict[str, bytes]:
    """The same files before samples.npz is there: the manifest does not name it yet."""
    manifest = json.loads(whole["samples.json"])
    del manifest["sha256 of samples.npz"]
    return whole | {"samples.json": (json.dumps(manifest, indent=1) + "\n").encode()}


def test_kills_in_the_midst_of_drawing(
    started: Any, until: Any, count: Any, finished: Any, files: Any, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out, chance = tmp_path / "out", random.Random(0)
    assert len(whole) == 304  # the images, the grid, the arrays, the settings and the lock
    kills = count(3, 30)
    for k in range(kills):
        seen = len(list(out.glob("*.png")))
        wanted = seen + chance.randrange(1, 250 // kills)
        drawing = started(finished.folder, "--out", out, *FLAGS, module="sample", slow=0.005)
        until(lambda: len(list(out.glob("*.png"))) >= wanted)  # noqa: B023
        drawing.kill(signal.SIGKILL)
        assert drawing.wait() == -signal.SIGKILL
        left = {name: content for name, content in files(out).items() if not name.startswith(".")}
        assert seen < len(left) < 302 and left.items() <= unfinished(whole).items(), k
        assert all(is_whole_png(content) for name, content in left.items() if name.endswith(".png"))
    drawing = started(finished.folder, "--out", out, *FLAGS, module="sample")
    assert drawing.wait() == 0 and " of 300 are there already" in drawing.output.read_text()
    assert files(out) == whole


def test_a_kill_while_all_images_are_put_into_one_file(
    started: Any, until: Any, finished: Any, files: Any, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    drawing = started(finished.folder, "--out", out, *FLAGS, module="sample", slow=0.02)
    until(lambda: list(out.glob(".samples.npz.partial-*")))
    drawing.kill(signal.SIGKILL)
    assert drawing.wait() == -signal.SIGKILL
    if not (out / "samples.npz").exists():  # or the kill came just after
        assert len(list((out / ".parts").glob("*.npy"))) == -(-300 // 16)
    assert started(finished.folder, "--out", out, *FLAGS, module="sample").wait() == 0
    assert files(out) == whole


def test_a_signal_says_how_many_are_kept(
    started: Any, until: Any, finished: Any, files: Any, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    drawing = started(finished.folder, "--out", out, *FLAGS, module="sample", slow=0.01)
    until(lambda: len(list(out.glob("*.png"))) > 40)
    drawing.kill(signal.SIGTERM)
    assert drawing.wait() == 143
    said = drawing.output.read_text()
    assert re.fullmatch(r"soflow: interrupted; \d+ of 300 are kept, and the same command goes on\n", said), said
    assert not [path for path in out.rglob("*") if "partial" in path.name]
    left = {name: content for name, content in files(out).items() if not name.startswith(".parts")}
    assert left.items() <= unfinished(whole).items() and int(said.split()[2]) <= len(left) - 2 < 300
