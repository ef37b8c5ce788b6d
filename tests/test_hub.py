"""Weights given away: folders that are exact and verified, the model card, and what goes to the hub."""

import inspect
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from soflow_fast import SolutionFlow, TrainState, export, load, preset, sample
from soflow_fast.config.presets import PRESETS
from soflow_fast.config.schema import RunConfig, override
from soflow_fast.data.dataset import LatentSpace
from soflow_fast.errors import CheckpointError
from soflow_fast.evaluation import about_digits
from soflow_fast.hub import card
from soflow_fast.runs import checkpoint, source_code
from soflow_fast.runs.checkpoint import load_with_data, published
from soflow_fast.runs.trainer import beginning
from soflow_fast.train import configuration
from tests.published import FIGURES, NAMES, FakeHub, assert_same, known_run, small_flow
from tests.states import advance, build


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return known_run(tmp_path_factory.mktemp("known") / "run")


@pytest.fixture
def saved(run: Path, tmp_path: Path) -> Path:
    load(run).save_pretrained(tmp_path / "given")
    return tmp_path / "given"


def test_a_folder_gives_back_the_same_flow_and_what_is_known_of_it(run: Path, saved: Path) -> None:
    assert sorted(os.listdir(saved)) == ["README.md", "config.json", "manifest.json", "model.safetensors"]
    flow = load(run)
    for back in (SolutionFlow.from_pretrained(saved), load(saved), SolutionFlow.from_pretrained(str(saved))):
        assert_same(back, flow)
        assert not back.training and not any(p.requires_grad for p in back.parameters())
        assert back.origin.data == flow.origin.data and back.origin.data.classes == NAMES
        assert (back.origin.step, back.origin.code["commit"]) == (2, "0123abc")
        assert back.origin.figures == flow.origin.figures and back.origin.figures["nfe"]["1"] == FIGURES
        assert torch.equal(sample(back, [1, 2], seed=0), sample(flow, [1, 2], seed=0))
    again = saved.parent / "again"
    SolutionFlow.from_pretrained(saved).save_pretrained(again)
    assert (again / "config.json").read_bytes() == (saved / "config.json").read_bytes()
    assert (again / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_flow_of_nobody_keeps_its_dtype_path_and_coefficients(dtype: torch.dtype, tmp_path: Path) -> None:
    flow = small_flow(4, path="trig", coefficients="trig").to(dtype)
    flow.save_pretrained(tmp_path / "given")
    back, config, data = load_with_data(tmp_path / "given")
    assert_same(back, flow)
    assert (config.model, data, back.origin) == (flow.network.config, None, None)
    assert config.data.latent and config.flow.path == "trig"  # of four channels: no colours
    assert_same(SolutionFlow.from_pretrained(tmp_path / "given", dtype=torch.float32), flow.float())
    assert "is not recorded" in (tmp_path / "given" / "README.md").read_text()


def test_a_network_that_normalises_queries_and_keys_is_kept_and_given_away(tmp_path: Path) -> None:
    """Through a run, which goes on to the bit, an exported directory, a folder of the hub and a pipeline's part."""
    place = known_run(tmp_path / "run", **{"model.qk_norm": True})
    flow, config, _ = load_with_data(place)
    weight = flow.network.blocks[0].attn.q_norm.weight
    assert config.model.qk_norm and weight.shape == (8,)
    state = TrainState.build(config)
    assert checkpoint.resume(place, state, print) and state.step == 2
    straight = advance(build(**{"model.qk_norm": True}), 4)
    for a, b in zip(advance(state, 2).flow.parameters(), straight.flow.parameters(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        weight.copy_(torch.linspace(0.5, 1.5, 8))
    export(flow, config, tmp_path / "exported")
    flow.save_pretrained(tmp_path / "given")
    for back in (load(tmp_path / "exported"), SolutionFlow.from_pretrained(tmp_path / "given")):
        assert_same(back, flow)
        assert torch.equal(sample(back, [1, 2], seed=0), sample(flow, [1, 2], seed=0))
    assert "normalised queries and keys" in (tmp_path / "given" / "README.md").read_text()
    assert "model.qk_norm=True" in (tmp_path / "given" / "README.md").read_text()


def test_a_configuration_from_before_there_were_norms_of_queries_and_keys(saved: Path) -> None:
    values = json.loads((saved / "config.json").read_text())
    assert values["model"].pop("qk_norm") is False
    values["run"]["config"]["model"].pop("qk_norm")
    (saved / "manifest.json").unlink()
    (saved / "config.json").write_text(json.dumps(values))
    assert not load(saved).network.config.qk_norm


def test_a_flow_for_a_range_of_guidance_scales_is_given_away_as_such(tmp_path: Path) -> None:
    flow = small_flow(guidance_range=(1.0, 4.0))
    flow.save_pretrained(tmp_path / "given")
    back = SolutionFlow.from_pretrained(tmp_path / "given")
    assert_same(back, flow)
    assert back.network.config == flow.network.config
    assert torch.equal(sample(back, [1, 2], seed=0, guidance=3), sample(flow, [1, 2], seed=0, guidance=3))
    run = known_run(tmp_path / "run", **{"model.guidance_range": (1.0, 4.0)})
    load(run).save_pretrained(tmp_path / "known")
    text = (tmp_path / "known" / "README.md").read_text()
    assert "| guidance | 1 to 4, chosen by samples |" in text and "--guidance-range 1.0,4.0" in text
    figures = {"samples": 4000, "guidance": 2.0, "nfe": {"1": FIGURES}}
    assert "Of 4000 samples at guidance 2, fewer" in "".join(card._figures(figures))
    figures |= about_digits(4000)
    assert "weights, compared with 1797 real digits:" in "".join(card._figures(figures))


@pytest.mark.parametrize("objective", ["flow-matching", "meanflow"])
def test_the_objective_is_given_away_too(objective: Any, tmp_path: Path) -> None:
    """Of a run and of a flow of nobody, so that samples are drawn as they are to be."""
    nobody, trained = small_flow(objective=objective), load(known_run(tmp_path / "run", objective=objective))
    for name, flow in (("nobody", nobody), ("trained", trained)):
        flow.save_pretrained(tmp_path / name)
        back, config, _ = load_with_data(tmp_path / name)
        assert_same(back, flow)
        assert config.objective.kind == objective
        assert torch.equal(sample(back, [1, 2], seed=0), sample(flow, [1, 2], seed=0))
        text = (tmp_path / name / "README.md").read_text()
        wanted = (
            ("by flow matching", "nfe=10", "- flow-matching") if objective == "flow-matching" else ("MeanFlow", "nfe=1")
        )
        assert all(part in text for part in wanted) and "[SoFlow]" not in text
    assert f"--objective {objective}" in (tmp_path / "trained" / "README.md").read_text()
    values = json.loads((tmp_path / "nobody" / "config.json").read_text())
    values["flow"]["objective"] = "else"
    (tmp_path / "nobody" / "config.json").write_text(json.dumps(values))
    (tmp_path / "nobody" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"objective\.kind must be one of soflow"):
        load(tmp_path / "nobody")


def test_whatever_load_reads_can_be_had(run: Path, tmp_path: Path) -> None:
    flow = load(run)
    export(flow, flow.origin.config, tmp_path / "exported")
    for place in (run, run / "checkpoints" / "step-00000002", tmp_path / "exported"):
        assert_same(SolutionFlow.from_pretrained(place), flow)
    assert load(tmp_path / "exported").origin.step is None  # an exported directory says no more than its configuration


def test_names_of_classes_come_along_to_the_commands(saved: Path, call: Any, tmp_path: Path) -> None:
    drawn = call("sample", saved, "--out", tmp_path / "out", "--labels", "newt,null", "--n", "2", "--device", "cpu")
    assert (drawn.code, drawn.err) == (0, "") and drawn.out.startswith("classes: newt, null\n")


def test_a_run_begins_with_weights_in_half_precision(run: Path, tmp_path: Path) -> None:
    flow = load(run).to(torch.bfloat16)
    config = override(flow.origin.config, {"run.init": str(tmp_path / "given")})
    flow.save_pretrained(tmp_path / "given")
    start = beginning(config, tmp_path / "new")
    assert start is not None and {value.dtype for value in start.network.values()} == {torch.float32}
    for weights in (start.network, start.average):
        assert all(torch.equal(value.float(), weights[name]) for name, value in flow.state_dict().items())


def test_nothing_of_one_machine_is_given_away(tmp_path: Path) -> None:
    flow = load(known_run(tmp_path / "run", **{"data.vae": "/secret/vae"}))
    flow.save_pretrained(tmp_path / "given")
    assert flow.origin.config.data.path == "/secret/data"
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "given").iterdir())


def test_the_card_says_what_is_known(saved: Path) -> None:
    text = (saved / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header).keys() == {"library_name", "pipeline_tag", "tags"}
    assert body.startswith("\n# given\n") and "(depth 1, hidden size 16, patches of 4)" in body
    assert 'SolutionFlow.from_pretrained("given")' in body
    assert "- folder of images: 40 samples of 1 x 8 x 8\n- 10 classes: cat, dog, hound, 3, newt" in body
    assert "| steps | 2 of 20 |" in body and "| commit | 0123abc |" in body and "| torch | 2.13.0 |" in body
    assert "Of 4000 samples, fewer than the 50000 that are usual" in body
    table = (
        "| network calls | accuracy | frechet | near copies |\n| --- | --- | --- | --- |\n| 1 | 0.975 | 21.25 | 0.5 |"
    )
    assert f"{table}\n| 2 | 0.99 | 21.25 | 0.5 |" in body
    line = next(line for line in body.splitlines() if line.startswith("python -m"))
    assert "--steps 20" in line and "--set model.hidden_size=16" in line


def test_a_card_of_a_hostile_data_set_stays_in_its_lines(run: Path) -> None:
    flow = load(run)
    names = ("<b>a|b\n# c", *NAMES[1:])
    hostile = replace(flow.origin, data=replace(flow.origin.data, classes=names), figures={"fid": [1.5]})
    text = card.model_card(flow, hostile, "x")
    assert "10 classes: &lt;b>a\\|b\\n# c, dog" in text and "\n# c" not in text
    assert (
        '```json\n{\n  "fid": [\n    1.5\n  ]\n}\n```' in text
    )  # figures that are not known here are shown as they are


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_in_the_card_trains_the_same(name: str) -> None:
    layers = {"dit": "model.depth", "unet": "model.blocks", "policy": "model.num_layers"}[preset(name).model.kind]
    changes = {"steps": 30, "seed": 7, "objective.sc_time": (0.25, 1.5), "data.resize": True, layers: 3}
    config = preset(name, run_dir="/secret", compile=True, **changes)
    words = shlex.split(card.command(config))
    assert words[:3] == ["python", "-m", "soflow_fast.train"] and "/secret" not in words
    got, _ = configuration(words[3:])
    wanted = replace(config, run=RunConfig(), micro_batch=got.micro_batch, data=replace(config.data, path=""))
    assert replace(got, run=RunConfig(), data=replace(got.data, path="")) == wanted


@pytest.mark.parametrize("name", ["cifar10", "cifar10-unet"])
def test_the_command_of_another_preset_names_all_that_differs(name: str) -> None:
    config = replace(preset(name), preset="mine")
    got, _ = configuration(shlex.split(card.command(config))[3:])
    assert (got.model, got.optim, got.objective, got.steps) == (
        *(config.model, config.optim, config.objective),
        config.steps,
    )


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_damage_is_noticed(saved: Path) -> None:
    for name, place in (
        ("model.safetensors", -1),
        ("model.safetensors", 9),
        ("config.json", -3),
        ("manifest.json", -9),
    ):
        flip(saved / name, place)
        with pytest.raises(CheckpointError, match=f"{saved}.*(damaged|not a whole)"):
            load(saved)
        flip(saved / name, place)
    load(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        load(saved)


def test_a_folder_of_another_network_is_refused(saved: Path, tmp_path: Path) -> None:
    values = json.loads((saved / "config.json").read_text())
    (saved / "manifest.json").unlink()  # as of a folder that somebody has put together
    for section, name, value, said in (
        ("model", "depth", 2, "of another model: network.blocks.1"),
        ("model", "depth", "two", "model.depth must be a whole number"),
        ("flow", "path", "round", "flow.path must be one of linear, trig"),
        ("run", "step", "two", "run.step must be a whole number"),
        ("data", "count", "many", "no identity of a data set"),
    ):
        changed = {**values, section: {**values[section], name: value}}
        (saved / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=said):
            load(saved)


def test_what_cannot_be_saved_is_named(run: Path, saved: Path, tmp_path: Path) -> None:
    flow = load(run)
    for place in (run, run / "checkpoints" / "step-00000002"):
        before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match="holds something else, such as a run"):
            flow.save_pretrained(place)
        assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        flow.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="its network is a Linear; only a DiT or a U-Net can be saved"):
        SolutionFlow(torch.nn.Linear(1, 1)).save_pretrained(tmp_path / "new")
    broken = small_flow()
    broken.network.x_embedder.proj.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"x_embedder\.proj\.bias is not finite"):
        broken.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_older_folder_is_overwritten_but_for_its_card(saved: Path) -> None:
    (saved / "README.md").write_text("mine")
    flow = small_flow()
    flow.save_pretrained(saved)
    assert_same(load(saved), flow)
    assert (saved / "README.md").read_text() == "mine"


