"""`SoFlowPipeline`: the images of `sample`, by diffusers' conventions."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.callbacks import PipelineCallback
from safetensors.torch import load_file, save_file

from soflow_fast import DiT, SolutionFlow, load, sample
from soflow_fast.data.dataset import LatentSpace
from soflow_fast.errors import CheckpointError, ConfigError
from soflow_fast.pipeline import FlowModel, SoFlowPipeline
from soflow_fast.runs.images import to_uint8
from soflow_fast.runs.latents.vae import VAE
from tests.published import NAMES, FakeHub, assert_same, known_run, small_flow

SPACE = LatentSpace("a/vae", (0.5, 1.0, 2.0, 4.0), (0.25, 0.0, 0.0, -0.25))
LATENT = {"model.in_channels": 4, "data.kind": "latents"}


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_vae(**settings: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "down_block_types": ("DownEncoderBlock2D",) * 2}
    kinds = {"up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "sample_size": 16}
    return AutoencoderKL(**{**blocks, **kinds, **settings}).eval()


def quiet(pipe: Any) -> SoFlowPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> SoFlowPipeline:
    return quiet(SoFlowPipeline(flow=small_flow(), vae=None))


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> SolutionFlow:
    """Of a run whose classes have names."""
    return load(known_run(tmp_path_factory.mktemp("named") / "run"))


@pytest.fixture(scope="module")
def of_latents(tmp_path_factory: pytest.TempPathFactory) -> SolutionFlow:
    flow = load(known_run(tmp_path_factory.mktemp("latents") / "run", SPACE, **LATENT))
    flow.network = small_flow(4).network  # off its zeros
    return flow


def test_a_network_without_a_null_label_is_not_asked_for_one() -> None:
    model = replace(small_flow().network.config, null_label=False)
    pipe = quiet(SoFlowPipeline(flow=SolutionFlow(DiT(model)), vae=None))
    for labels in (None, ["null"], [0, model.num_classes]):
        with pytest.raises(ValueError, match="class_labels must be classes: the network has no null label"):
            pipe(class_labels=labels)
    assert len(pipe(class_labels=[0, model.num_classes - 1], output_type="pt").images) == 2


def test_vectors_are_given_as_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = quiet(SoFlowPipeline(flow=small_flow(condition_size=6), vae=None))
    noise, vectors = torch.randn(4, 1, 8, 8, generator=source(5)), torch.randn(2, 6, generator=source(1))
    each = {"latents": noise, "output_type": "latent", "num_images_per_label": 2}
    wanted = sample(pipe.flow, vectors.repeat_interleave(2, 0), noise=[noise])
    for given in (vectors, vectors.numpy(), vectors.double()):
        torch.testing.assert_close(pipe(prompt_embeds=given, **each).images, wanted)
    alone = pipe(latents=noise[:1], output_type="latent").images
    assert torch.equal(alone, sample(pipe.flow, noise=[noise[:1]]))
    for settings, said in (
        ({"class_labels": [1]}, "class_labels must be left out: the network takes vectors; give prompt_embeds"),
        ({"prompt_embeds": vectors[:, :5]}, r"prompt_embeds must be vectors \[B, 6\], floating, got torch.float32"),
        ({"prompt_embeds": "a dog"}, r"prompt_embeds must be vectors \[n, 6\], got 'a dog'"),
        ({"prompt_embeds": vectors * torch.nan}, "prompt_embeds must be finite, row 0 of it is not"),
    ):
        with pytest.raises(ValueError, match=said):
            pipe(**settings)
    with pytest.raises(ValueError, match="prompt_embeds must be left out: the network takes no vectors"):
        quiet(SoFlowPipeline(flow=small_flow(), vae=None))(prompt_embeds=vectors)
    with pytest.raises(ValueError, match="prompt_embeds must be given"):
        quiet(SoFlowPipeline(flow=small_flow(condition_size=6, null_label=False), vae=None))()
    pipe.save_pretrained(tmp_path / "given")
    again = quiet(SoFlowPipeline.from_pretrained(tmp_path / "given"))
    assert torch.equal(again(prompt_embeds=vectors, **each).images, pipe(prompt_embeds=vectors, **each).images)
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec((tmp_path / "given" / "README.md").read_text().split("```python\n")[1].split("```")[0], space)
    assert space["image"].size == (8, 8)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_samples_are_those_of_sample(steps: int, pipe: SoFlowPipeline) -> None:
    generator = source(5)
    noise = [torch.randn(3, 1, 8, 8, generator=generator) for _ in range(steps)]
    wanted = sample(pipe.flow, [1, 2, 10], nfe=steps, noise=noise)
    drawn = [
        pipe([1, 2, "null"], steps, generator=source(5), output_type=output).images
        for output in ("latent", "pt", "np", "pil")
    ]
    assert torch.equal(drawn[0], wanted)
    assert torch.equal(drawn[1], (wanted / 2 + 0.5).clamp(0, 1)) and drawn[1].shape == (3, 1, 8, 8)
    assert drawn[2].shape == (3, 8, 8, 1) and np.array_equal(drawn[2][..., 0], drawn[1][:, 0].numpy())
    assert [image.mode for image in drawn[3]] == ["L"] * 3
    assert np.array_equal(np.stack([np.asarray(image) for image in drawn[3]]), to_uint8(wanted)[..., 0].numpy())


@pytest.mark.parametrize("steps", [None, 3])
def test_flow_matching_goes_along_its_velocity(steps: int | None, tmp_path: Path) -> None:
    pipe = quiet(SoFlowPipeline(flow=small_flow(objective="flow-matching"), vae=None))
    noise = torch.randn(2, 1, 8, 8, generator=source(5))
    wanted = sample(pipe.flow, [1, 2], nfe=steps or 10, method="euler", noise=[noise])
    drawn = pipe([1, 2], steps, latents=noise, output_type="latent").images
    torch.testing.assert_close(drawn, wanted, rtol=1e-6, atol=1e-6)
    assert pipe.num_timesteps == (steps or 10)
    pipe.save_pretrained(tmp_path)
    back = quiet(SoFlowPipeline.from_pretrained(tmp_path))
    assert torch.equal(back([1, 2], steps, latents=noise, output_type="latent").images, drawn)


def test_the_noise_may_be_given_and_of_a_generator_for_each_image(pipe: SoFlowPipeline) -> None:
    noise = torch.cat([torch.randn(1, 1, 8, 8, generator=source(seed)) for seed in (3, 4)])
    given = pipe([5, 6], latents=noise, output_type="pt").images
    drawn = pipe([5, 6], generator=[source(3), source(4)], output_type="pt").images
    assert torch.equal(given, drawn)
    (images,) = pipe([5, 6], latents=noise, output_type="pt", return_dict=False)
    assert torch.equal(images, drawn)
    torch.manual_seed(3)
    one = pipe(5, output_type="pt").images  # without a generator, torch's own
    torch.manual_seed(3)
    assert torch.equal(one, pipe("5", output_type="pt").images)


def test_several_images_of_each_label_follow_each_other(pipe: SoFlowPipeline) -> None:
    drawn = pipe([5, 6], num_images_per_label=2, generator=source(), output_type="pt").images
    assert torch.equal(drawn, pipe([5, 5, 6, 6], generator=source(), output_type="pt").images)
    assert len(pipe(num_images_per_label=3).images) == 3


def test_classes_have_names(named: SolutionFlow) -> None:
    pipe = quiet(SoFlowPipeline(named))
    assert pipe.labels == {name: number for number, name in enumerate(NAMES)}
    assert pipe.get_label_ids(["cat", 3, "3", "dog, hound", " newt ", "null", "7"]) == [0, 3, 2, 1, 3, 10, 7]
    for labels in (["cat", 7], torch.tensor([0, 7]), np.array([0, 7], np.uint8), (np.int64(0), "7")):
        assert pipe._label_tensor(labels).tolist() == [0, 7]
    by_hand = SoFlowPipeline(named, id2label={0: "tabby, kitten", 4: "snake"})
    assert by_hand.labels == {"tabby": 0, "kitten": 0, "snake": 4}
    assert by_hand.get_label_ids("kitten") == [0]


def test_a_network_without_classes(tmp_path: Path) -> None:
    pipe = quiet(SoFlowPipeline(small_flow(classes=0)))
    noise = torch.randn(2, 1, 8, 8)
    wanted = sample(pipe.flow, None, noise=[noise])
    assert torch.equal(pipe(num_images_per_label=2, latents=noise, output_type="latent").images, wanted)
    with pytest.raises(ValueError, match=r"class_labels must be 0 or left out: there are no classes, got 1"):
        pipe([1])


def test_a_guidance_scale_of_a_flow_that_was_trained_for_a_range(tmp_path: Path) -> None:
    flow = small_flow(guidance_range=(1.0, 4.0))
    quiet(SoFlowPipeline(flow=flow)).save_pretrained(tmp_path)
    pipe = quiet(SoFlowPipeline.from_pretrained(tmp_path))
    assert pipe.flow.network.config == flow.network.config
    for w in (2.5, None):
        wanted = sample(flow, [1, 2, 10], noise=[torch.randn(3, 1, 8, 8, generator=source(5))], guidance=w)
        drawn = pipe([1, 2, 10], generator=source(5), output_type="latent", guidance_scale=w).images
        assert torch.equal(drawn, wanted)
    with pytest.raises(ValueError, match="guidance_scale must be from 1 to 4, as the network was trained, got 5"):
        pipe([1], guidance_scale=5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"guidance_scale": 2.0}, r"guidance_scale must be left out, got 2: the network was trained for one scale"),
        ({"class_labels": [11]}, r"class_labels must be from 0 to 9, or 10 for none, got 11"),
        ({"class_labels": [-1]}, r"class_labels must be from 0 to 9.*got -1"),
        ({"class_labels": ["dat"]}, r"class_labels: 'dat' is no class of this model \(did you mean 'cat'\?\)"),
        ({"class_labels": [1.0]}, r"class_labels must be numbers or names of classes, got 1.0"),
        ({"class_labels": [True]}, r"class_labels must be numbers or names.*got True"),
        ({"class_labels": []}, r"class_labels: is empty"),
        ({"class_labels": torch.rand(2)}, r"class_labels must be \[n\] whole numbers, got torch.float32 \[2\]"),
        ({"class_labels": torch.zeros(1, 2, dtype=torch.int64)}, r"class_labels must be \[n\] whole numbers"),
        ({"num_inference_steps": 0}, r"num_inference_steps must be a whole number of at least 1, got 0"),
        ({"num_inference_steps": 1.5}, r"num_inference_steps must be"),
        ({"num_images_per_label": True}, r"num_images_per_label must be a whole number"),
        ({"generator": 0}, r"generator must be a torch.Generator or a list of them, got 0"),
        ({"generator": [source()]}, r"generator must be one for each of 2 images, got 1"),
        (
            {"latents": torch.zeros(1, 1, 8, 8)},
            r"latents must be noise \[2, 1, 8, 8\], got torch.float32 \[1, 1, 8, 8\]",
        ),
        ({"latents": torch.zeros(2, 1, 8, 8, dtype=torch.int64)}, r"latents must be noise .* got torch.int64"),
        ({"output_type": "jpg"}, r"output_type must be one of pil, np, pt, latent, got 'jpg'"),
        ({"callback_on_step_end_tensor_inputs": ["eps"]}, r"callback_on_step_end_tensor_inputs: eps is not there"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], said: str, named: SolutionFlow) -> None:
    with pytest.raises(ValueError, match=said):
        quiet(SoFlowPipeline(named))(**{"class_labels": [0, 1], **arguments})


def test_a_model_without_names_says_so(pipe: SoFlowPipeline) -> None:
    with pytest.raises(ValueError, match=r"'cat' is no class of this model; it knows no names, give numbers"):
        pipe(["cat"])


def test_parts_that_do_not_fit_are_named(named: SolutionFlow, of_latents: SolutionFlow) -> None:
    with pytest.raises(ValueError, match="flow must be a SolutionFlow, got a Linear"):
        SoFlowPipeline(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="its network is a Linear; only a DiT"):
        SoFlowPipeline(SolutionFlow(torch.nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="vae: the flow makes images, not latents"):
        SoFlowPipeline(named, vae=small_vae())
    with pytest.raises(ValueError, match="vae: is of latents of 8 channels, the flow's have 4"):
        SoFlowPipeline(of_latents, vae=small_vae(latent_channels=8))
    with pytest.raises(ValueError, match="id2label: 10 is no class, they are 10"):
        SoFlowPipeline(named, id2label={10: "cat"})
    pipe = quiet(SoFlowPipeline(of_latents))
    with pytest.raises(ValueError, match="output_type pil: it makes latents, and there is no vae"):
        pipe([1])
    assert pipe([1], output_type="latent").images.shape == (1, 4, 8, 8)


def test_latents_are_decoded_in_their_space(of_latents: SolutionFlow) -> None:
    pipe, noise = quiet(SoFlowPipeline(of_latents, small_vae())), torch.randn(2, 4, 8, 8, generator=source())
    x = pipe([1, 2], latents=noise, output_type="latent").images
    wanted = VAE("", pipe.vae, 1.0, 0.0, "").decoded(x, SPACE)
    images = pipe([1, 2], latents=noise, output_type="pt").images
    assert images.shape == (2, 3, 16, 16)
    torch.testing.assert_close(images, (wanted / 2 + 0.5).clamp(0, 1))
    assert pipe([1, 2], latents=noise).images[1].size == (16, 16)
    # Of data that do not say, those of the VAE's configuration.
    vae = small_vae(scaling_factor=0.5, shift_factor=0.25)
    of_vae = quiet(SoFlowPipeline(small_flow(4), vae))([1, 2], latents=noise, output_type="pt").images
    wanted = VAE("", vae, 1.0, 0.0, "").decoded(x, LatentSpace("", 0.5, 0.25))
    torch.testing.assert_close(of_vae, (wanted / 2 + 0.5).clamp(0, 1))
    with pytest.raises(ConfigError, match="vae: scaling_factor of its configuration makes no sense"):
        quiet(SoFlowPipeline(small_flow(4), small_vae(scaling_factor=0.0)))([1])


def test_a_callback_sees_and_changes_what_is_solved_for(pipe: SoFlowPipeline) -> None:
    seen: list[Any] = []

    def look(self: SoFlowPipeline, step: int, time: torch.Tensor, given: dict[str, torch.Tensor]) -> dict[str, Any]:
        seen.append((step, round(float(time), 4), self.num_timesteps, given["latents"].clone()))
        return given if step < 2 else {"latents": torch.zeros_like(given["latents"])}

    plain = [pipe([1, 2], n, generator=source(), output_type="latent").images for n in (1, 3)]
    drawn = pipe([1, 2], 3, generator=source(), output_type="latent", callback_on_step_end=look).images
    assert [entry[:3] for entry in seen] == [(0, 1.0, 3), (1, 0.6667, 3), (2, 0.3333, 3)]
    assert torch.equal(seen[0][3], plain[0]) and torch.equal(seen[2][3], plain[1]) and not drawn.any()

    def stop(self: SoFlowPipeline, step: int, time: torch.Tensor, given: dict[str, torch.Tensor]) -> None:
        self._interrupt = True

    ended = pipe([1, 2], 3, generator=source(), output_type="latent", callback_on_step_end=stop).images
    assert torch.equal(ended, plain[0]), "an image without noise, whenever it ends"
    again = pipe([1, 2], 3, generator=source(), output_type="latent").images
    assert torch.equal(again, plain[1]) and not pipe.interrupt


def test_callbacks_of_diffusers(pipe: SoFlowPipeline) -> None:
    class Halves(PipelineCallback):
        @property
        def tensor_inputs(self) -> list[str]:
            return ["latents"]

        def callback_fn(self, pipeline: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
            return {"latents": given["latents"] / 2}

    halves = Halves(cutoff_step_ratio=None, cutoff_step_index=0)
    drawn = pipe([1], generator=source(), output_type="latent", callback_on_step_end=halves).images
    assert torch.equal(drawn, pipe([1], generator=source(), output_type="latent").images / 2)


def test_what_is_saved_is_loaded_exactly(of_latents: SolutionFlow, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pipe = quiet(SoFlowPipeline(of_latents, small_vae(), id2label={0: "cat"}))
    pipe.save_pretrained(tmp_path / "pipe")
    back = quiet(SoFlowPipeline.from_pretrained(tmp_path / "pipe"))
    assert_same(back.flow, of_latents)
    assert all(torch.equal(v, back.vae.state_dict()[k]) for k, v in pipe.vae.state_dict().items())
    assert back.labels == {"cat": 0} and back.flow.origin.data.space == SPACE and not back.flow.training
    noise = torch.randn(2, 4, 8, 8)
    images = [p([0, "cat"], latents=noise, output_type="pt").images for p in (pipe, back)]
    assert torch.equal(*images)
    for flow in (
        load(tmp_path / "pipe"),
        SolutionFlow.from_pretrained(tmp_path / "pipe"),
        load(tmp_path / "pipe/flow"),
    ):
        assert_same(flow, of_latents)
        assert flow.origin.data.space == SPACE and flow.origin.step == of_latents.origin.step
    text = (tmp_path / "pipe" / "README.md").read_text()
    assert 'pipe = SoFlowPipeline.from_pretrained("pipe")' in text and "folder of images: 40 samples" in text


def test_a_pipeline_of_pixels_is_loaded_without_a_vae(named: SolutionFlow, tmp_path: Path) -> None:
    SoFlowPipeline(named).save_pretrained(tmp_path / "pipe")
    back = SoFlowPipeline.from_pretrained(tmp_path / "pipe")
    assert back.vae is None and back.labels["cat"] == 0
    assert_same(back.flow, named)
    other = SoFlowPipeline.from_pretrained(tmp_path / "pipe", flow=FlowModel.of(small_flow()))
    assert_same(other.flow, small_flow())


def test_weights_that_are_missing_are_not_left_at_random(named: SolutionFlow, tmp_path: Path) -> None:
    SoFlowPipeline(named).save_pretrained(tmp_path / "pipe")
    path = tmp_path / "pipe" / "flow" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    left_out = weights.pop("network.pos_embed")
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"flow: lacks network.pos_embed$"):
        SoFlowPipeline.from_pretrained(tmp_path / "pipe")
    save_file({**weights, "network.pos_embed": left_out, "network.more": left_out.clone()}, path)
    with pytest.raises(CheckpointError, match=r"flow: has no place for network.more$"):
        SoFlowPipeline.from_pretrained(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match=r"network\.more does not fit"):
        load(tmp_path / "pipe")


def test_a_flow_and_its_pipeline_share_the_network(pipe: SoFlowPipeline, named: SolutionFlow) -> None:
    again = SoFlowPipeline(named)
    assert again.flow.network is named.network and isinstance(again, DiffusionPipeline)
    assert SoFlowPipeline(again.flow).flow is again.flow and again.components["flow"] is again.flow


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")  # later diffusers say `dtype` instead
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, of_latents: SolutionFlow, tmp_path: Path) -> None:
    """Images differ by rounding alone, as the noise is the same: by a few units in the last place of the largest, as
    each product rounds once and there are a few one after the other."""
    pipe = quiet(SoFlowPipeline(of_latents, small_vae()))
    pipe.save_pretrained(tmp_path / "pipe")
    exact = pipe([1, 2], 2, generator=source(), output_type="latent").images
    loaded = quiet(SoFlowPipeline.from_pretrained(tmp_path / "pipe", torch_dtype=dtype))
    cast = quiet(SoFlowPipeline.from_pretrained(tmp_path / "pipe")).to(dtype)
    for half in (loaded, cast):
        assert {half.dtype, half.flow.dtype, half.vae.dtype, half.flow.network.pos_embed.dtype} == {dtype}
        latents = half([1, 2], 2, generator=source(), output_type="latent").images
        assert latents.dtype == dtype
        bound = 8 * torch.finfo(dtype).eps * exact.abs().max()
        torch.testing.assert_close(latents.float(), exact, atol=float(bound), rtol=0)
        assert half([1, 2], generator=source(), output_type="pt").images.dtype == dtype
        assert half([1, 2], generator=source(), output_type="np").images.dtype == np.float32
        assert isinstance(half([1], generator=source()).images[0], Image.Image)
    assert pipe.to(torch.float32).dtype == torch.float32


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """Which part was moved where by accelerate's hooks, in order; all places are the CPU."""
    hooks = pytest.importorskip("accelerate.hooks")
    seen: list[tuple[str, str]] = []
    for name in ("init_hook", "pre_forward"):
        plain = getattr(hooks.CpuOffload, name)

        def noted(self: Any, module: Any, *given: Any, plain: Any = plain, name: str = name, **settings: Any) -> Any:
            seen.append((type(module).__name__, name))
            return plain(self, module, *given, **settings)

        monkeypatch.setattr(hooks.CpuOffload, name, noted)
    yield seen


