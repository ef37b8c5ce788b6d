"""The page that shows runs: what is read of them, whatever state they are in, and what the page makes of it."""

import base64
import fcntl
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from soflow_fast import preset
from soflow_fast.data.dataset import LatentSpace
from soflow_fast.data.identity import Identity
from soflow_fast.errors import CheckpointError, ConfigError
from soflow_fast.evaluation import DigitScores
from soflow_fast.flow import SolutionFlow
from soflow_fast.models.dit import DiT
from soflow_fast.runs import checkpoint, samples, trainer
from soflow_fast.runs.gallery import pictures, reading, ways
from soflow_fast.runs.gallery.curves import MOST_POINTS, curve, curves
from soflow_fast.runs.gallery.page import embedded, page
from soflow_fast.runs.gallery.reading import read_log, read_run, told_apart
from soflow_fast.runs.images import png, to_uint8
from soflow_fast.sampling import sample
from soflow_fast.sampling.drawing import image_noise
from tests import chromium

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)&amp;"
CPU = torch.device("cpu")


def grid(value: int, size: int = 12) -> bytes:
    return png(torch.full((size, size, 1), value % 256, dtype=torch.uint8))


def make_run(folder: Path, steps: int = 60, config: dict[str, Any] | None = None, **more: Any) -> Path:
    """A run directory with a line every step and a grid every 20."""
    (folder / "samples").mkdir(parents=True)
    known = {"steps": steps, "batch_size": 8, "preset": "digits", "optim": {"lr": 0.1}, "run": {"track": "none"}}
    (folder / "config.json").write_text(json.dumps({**known, **(config or {})}))
    lines = [
        {"step": k, "fm_loss": 2 / k, "sc_mse": 1.0, "images_per_s": 100 + k % 7, "seconds": k / 4, **more}
        for k in range(1, steps + 1)
    ]
    for line in lines[9::10]:
        line["q_cosine"] = 0.999
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for k in range(20, steps + 1, 20):
        (folder / "samples" / f"step-{k:08d}.png").write_bytes(grid(k))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has trained. Not to be written to."""
    run_dir = tmp_path_factory.mktemp("trained") / "digits"
    model = {"model.hidden_size": 16, "model.depth": 1, "model.num_heads": 2}
    every = {"run.log_every": 2, "run.sample_every": 10, "device": "cpu", "batch_size": 8, "steps": 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "measure_digits", lambda flow, n, nfe, seed, decode: DigitScores(0.5, nfe, 0.0))
        trainer.train(preset("digits", run_dir=str(run_dir), **model, **every))
    return run_dir


# Curves


def test_a_short_curve_is_all_there_and_what_is_not_finite_is_apart() -> None:
    found = curve([1, 2, 3, 4], [0.5, float("nan"), -1.0, float("inf")])
    assert found.steps == [1, 3] and found.mean == found.low == found.high == [0.5, -1.0]
    assert found.not_finite == [2, 4]
    assert curve([7], [float("nan")]).mean == []


def test_a_long_curve_is_thinned_to_means_between_their_ends() -> None:
    steps = list(range(10, 200_001, 10))
    values = [(-1.0) ** k * k for k in range(len(steps))]
    values[777] = 1e6
    found = curve(steps, values)
    assert len(found.steps) == MOST_POINTS and found.steps[-1] == 200_000
    assert max(found.high) == 1e6 and min(found.low) == min(values), "no outlier is lost"
    size = len(steps) // MOST_POINTS
    assert found.mean[0] == pytest.approx(sum(values[:size]) / size)
    assert found.steps[0] == steps[size - 1]


def test_seconds_are_of_all_starts_together() -> None:
    log = [{"step": k, "seconds": s, "loss": 1} for k, s in enumerate((1.0, 2.0, 0.5, 1.5))]
    found, seconds = curves(log)
    assert found["seconds"].mean == [1.0, 2.0, 2.5, 3.5] and seconds == 3.5


def test_what_is_no_number_is_no_curve() -> None:
    found, _ = curves([{"step": 1, "a": "x", "b": True, "c": None, "d": [1], "e": 10**400, "f": 3}])
    assert {name: (c.mean, c.not_finite) for name, c in found.items()} == {"e": ([], [1]), "f": ([3.0], [])}


# Reading


def test_a_log_that_is_damaged_or_being_written_costs_its_lines_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 4, "a": 1}\n\xff\xfe\n{"step": 2, "a": NaN}\n{"step": "x"}\n[3]\n{"step": 4, "b": 2}\n{"step": 6, "a'
    )
    entries, damaged = read_log(path)
    assert [entry["step"] for entry in entries] == [2, 4] and entries[1] == {"step": 4, "a": 1, "b": 2}
    assert damaged == 3, "the last line is not damaged: it is being written"
    assert read_log(tmp_path / "none") == ([], 0)


def test_a_run_is_read_with_its_grids_in_order(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "samples" / "final.png").write_bytes(grid(99))
    (folder / "samples" / "step-00000010.png").write_bytes(b"no image")
    (folder / "samples" / "other.png").write_bytes(grid(1))
    (folder / "evaluation.json").write_text('{"step": 60, "nfe": {"1": {"frechet": 2.5, "bad": NaN, "text": "x"}}}')
    run = read_run(folder)
    assert (run.name, run.status, run.step, run.steps, run.seconds) == ("run", "finished", 60, 60, 15.0)
    assert [shot.step for shot in run.grids] == [20, 40, 60, 60]
    assert run.grids[-1].uri == pictures.uri(grid(99), "png"), "final.png comes last"
    assert run.figures == [("step", 60), ("1.frechet", 2.5), ("1.text", "x")]
    assert run.config["optim.lr"] == 0.1
    assert run.notes == ["4 of 5 sample grids are shown."]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "steps": 90}))
    assert [shot.step for shot in read_run(folder).grids] == [20, 40, 60], "it goes on: final.png is of an earlier end"


def test_a_run_that_trains_now_is_told_by_its_lock(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", config={"steps": 90})
    (folder / ".lock").touch()
    assert read_run(folder).status == "stopped"
    handle = os.open(folder / ".lock", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert read_run(folder).status == "training now"
    os.close(handle)


@pytest.mark.parametrize(
    "config", ["", "[1]", "{", '{"steps": "many", "batch_size": -1, "model": {"depth": {"a": {}}}}']
)
def test_a_run_with_nothing_usable_in_it_is_a_page_with_notes(config: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(config)
    (folder / "metrics.jsonl").touch()
    (folder / "samples").write_text("no folder")
    run = read_run(folder)
    assert (run.step, run.steps, run.curves, run.grids) == (0, 0, {}, [])
    assert len(run.notes) == 2
    assert "There are no metrics yet" in page([run], [None], "now")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such run directory"):
        read_run(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"neither config\.json nor metrics.jsonl"):
        read_run(tmp_path)


def test_latents_without_a_vae_are_said_to_be_some(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=10)
    (folder / "samples" / "final.npy").touch()
    assert "Its samples are latents" in read_run(folder).notes[0]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    places = [tmp_path / place for place in ("a/x/run", "b/x/run", "other")]
    runs = [read_run(make_run(place, steps=1)) for place in (*places,)] + [read_run(places[2])]
    told_apart(runs)
    assert [run.name for run in runs[:2]] == ["a/x/run", "b/x/run"]
    assert len({run.name for run in runs}) == 4


def test_many_and_large_grids_are_thinned_with_the_first_and_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run", steps=400)
    monkeypatch.setattr(reading, "MOST_GRIDS", 7)
    run = read_run(folder)
    steps = [shot.step for shot in run.grids]
    assert len(steps) == 7 and (steps[0], steps[-1]) == (20, 400)
    assert run.notes == ["7 of 20 sample grids are shown."]
    monkeypatch.setattr(reading, "MOST_GRID_BYTES", 3 * len(run.grids[0].uri) + 5)
    assert len(read_run(folder).grids) in (2, 3)


def test_an_image_of_many_bytes_is_made_smaller(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (600, 2000, 3), dtype=torch.uint8)
    (tmp_path / "x.png").write_bytes(png(noise))
    uri = pictures.shown(tmp_path / "x.png")
    assert uri and uri.startswith("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        assert image.size == (1400, 420)
    (tmp_path / "x.png").write_bytes(png(noise)[:-9000])
    assert pictures.shown(tmp_path / "x.png") is None


# Ways


def test_a_way_begins_with_the_noise_and_ends_with_the_sample(trained: Path) -> None:
    flow = checkpoint.load(trained)
    found = ways.ways(trained, CPU)
    assert found.times[0] == 1 and found.times[-1] == 0 and len(found.times) == 11
    assert [name for name, _ in found.by_label] == ["0", "2", "4", "7", "9"]
    assert (found.label, found.step) == ("4", 20)
    assert found.by_label[2][1] == found.by_seed[0][1], "the same noise and label"
    ends = {name: images[-1] for name, images in found.by_seed}
    assert len(set(ends.values())) == len(ends)
    for seed in (0, 3):
        (expected,) = to_uint8(sample(flow, [4], seed=seed))
        shown = Image.open(io.BytesIO(base64.b64decode(ends[f"seed {seed}"].partition(",")[2])))
        error = (torch.tensor(list(shown.tobytes())) - expected.flatten().int()).abs().max()
        assert error <= 1, "a batch of another size rounds differently"


@pytest.mark.parametrize("changes", [{"objective.kind": "flow-matching"}, {"model.guidance_range": (1.0, 4.0)}])
def test_a_way_of_a_flow_of_another_kind_ends_with_its_sample_too(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Euler's steps of a velocity are the calls of its sample; a scale of guidance is that of the sample."""
    config = preset("digits", **{"model.hidden_size": 16, "model.depth": 1, "model.num_heads": 2, **changes})
    network = DiT(config.model).eval()
    for number, parameter in enumerate(network.parameters()):
        with torch.no_grad():
            parameter.copy_(0.2 * image_noise(number, 0, 0, parameter.shape))
    flow = SolutionFlow(network, objective=config.objective.kind)
    monkeypatch.setattr(ways, "load_with_data", lambda place, device: (flow, config, None))
    monkeypatch.setattr(ways, "cell", lambda image: image)
    found = ways.ways(tmp_path, CPU)
    assert found.solves == ("objective.kind" not in changes)
    (expected,) = to_uint8(sample(flow, [4], seed=2))
    assert (found.by_seed[2][1][-1].int() - expected.int()).abs().max() <= 1, "a batch of another size rounds otherwise"


