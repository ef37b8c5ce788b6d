"""Checkpoints that several ranks write: any number of ranks, or one process, reads them; no rank's end costs one."""

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from soflow_fast import TrainState, load
from soflow_fast.errors import CheckpointError
from soflow_fast.launch import Launch
from soflow_fast.runs import checkpoint
from soflow_fast.runs.checkpoint import reading, sharded
from tests.forked import on_ranks
from tests.ranked_states import CHANGES, fill, joined, state_of
from tests.states import advance, build

Kind = tuple[str, int]
FILE = re.compile(r"(config|state|manifest)\.json|shard-0000[1-4]-model-0000[1-4]-of-00004\.safetensors")


def whole(state: TrainState) -> dict[str, torch.Tensor]:
    """Every number that training changes, whole, by its name."""
    parts = {f"network {k}": v for k, v in state.weights().items()}
    parts |= {f"ema {k}": v for k, v in state.ema.state_dict().items()}
    assert state.teacher is not None
    parts |= {f"teacher {k}": v for k, v in state.teacher.state_dict().items()}
    for index, entry in state.optimizer.state_dict()["state"].items():
        parts |= {f"optimizer {index} {k}": v for k, v in entry.items()}
    return {name: v.full_tensor() if hasattr(v, "full_tensor") else v.clone() for name, v in parts.items()}


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run of one process with a checkpoint of step 2, of format 1, and all that it holds."""
    folder = tmp_path_factory.mktemp("single") / "run"
    state = advance(build(**CHANGES), 2)
    checkpoint.save(folder, state)
    return folder, whole(state)


def carry(launch: Launch, kind: str, source: Path, target: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Resume from one run directory and save to another."""
    state = state_of(joined(launch, kind), **{"run.optimizer": "torch" if launch.world == 4 else "soflow"})
    assert checkpoint.resume(source, state, pytest.fail)
    checkpoint.save(target, state)
    return state.step, whole(state)


def assert_carried(source: Path, kind: Kind, target: Path, wanted: dict[str, torch.Tensor]) -> None:
    for step, got in on_ranks(kind[1], carry, kind[0], source, target):
        assert step == 2
        assert_same(got, wanted)