def test_an_overwriting_that_was_cut_off_is_noticed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(published, "write_file", fail)
        small_flow().save_pretrained(saved)
    assert not [name for name in os.listdir(saved) if "partial" in name]
    with pytest.raises(CheckpointError, match="damaged"):
        load(saved)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    found = FakeHub(tmp_path / "repository")
    monkeypatch.setitem(sys.modules, "huggingface_hub", found)
    return found


def test_what_goes_to_the_hub_is_what_is_saved(run: Path, saved: Path, fake: FakeHub) -> None:
    flow = load(run)
    assert flow.push_to_hub("cats", private=True, token="t", commit_message="first", create_pr=True) == "commit"
    assert fake.asked == [
        ("HfApi", "t"),
        ("create_repo", "cats", {"private": True, "exist_ok": True}),
        ("upload_folder", {"repo_id": "me/cats", "commit_message": "first", "create_pr": True}),
    ]
    for name in ("config.json", "manifest.json", "model.safetensors"):
        assert (fake.folder / name).read_bytes() == (saved / name).read_bytes()
    text = (saved / "README.md").read_text()
    assert (fake.folder / "README.md").read_text() == text.replace("given", "cats")
    (fake.folder / "README.md").write_text("written by hand")
    small_flow().push_to_hub("cats")
    assert (fake.folder / "README.md").read_text() == "written by hand"
    assert_same(load(fake.folder), small_flow())