def test_latents_are_shown_by_their_vae_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VAE that shows the first channel, four times as large."""
    config = preset("digits-latent", **{"model.hidden_size": 16, "model.depth": 1, "model.num_heads": 2})
    flow = SolutionFlow(DiT(config.model)).eval()
    space = LatentSpace("a-vae", 1.0, 0.0)
    data = Identity("latents", 10, (4, 4, 4), tuple("abcdefghij"), (1,) * 10, "0", space)
    asked: list[tuple[str, bool, int]] = []

    class Enlarging:
        def decoded(self, x: torch.Tensor, space: LatentSpace) -> torch.Tensor:
            return x[:, :1].repeat_interleave(4, 2).repeat_interleave(4, 3)

    def load_vae(name: str, device: torch.device, *, local: bool, channels: int) -> Enlarging:
        asked.append((name, local, channels))
        return Enlarging()

    monkeypatch.setattr(ways, "load_vae", load_vae)
    monkeypatch.setattr(ways, "load_with_data", lambda place, device: (flow, config, data))
    found = ways.ways(tmp_path, CPU)
    assert asked == [("a-vae", True, 4)] and found.label == "e"
    assert [name for name, _ in found.by_label] == ["a", "c", "e", "h", "j"]
    with Image.open(io.BytesIO(base64.b64decode(found.by_label[0][1][0].partition(",")[2]))) as image:
        assert image.size == (16, 16)
    monkeypatch.setattr(ways, "load_with_data", lambda place, device: (flow, config, replace(data, space=None)))
    with pytest.raises(CheckpointError, match="do not say of which VAE"):
        ways.ways(tmp_path, CPU)


def test_a_run_without_a_checkpoint_has_no_way(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        ways.ways(make_run(tmp_path / "run"), CPU)


# The page


class Elements(HTMLParser):
    """The elements of a page, and what is in its script elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.links: list[str] = []
        self.scripts: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] += data