def two_steps(launch: Launch, kind: str, folder: Path) -> None:
    """A run of several ranks with checkpoints of steps 1 and 2."""
    state = state_of(joined(launch, kind))
    for state.step in (1, 2):
        fill(state, state.step)
        checkpoint.save(folder, state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with checkpoints of steps 1 and 2; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    on_ranks(2, two_steps, "ddp", folder)
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


# From any number of ranks to any other


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_process_and_two_ranks_read_each_others(
    kind: str, single: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    source, wanted = single
    assert_carried(source, (kind, 2), tmp_path / "ranks", wanted)
    state = build(**CHANGES)
    assert checkpoint.resume(tmp_path / "ranks", state, pytest.fail) and state.step == 2
    assert_same(whole(state), wanted)
    for place in (tmp_path / "ranks", checkpoint.list_checkpoints(tmp_path / "ranks")[0]):
        assert_same(
            {f"ema {k}": v for k, v in load(place).state_dict().items()},
            {name: value for name, value in wanted.items() if name.startswith("ema ")},
        )
    checkpoint.save(tmp_path / "back", state)
    (was,), (now,) = checkpoint.list_checkpoints(source), checkpoint.list_checkpoints(tmp_path / "back")
    assert [file.read_bytes() for file in sorted(now.iterdir())] == [f.read_bytes() for f in sorted(was.iterdir())]


def again(launch: Launch, folder: Path, changes: dict[str, Any], begun: bool) -> tuple[bool, dict[str, torch.Tensor]]:
    """Save and resume."""
    parallel = joined(launch, "ddp")
    state, other = state_of(parallel, **changes), state_of(parallel, **changes)
    if begun:
        advance_alike(state)
    checkpoint.save(folder, state)
    other.step = 5
    checkpoint.resume(folder, other, pytest.fail)
    wanted = whole(state)
    assert_same(whole(other), wanted)
    return other.step == state.step == begun, wanted


def advance_alike(state: TrainState) -> None:
    """A step with some gradients, the same on all ranks."""
    for number, parameter in enumerate(state.flow.parameters(), 1):
        parameter.grad = torch.full_like(parameter, number / 7)
    state.optimizer.ema_decays.fill_(0.5)
    state.optimizer.step()
    state.step += 1


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("optimizer", ["soflow", "torch"])
def test_masters_and_a_state_before_its_first_step(optimizer: str, begun: bool, tmp_path: Path) -> None:
    changes = {"precision": "bf16", "run.optimizer": optimizer}
    found = on_ranks(2, again, tmp_path, changes, begun)
    assert found[0][0] and found[1][0]
    state = build(**{**CHANGES, **changes, "parallel": "ddp"})
    assert checkpoint.resume(tmp_path, state, pytest.fail)
    assert_same(whole(state), found[0][1])
    assert any(name.endswith("exp_avg") for name in found[0][1]) == (begun or optimizer == "soflow")


@pytest.mark.slow
@pytest.mark.parametrize("written", [("ddp", 4), ("fsdp", 4), ("hsdp", 4), ("fsdp", 2)], ids=str)
def test_any_ranks_read_what_any_have_written(
    written: Kind, single: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    source, wanted = single
    assert_carried(source, written, tmp_path / "run", wanted)
    for kind in (("ddp", 2), ("fsdp", 4), ("hsdp", 4), ("fsdp", 3)):
        if kind != written:
            assert_carried(tmp_path / "run", kind, tmp_path / f"{kind}", wanted)
    state = build(**CHANGES)
    assert checkpoint.resume(tmp_path / "run", state, pytest.fail)
    assert_same(whole(state), wanted)


def parts_in(folder: Path) -> dict[str, list[tuple[int, tuple[int, ...], list[int]]]]:
    """The parts of every tensor: which rank has written each, its shape, and where it begins."""
    found: dict[str, list[tuple[int, tuple[int, ...], list[int]]]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            places = json.loads(shard.metadata()["DCP_SHARDING_INFO"])
            for name in shard.keys():  # noqa: SIM118
                part = int(file.name[6:11]), tuple(shard.get_slice(name).get_shape()), places[name]["saved_offsets"]
                found.setdefault(name, []).append(part)
    return found


def test_what_all_hold_is_written_once_and_shared_out(saved: Path) -> None:
    newest = checkpoint.list_checkpoints(saved)[0]
    parts = parts_in(newest)
    state = build(**CHANGES)
    fill(state, 0)
    assert {name.replace(" ", ".", 1) for name in whole(state) if "optimizer" not in name} == {
        name for name in parts if not name.startswith("optimizer")
    }
    assert all(len(found) == 1 for found in parts.values())
    sizes = [sum(f.stat().st_size for f in newest.glob(f"shard-{rank:05d}-*")) for rank in (1, 2)]
    assert max(sizes) < 1.1 * min(sizes)
    assert all(FILE.fullmatch(file.name) for file in newest.iterdir()), "and nothing is pickled"


def only_fill(launch: Launch, kind: str, folder: Path) -> None:
    state = state_of(joined(launch, kind))
    fill(state, 1)
    checkpoint.save(folder, state)


@pytest.mark.slow
def test_each_part_is_written_by_one_rank_of_those_that_hold_it(tmp_path: Path) -> None:
    on_ranks(4, only_fill, "hsdp", tmp_path)
    newest = checkpoint.list_checkpoints(tmp_path)[0]
    parts = parts_in(newest)
    rows = sorted(parts["network.network.y_embedder.embedding_table.weight"], key=lambda part: part[2])
    assert [(shape, begin) for _, shape, begin in rows] == [((6, 16), [0, 0]), ((5, 16), [6, 0])]
    assert [shape for _, shape, _ in parts["ema.network.final_layer.linear.bias"]] == [(1,)], "no empty part"
    sizes = [sum(f.stat().st_size for f in newest.glob(f"shard-{rank:05d}-*")) for rank in (1, 2, 3, 4)]
    assert max(sizes) < 1.5 * min(sizes)


# Damage


def refusals(folder: Path) -> list[str]:
    """What is said of a checkpoint by those who read it; each refuses it in a line that names it."""
    said: list[str] = []
    for use in (checkpoint.read_verified, load, lambda folder: checkpoint.restore(folder, build(**CHANGES))):
        with pytest.raises(CheckpointError) as error:
            use(folder)
        assert folder.name in str(error.value) and "\n" not in str(error.value)
        said.append(str(error.value))
    return said


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 16
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_noticed(run: Path) -> None:
    newest = checkpoint.list_checkpoints(run)[0]
    files = sorted(newest.iterdir())
    assert len(files) == 2 * 4 + 3
    for file in files:
        content = file.read_bytes()
        for position in {0, 9, len(content) // 2, len(content) - 1}:
            flip(file, position)
            with pytest.raises(CheckpointError) as error:
                load(newest)
            assert newest.name in str(error.value) and "\n" not in str(error.value)
            file.write_bytes(content)
    load(newest)


def change(folder: Path, **contents: bytes | None) -> None:
    """Replace files of a checkpoint, "_" for ".", or remove them, and set the manifest right."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, content in contents.items():
        name = name.replace("_", ".")
        if content is None:
            (folder / name).unlink()
            del manifest["sha256"][name]
        else:
            (folder / name).write_bytes(content)
            manifest["sha256"][name] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


SHARD = "shard-00001-model-00002-of-00004.safetensors"


def test_shards_that_are_missing_or_too_many(run: Path) -> None:
    newest, before = checkpoint.list_checkpoints(run)
    shutil.copy(newest / SHARD, newest / "shard-00003-model-00002-of-00004.safetensors")
    assert all("shard-00003" in said and "not in its manifest" in said for said in refusals(newest))
    (newest / "shard-00003-model-00002-of-00004.safetensors").unlink()
    load(newest)
    (newest / SHARD).rename(run / "elsewhere")
    assert all(f"{SHARD} is missing" in said for said in refusals(newest))
    for special in (lambda: os.mkfifo(newest / SHARD), lambda: (newest / SHARD).symlink_to(run / "elsewhere")):
        special()
        assert all("not a whole checkpoint" in said for said in refusals(newest))
        (newest / SHARD).unlink()
    with (newest / SHARD).open("wb") as file:
        file.truncate(2**40)  # which nobody reads
    assert all(f"has {2**40} bytes" in said for said in refusals(newest))
    (newest / SHARD).unlink()
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["sha256"]["../x.safetensors"] = manifest["sha256"].pop(SHARD)
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert all("its manifest names '../x.safetensors'" in said for said in refusals(newest))
    warnings: list[str] = []
    assert checkpoint.resume(run, state := build(**CHANGES), warnings.append) and state.step == 1
    assert warnings[0].endswith(f"using {before.name} instead")


def edited(path: Path, edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    """A file with another header: `edit` changes it, and the places in their tensors that it tells of."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    places = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    edit(header, places)
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(places)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def test_headers_that_lie(run: Path) -> None:
    """Sums that fit what somebody else has written do not make it a checkpoint of this model."""
    newest = checkpoint.list_checkpoints(run)[0]
    whole, manifest = (newest / SHARD).read_bytes(), (newest / "manifest.json").read_bytes()
    with safe_open(newest / SHARD, "pt") as shard:
        name = next(name for name in shard.keys() if len(shard.get_slice(name).get_shape()) == 2)  # noqa: SIM118

    def shift(header: dict[str, Any], places: dict[str, Any]) -> None:
        places[name]["saved_offsets"][0] = 3

    def negative(header: dict[str, Any], places: dict[str, Any]) -> None:
        places[name]["saved_offsets"][1] = -1

    def words(header: dict[str, Any], places: dict[str, Any]) -> None:
        places[name] = "nowhere"

    def longer(header: dict[str, Any], places: dict[str, Any]) -> None:
        header[name]["shape"][0] *= 2

    def turned(header: dict[str, Any], places: dict[str, Any]) -> None:
        header[name]["shape"] = [header[name]["shape"][1] * 2, header[name]["shape"][0] // 2]

    def integers(header: dict[str, Any], places: dict[str, Any]) -> None:
        header[name]["dtype"] = "I32"

    def unknown(header: dict[str, Any], places: dict[str, Any]) -> None:
        header[name]["dtype"] = "F3"

    def renamed(header: dict[str, Any], places: dict[str, Any]) -> None:
        header["ema.x"], places["ema.x"] = header.pop(name), places.pop(name)

    for edit in (shift, negative, words, longer, turned, integers, unknown, renamed):
        change(newest, **{SHARD.replace(".", "_"): edited(newest / SHARD, edit)})
        assert len(refusals_of_content(newest)) == 2, edit
        (newest / SHARD).write_bytes(whole)
        (newest / "manifest.json").write_bytes(manifest)
    change(newest, **{SHARD.replace(".", "_"): None})
    assert all("of another model" in said for said in refusals_of_content(newest))
    (newest / SHARD).write_bytes(whole)
    (newest / "manifest.json").write_bytes(manifest)
    again = "shard-00003-model-00002-of-00004.safetensors"  # what is there already, once more
    change(newest, **{again.replace(".", "_"): whole})
    assert all("do not fit together" in said for said in refusals_of_content(newest))


def refusals_of_content(folder: Path) -> list[str]:
    """As `refusals`, of a checkpoint whose files are as its manifest says."""
    checkpoint.read_verified(folder)
    said: list[str] = []
    for use in (load, lambda folder: checkpoint.restore(folder, build(**CHANGES))):
        with pytest.raises(CheckpointError) as error:
            use(folder)
        assert str(folder) in str(error.value) and "\n" not in str(error.value)
        said.append(str(error.value))
    return said


def test_numbers_that_are_not_finite_and_another_model_are_refused(run: Path) -> None:
    newest = checkpoint.list_checkpoints(run)[0]
    content = bytearray((newest / SHARD).read_bytes())
    content[-4:] = struct.pack("<f", float("nan"))
    change(newest, **{SHARD.replace(".", "_"): bytes(content)})
    assert all("is not finite" in said for said in refusals_of_content(newest))
    config = json.loads((newest / "config.json").read_text())
    config["model"]["depth"] = 2
    change(newest, config_json=json.dumps(config).encode())
    with pytest.raises(CheckpointError, match=r"of another model: ema: network\.blocks\.1"):
        load(newest)


def test_an_earlier_version_refuses_it_and_takes_no_older_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "FORMAT", checkpoint.FORMAT - 1)
    for use in (load, lambda run: checkpoint.resume(run, build(**CHANGES), pytest.fail)):
        with pytest.raises(CheckpointError, match="of format 2; this version reads up to 1, use a later one"):
            use(run)


def resume_with_warnings(launch: Launch, kind: str, folder: Path) -> tuple[int, list[str], list[str]]:
    warnings: list[str] = []
    state, read, plain = state_of(joined(launch, kind)), [], sharded.sha256

    def counted(path: Path, most: int) -> str:
        read.append(path.name)
        return plain(path, most)

    sharded.sha256 = counted  # type: ignore[assignment]
    try:
        checkpoint.resume(folder, state, warnings.append)
    except CheckpointError as error:
        warnings.append(f"refused: {error}")
    return state.step, warnings, read


def test_all_ranks_take_the_same_checkpoint(run: Path) -> None:
    """Each verifies its share of the files: what one finds, all pass over."""
    newest, before = checkpoint.list_checkpoints(run)
    (newest.parent / ".partial-step-00000003-1").mkdir()
    (step, said, read), (other_step, other_said, other_read) = on_ranks(2, resume_with_warnings, "ddp", run)
    assert (step, other_step, said, other_said) == (2, 2, [], [])
    assert sorted(read + other_read) == sorted(file.name for file in newest.glob("shard-*"))
    assert len(read) == len(other_read)
    assert not list(newest.parent.glob(".partial-*"))
    flip(newest / other_read[0], 1000)
    found = on_ranks(2, resume_with_warnings, "ddp", run)
    assert found[0][:2] == found[1][:2]
    assert found[0][0] == 1
    assert f"{other_read[0]}: damaged" in found[0][1][0] and found[0][1][0].endswith(f"using {before.name} instead")
    flip(before / "state.json", 3)
    found = on_ranks(2, resume_with_warnings, "ddp", run)
    assert found[0][:2] == found[1][:2] and "refused: " in found[0][1][0]
    assert "no older one can be used either" in found[0][1][0]