def test_a_repository_is_read_from_the_cache(run: Path, fake: FakeHub, tmp_path: Path) -> None:
    flow = load(run)
    flow.push_to_hub("me/cats")
    fake.asked.clear()
    where = {"revision": "v1", "token": "t", "cache_dir": tmp_path, "local_files_only": True}
    back = SolutionFlow.from_pretrained("me/cats", dtype=torch.bfloat16, **where)
    assert_same(back, flow.to(torch.bfloat16))
    ((_, name, asked),) = fake.asked
    assert name == "me/cats" and {key: asked[key] for key in where} == where
    assert "model.safetensors" in asked["allow_patterns"] and "README.md" not in asked["allow_patterns"]


def test_the_hub_is_called_as_its_package_has_it() -> None:
    """The calls that `FakeHub` takes fit the functions of huggingface_hub."""
    hub = pytest.importorskip("huggingface_hub")
    api = hub.HfApi(token="t")
    for function, given, settings in (
        (api.create_repo, ["me/cats"], {"private": True, "exist_ok": True}),
        (api.file_exists, ["me/cats", "README.md"], {}),
        (api.upload_folder, [], {"repo_id": "", "folder_path": "", "commit_message": "", "create_pr": True}),
        (
            hub.snapshot_download,
            ["me/cats"],
            {"allow_patterns": [], "revision": "", "token": "", "cache_dir": "", "local_files_only": True},
        ),
    ):
        inspect.signature(function).bind(*given, **settings)