def test_the_page_is_one_file_and_takes_no_name_for_html(tmp_path: Path) -> None:
    config = {"</script>": "<b>x</b>", "preset": "<i>\u2028"}
    folder = make_run(tmp_path / HOSTILE, config=config, **{"</script><b>": 1.0, "<!--": 2.0})
    text = page([read_run(folder)], [None], "<now>")
    elements = Elements(text)
    assert elements.names.count("script") == 2 and elements.names.count("img") == 1 and "b" not in elements.names
    assert [link for link in elements.links if not link.startswith(("data:", "#"))] == []
    assert re.search(r"default-src 'none'", text) and "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    data = json.loads(elements.scripts[0])
    assert data["runs"][0]["name"] == HOSTILE and data["made"] == "<now>"
    assert "</script><b>" in data["runs"][0]["curves"]
    assert {"name": "</script>", "values": ['"<b>x</b>"'], "differs": False} in data["config"]


def test_json_in_a_page_ends_no_element() -> None:
    value = ["</script>", "<!--", "]]>", "&lt;", "\u2028"]
    text = embedded(value)
    assert not re.search("[<>&\u2028]", text) and json.loads(text) == value


def test_the_command_writes_a_page_and_says_what_is_missing(
    trained: Path, call: Callable[..., Any], refused: Callable[..., str], tmp_path: Path
) -> None:
    out, other = tmp_path / "pages" / "a.html", make_run(tmp_path / "other")
    result = call("gallery", trained, other, "--out", out, "--device", "cpu")
    assert result.code == 0 and re.search(rf"^2 runs, 0\.\d MB: {out}$", result.out, re.MULTILINE), result
    assert "other: No way of noise is drawn: holds no checkpoint.\n" in result.out
    data = json.loads(Elements(out.read_text()).scripts[0])
    first, second = data["runs"]
    assert first["name"] == "digits" and first["ways"]["step"] == 20 and second["ways"] is None
    assert [shot["step"] for shot in first["grids"]] == [10, 20]
    assert dict(first["figures"])["2.frechet"] == 2
    assert "optim.lr" in [row["name"] for row in data["config"] if row["differs"]]
    assert call("gallery", other, "--out", out, "--device", "cpu").code == 0, "a page is written again"
    (tmp_path / "mine.html").write_text("mine")
    assert "is no gallery, and stays" in refused("gallery", other, "--out", tmp_path / "mine.html")
    assert "is a folder" in refused("gallery", other, "--out", tmp_path)
    assert "no such run directory" in refused("gallery", tmp_path / "none", "--out", out)
    assert "a page shows 16 at most" in refused("gallery", *[other] * 17, "--out", out)