def test_parts_are_offloaded_when_they_are_not_in_use(of_latents: SolutionFlow, moved: list[tuple[str, str]]) -> None:
    pipe = quiet(SoFlowPipeline(of_latents, small_vae()))
    wanted = pipe([1, 2], 2, generator=source(), output_type="pt").images
    pipe.enable_model_cpu_offload(device="cpu")
    hooks = [(type(part).__name__, "init_hook") for part in (pipe.flow, pipe.vae)]
    assert moved == hooks
    moved.clear()
    images = pipe([1, 2], 2, generator=source(), output_type="pt").images
    assert torch.equal(images, wanted)
    assert [kind for kind, moment in moved if moment == "pre_forward"] == ["FlowModel", "FlowModel", "AutoencoderKL"]
    assert moved[-2:] == hooks, "each is moved before its turn, and away at the end"


def test_layers_are_offloaded_one_by_one(of_latents: SolutionFlow) -> None:
    """What `enable_sequential_cpu_offload` does to a part: weights are there while their layer is called."""
    accelerate = pytest.importorskip("accelerate")
    pipe = quiet(SoFlowPipeline(of_latents))
    wanted = pipe([1, 2], generator=source(), output_type="latent").images
    flow = FlowModel.of(small_flow(4))
    accelerate.cpu_offload(flow, torch.device("cpu"))
    assert next(flow.parameters()).is_meta
    drawn = quiet(SoFlowPipeline(flow))([1, 2], generator=source(), output_type="latent").images
    torch.testing.assert_close(drawn, wanted)


def test_a_progress_bar_counts_the_steps(pipe: SoFlowPipeline, capfd: pytest.CaptureFixture[str]) -> None:
    pipe.set_progress_bar_config(disable=False)
    pipe([1], 3)
    assert "3/3" in capfd.readouterr().err


def test_what_goes_to_the_hub(named: SolutionFlow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, fake = SoFlowPipeline(named), FakeHub(tmp_path / "repository")
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert pipe.push_to_hub("me/cats", private=True) == "commit"
    assert fake.asked[1:] == [
        ("create_repo", "me/cats", {"private": True, "exist_ok": True}),
        ("upload_folder", {"repo_id": "me/cats", "commit_message": "Upload SoFlow pipeline", "create_pr": False}),
    ]
    found = {str(path.relative_to(fake.folder)) for path in fake.folder.rglob("*") if path.is_file()}
    parts = {"flow/config.json", "flow/diffusion_pytorch_model.safetensors"}
    assert found == {"README.md", "model_index.json", *parts}
    assert 'SoFlowPipeline.from_pretrained("me/cats")' in (fake.folder / "README.md").read_text()
    assert_same(SolutionFlow.from_pretrained("me/cats"), named)  # from links, as the cache has them