def test_a_vae_in_a_folder_is_not_named_on_the_hub(fake: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    for vae, named in ((str(tmp_path / "vae"), ""), ("stabilityai/sd-vae-ft-ema", "stabilityai/sd-vae-ft-ema")):
        space = LatentSpace(vae, (0.5, 1.0, 2.0, 4.0), 0.25)
        run = known_run(tmp_path / vae.replace("/", "-"), space, **{"model.in_channels": 4, "data.kind": "latents"})
        flow = load(run)
        flow.push_to_hub("me/latents")
        assert SolutionFlow.from_pretrained(fake.folder).origin.data.space == space._replace(vae=named)
        flow.save_pretrained(tmp_path / "here")  # where it can be decoded by that VAE
        assert load(tmp_path / "here").origin.data.space == space


def test_a_run_of_the_command_tells_its_figures_and_its_command(finished: Any, tmp_path: Path) -> None:
    flow = load(finished.folder)
    flow.save_pretrained(tmp_path / "given")
    text = (tmp_path / "given" / "README.md").read_text()
    figures = json.loads((finished.folder / "evaluation.json").read_text())["nfe"]
    assert flow.origin.figures["nfe"] == figures and f"\n| 1 | {figures['1']['accuracy']:.4g} | " in text
    known, commit = source_code.commit(source_code.ROOT), flow.origin.code["commit"]
    assert (known or "")[:40] == (commit or "")[:40]  # whether files were changed since is not the run's affair
    assert (f"| commit | {commit} |" in text) == (commit is not None)
    line = next(line for line in text.splitlines() if line.startswith("python -m"))
    got, _ = configuration(shlex.split(line)[3:])
    trained = flow.origin.config
    assert (got.model, got.objective, got.optim, got.steps, got.precision, got.seed) == (
        *(trained.model, trained.objective, trained.optim, trained.steps, trained.precision, trained.seed),
    )


def test_what_is_asked_for_wrongly(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="dtype must be a floating-point dtype"):
        SolutionFlow.from_pretrained(saved, dtype=torch.int8)
    for name in ("nowhere", "./no/where", "a/b/c", "/no/where"):
        with pytest.raises(CheckpointError, match="no such run or checkpoint"):
            SolutionFlow.from_pretrained(name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for ask in (lambda: SolutionFlow.from_pretrained("me/cats"), lambda: load(saved).push_to_hub("me/cats")):
        with pytest.raises(ImportError, match=r"pip install 'soflow-fast\[hub\]'$"):
            ask()


ALONE = """
import sys
sys.modules["huggingface_hub"] = sys.modules["diffusers"] = None
from soflow_fast import SolutionFlow, load
flow = load(sys.argv[1])
flow.save_pretrained(sys.argv[2])
SolutionFlow.from_pretrained(sys.argv[2])
try:
    import soflow_fast.pipeline
except ImportError as error:
    print(error)
"""


def test_folders_need_neither_huggingface_hub_nor_diffusers(run: Path, tmp_path: Path, environment: Any) -> None:
    command = [sys.executable, "-c", ALONE, str(run), str(tmp_path / "given")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.stderr, done.stdout) == ("", "soflow_fast.pipeline needs diffusers: pip install 'soflow-fast[hub]'\n")


def test_a_commit_is_that_of_the_checkout_alone(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert source_code.commit(tmp_path) is None
    git("init", "-q")
    assert source_code.commit(tmp_path) is None  # there is no commit yet
    (tmp_path / "a").write_text("a")
    git("add", "a")
    git("commit", "-q", "-m", "first")
    assert source_code.commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "new").touch()
    assert source_code.commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "a").write_text("b")
    assert source_code.commit(tmp_path) == git("rev-parse", "HEAD") + "-dirty"
    (tmp_path / "site-packages").mkdir()
    assert source_code.commit(tmp_path / "site-packages") is None
    assert source_code.read(tmp_path) == {}
    assert source_code.versions().keys() == {"soflow-fast", "commit", "torch"}