# In a browser

needs_chromium = pytest.mark.skipif(chromium.found() is None, reason="there is no Chromium (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Page]:
    with chromium.page() as opened:
        yield opened


@pytest.fixture(scope="module")
def written(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a page of two runs: one of few lines, one of many, with a hostile name and numbers."""
    folder = tmp_path_factory.mktemp("gallery")
    run = Path(shutil.copytree(trained, folder / "digits"))
    other = make_run(folder / HOSTILE, steps=1200, config={"steps": 2000}, **{"<b>": 1.0})
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    lines[500]["fm_loss"] = float("nan")
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 12')
    runs = [read_run(run), read_run(other)]
    (folder / "page.html").write_text(page(runs, [ways.ways(run, CPU), None], "As of now"))
    return (folder / "page.html").as_uri()


@needs_chromium
def test_the_page_draws_and_moves_in_a_browser_without_an_error(browser: chromium.Page, written: str) -> None:
    browser.open(written)
    chromium.saved(browser.picture(whole=True), "gallery-light.png")
    assert browser.value("document.title") == f"digits and {HOSTILE} – soflow-fast"
    assert browser.value("[document.scripts.length, document.querySelectorAll('[onerror]').length]") == [2, 0]

    charts = browser.value(
        "Object.fromEntries([...document.querySelectorAll('.chart')].map(c => [c.dataset.metric,"
        " [...c.querySelectorAll('.smoothed')].map(p => (p.getAttribute('d').match(/[ML]/g) || []).length)]))"
    )
    assert charts["fm_loss"] == [10, MOST_POINTS] and charts["q_cosine"][-1] == 120 and charts["<b>"] == [MOST_POINTS]
    assert {"sc_mse", "grad_norm", "images_per_s", "memory_mb"} <= charts.keys() and "seconds" not in charts
    assert browser.value("document.querySelectorAll('[data-metric=fm_loss] .wrong').length") == 1
    assert browser.value("document.querySelectorAll('svg path').length") > 20
    assert browser.value("[...document.querySelectorAll('svg')].every(e => !/NaN|Infinity/.test(e.innerHTML))")

    source = "document.querySelectorAll('#grids img')[1].src"
    assert browser.value("document.querySelectorAll('#grids img').length") == 2
    last = browser.value(source)
    browser.value("document.getElementById('time').focus()")
    browser.key("Home")
    first = browser.value(source)
    browser.key("ArrowRight")
    browser.key("ArrowRight")
    third = browser.value(source)
    assert len({first, third, last}) == 3, "the slider changes the image"
    assert browser.value("document.getElementById('time-text').textContent") == "step 40"
    assert browser.value("[...document.querySelectorAll('#grids img, .way img')].every(i => i.naturalWidth > 0)")
    assert browser.value("document.querySelectorAll('.way img').length") == 11 * 10
    assert browser.errors == []


@needs_chromium
def test_values_are_read_by_the_pointer_and_by_keys(browser: chromium.Page, written: str) -> None:
    browser.open(written)
    chart = "document.querySelector('[data-metric=fm_loss] svg')"
    browser.value(f"{chart}.scrollIntoView({{block: 'center'}})")
    x, y, width = browser.value(f"(b => [b.left, b.top + 90, b.width])({chart}.getBoundingClientRect())")
    browser.move(x + 60, y)
    near = browser.value("document.getElementById('tip').innerText")
    assert re.match(r"step \d", near) and HOSTILE in near and "digits" not in near, "that ends at step 20"
    chromium.saved(browser.picture(), "gallery-pointer.png")
    browser.move(x + width * 0.5, y)
    assert browser.value("document.getElementById('tip').innerText") != near
    browser.move(2, 2)
    assert browser.value("document.getElementById('tip').hidden")
    browser.value(f"{chart}.focus()")
    browser.key("End")
    assert "step 1,200: " in browser.value("document.getElementById('said').textContent")
    browser.key("ArrowLeft")
    assert "step 1,197: " in browser.value("document.getElementById('said').textContent")
    browser.key("Escape")
    assert browser.value("document.getElementById('tip').hidden") and browser.errors == []


@needs_chromium
def test_axes_runs_smoothing_and_scale_change_the_charts(browser: chromium.Page, written: str) -> None:
    browser.open(written)
    card = "document.querySelector('[data-metric=fm_loss]')"
    lines = f"[...{card}.querySelectorAll('.smoothed')].map(p => p.getAttribute('d'))"
    ticks = f"[...{card}.querySelectorAll('text')].map(t => t.textContent).join(' ')"
    seen = [browser.value(lines)]
    assert browser.value(f"{card}.querySelector('.log').getAttribute('aria-pressed')") == "true", "it falls by 1000"
    for click in (f"{card}.querySelector('.log')", "document.querySelector('#axis [value=time]')"):
        browser.value(f"{click}.click()")
        browser.frame()
        seen.append(browser.value(lines))
    assert " min" in browser.value(ticks) or " s" in browser.value(ticks)
    browser.value("(s => { s.value = 0; s.dispatchEvent(new Event('input')); })(document.getElementById('smooth'))")
    browser.frame()
    seen.append(browser.value(lines))
    assert len({tuple(drawn) for drawn in seen}) == 4
    browser.value("document.querySelectorAll('#chips input')[1].click()")
    browser.frame()
    assert len(browser.value(lines)) == 1 and browser.errors == []


@needs_chromium
def test_light_and_dark_differ_and_a_phone_needs_no_scrolling_aside(browser: chromium.Page, written: str) -> None:
    def brightness() -> float:
        picture = browser.picture()
        with Image.open(io.BytesIO(picture)) as image:
            return torch.tensor(list(image.convert("L").resize((64, 64)).tobytes())).float().mean().item()

    browser.open(written)
    light = brightness()
    browser.open(written, dark=True)
    chromium.saved(browser.picture(whole=True), "gallery-dark.png")
    assert light > 180 and brightness() < 80
    browser.value("document.querySelector('#theme [value=light]').click()")
    browser.frame()
    assert brightness() == pytest.approx(light, abs=3)
    browser.value("document.querySelector('#theme [value=auto]').click()")
    browser.open(written, width=390, height=800)
    chromium.saved(browser.picture(whole=True), "gallery-phone.png")
    assert browser.value("document.documentElement.scrollWidth") == 390
    browser.scheme(dark=False)
    assert browser.errors == []
