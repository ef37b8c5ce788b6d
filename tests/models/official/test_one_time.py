"""DiT and SiT as the beginning of a SoFlow network: its output is theirs, and the second time can be learned."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from soflow_fast import DiT, DiTConfig, SolutionFlow, load_official
from soflow_fast.config.schema import Config, FlowConfig
from soflow_fast.errors import CheckpointError
from soflow_fast.models.official import read_start
from soflow_fast.models.official.one_time import of_the_rest

CONFIG = DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=4)


def one_time_weights(doubled: bool = True) -> dict[str, Tensor]:
    """A DiT's or SiT's, with an output of twice the channels as both have it by default."""
    source = torch.Generator().manual_seed(0)
    shapes = {name: value.shape for name, value in DiT(CONFIG).state_dict().items() if "s_embedder" not in name}
    if doubled:
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            shapes[name] = torch.Size((2 * shapes[name][0], *shapes[name][1:]))
    weights = {name: 0.3 * torch.randn(shape, generator=source) for name, shape in shapes.items()}
    return weights | {"pos_embed": DiT(CONFIG).pos_embed}


def forward(w: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The network of arXiv 2212.09748 and 2401.08740 in plain operations, float64; the first half of the channels."""
    w = {name: value.double() for name, value in w.items()}
    B, C, H, _ = x.shape
    p, D, heads = CONFIG.patch_size, CONFIG.hidden_size, CONFIG.num_heads

    def linear(h: Tensor, name: str) -> Tensor:
        return F.linear(h, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(h, (D,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    angle = t.double()[:, None] * torch.exp(-math.log(10_000) * torch.arange(128).double() / 128)
    e_t = linear(F.silu(linear(torch.cat([angle.cos(), angle.sin()], 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    c = F.silu(e_t + w["y_embedder.embedding_table.weight"][y])
    h = F.conv2d(x.double(), w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p).flatten(2).mT
    h = h + w["pos_embed"]
    for k in range(CONFIG.depth):
        at = f"blocks.{k}"
        m = linear(c, f"{at}.adaLN_modulation.1").chunk(6, 1)
        q, key, v = (
            linear(norm(h, m[0], m[1]), f"{at}.attn.qkv").view(B, -1, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        )
        if f"{at}.attn.q_norm.weight" in w:
            q = F.rms_norm(q, q.shape[-1:], w[f"{at}.attn.q_norm.weight"], 1e-6)
            key = F.rms_norm(key, q.shape[-1:], w[f"{at}.attn.k_norm.weight"], 1e-6)
        a = (q @ key.mT / math.sqrt(D // heads)).softmax(-1) @ v
        h = h + m[2][:, None] * linear(a.transpose(1, 2).flatten(2), f"{at}.attn.proj")
        inner = F.gelu(linear(norm(h, m[3], m[4]), f"{at}.mlp.fc1"), approximate="tanh")
        h = h + m[5][:, None] * linear(inner, f"{at}.mlp.fc2")
    shift, scale = linear(c, "final_layer.adaLN_modulation.1").chunk(2, 1)
    out = linear(norm(h, shift, scale), "final_layer.linear").view(B, H // p, H // p, p, p, -1)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, H, H)[:, :C]


def batch() -> tuple[Tensor, ...]:
    source = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, 8, 8, generator=source)
    t, s = torch.rand(2, 5, generator=source).sort(dim=0, descending=True)[0]
    return x, t, s, torch.tensor([0, 1, 2, 3, 4])  # the last is the null label


def begun(weights: dict[str, Tensor], kind: str, flow: FlowConfig, tmp_path) -> SolutionFlow:
    path = tmp_path / "theirs.pt"
    torch.save({"model": weights, "ema": weights, "args": None}, path)
    made = SolutionFlow(DiT(CONFIG), flow.path, flow.coefficients)
    start = read_start(str(path), Config(model=CONFIG, flow=flow), kind=kind, initial=made.state_dict())
    assert start.network.keys() == start.average.keys() == made.state_dict().keys()
    made.load_state_dict(start.network)
    return made


@pytest.mark.parametrize("doubled", [True, False])
@pytest.mark.parametrize("flow", [FlowConfig(), FlowConfig("trig", "trig")], ids=["linear", "trig"])
def test_the_velocity_is_that_of_a_sit_at_the_other_end_of_time(doubled: bool, flow: FlowConfig, tmp_path) -> None:
    weights = one_time_weights(doubled)
    x, t, s, y = batch()
    made = begun(weights, "sit", flow, tmp_path)
    expected = -forward(weights, x, 1 - t.double(), y)  # theirs points from noise, at 0, to data, at 1
    torch.testing.assert_close(made.velocity(x, t, y).double(), expected, rtol=1e-5, atol=1e-5)
    for other in (s, t * 0, t):  # whatever the second time is
        assert torch.equal(made.network(x, t, other, y), made.network(x, t, t, y))


def test_a_sit_that_normalises_queries_and_keys(tmp_path) -> None:
    """As LightningDiT's attention does; its output is kept, whatever the second time is."""
    config = replace(CONFIG, qk_norm=True)
    plain = one_time_weights(doubled=False)
    names = [f"blocks.{k}.attn.{name}.weight" for k in range(2) for name in ("q_norm", "k_norm")]
    weights = plain | {name: torch.linspace(0.5, 1.5, 8) + k for k, name in enumerate(names)}
    torch.save({"ema": weights}, tmp_path / "theirs.pt")
    made = SolutionFlow(DiT(config))
    given = Config(model=config), {"kind": "sit", "initial": made.state_dict()}
    made.load_state_dict(read_start(str(tmp_path / "theirs.pt"), given[0], **given[1]).network)
    x, t, s, y = batch()
    assert torch.equal(made.network(x, t, s, y), made.network(x, t, t, y))
    expected = -forward(weights, x, 1 - t.double(), y)
    torch.testing.assert_close(made.velocity(x, t, y).double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"has norms of queries and keys; give --set model\.qk_norm=true"):
        read_start(str(tmp_path / "theirs.pt"), Config(model=CONFIG), **given[1])


def test_the_output_is_that_of_a_dit(tmp_path) -> None:
    weights = one_time_weights()
    x, t, s, y = batch()
    made = begun(weights, "dit", FlowConfig(), tmp_path)
    torch.testing.assert_close(made.network(x, t, s, y).double(), forward(weights, x, t, y), rtol=1e-5, atol=1e-5)


def test_the_second_time_is_learned_from_the_first_step_on(tmp_path) -> None:
    made = begun(one_time_weights(), "sit", FlowConfig(), tmp_path)
    x, t, s, y = batch()
    made.network(x, t, s, y).square().mean().backward()
    assert float(made.network.s_embedder.mlp[2].weight.grad.abs().amax()) > 1e-6


@pytest.mark.parametrize("kind", ["dit", "sit"])
def test_a_guidance_scale_changes_nothing_at_first_and_is_learned_from_the_first_step_on(kind: str, tmp_path) -> None:
    weights, path = one_time_weights(), tmp_path / "theirs.pt"
    torch.save({"model": weights, "ema": weights, "args": None}, path)
    model = replace(CONFIG, guidance_range=(1.0, 4.0))
    made = SolutionFlow(DiT(model))
    start = read_start(str(path), Config(model=model), kind=kind, initial=made.state_dict())
    made.load_state_dict(start.network)
    plain = begun(weights, kind, FlowConfig(), tmp_path)
    x, t, s, y = batch()
    w = torch.linspace(1, 4, len(x))
    assert torch.equal(made.network(x, t, s, y, w), plain.network(x, t, s, y))
    made.network(x, t, s, y, w).square().mean().backward()
    assert float(made.network.w_embedder.mlp[2].weight.grad.abs().amax()) > 1e-6


def test_the_sinusoids_of_the_rest_are_turned_exactly() -> None:
    weight = torch.randn(7, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.rand(9, dtype=torch.float64)
    w = torch.exp(-math.log(10_000) * torch.arange(128).double() / 128)

    def sinusoids(t: Tensor) -> Tensor:
        return torch.cat([(t[:, None] * w).cos(), (t[:, None] * w).sin()], 1)

    torch.testing.assert_close(
        sinusoids(t) @ of_the_rest(weight).double().T, sinusoids(1 - t) @ weight.T, rtol=0, atol=1e-5
    )


def test_such_a_file_is_asked_about_and_never_taken_for_a_flow(tmp_path) -> None:
    weights = one_time_weights()
    with pytest.raises(CheckpointError, match="a DiT or SiT, whose network sees one time: train --init takes it"):
        load_official(weights, CONFIG)
    path = tmp_path / "x.pt"
    torch.save(weights, path)
    config = Config(model=CONFIG)
    with pytest.raises(CheckpointError, match=r"sees one time; say what it is, --set run\.init_kind=dit or sit"):
        read_start(str(path), config)
    torch.save(SolutionFlow(DiT(CONFIG)).state_dict(), path)
    with pytest.raises(CheckpointError, match="is no sit: its network sees two times already"):
        read_start(str(path), config, kind="sit", initial=SolutionFlow(DiT(CONFIG)).state_dict())
    torch.save(weights | {"final_layer.linear.bias": torch.zeros(5)}, path)
    with pytest.raises(
        CheckpointError, match=r"final_layer.linear.bias is \[5\], the model's is \[12\], or twice that"
    ):
        read_start(str(path), config, kind="sit", initial=SolutionFlow(DiT(CONFIG)).state_dict())
