"""patch_dit on what LightningDiT and REPA have beside DiT: RMSNorm, qk-norm, SwiGLU, rotary embeddings, no shifts, a
forward that is decorated with torch.compile. Their structure, written here anew."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from soflow_kernels import adaln, gated_residual, gelu, patch, patch_dit

WIDTH, HEADS, TOKENS = 48, 2, 2


class RMSNorm(nn.Module):
    """LLaMA's: normalised in float32, rounded, then times the weight."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class Rotary(nn.Module):
    """Angles by token for pairs of numbers of a head."""

    def __init__(self, dim, tokens):
        super().__init__()
        angles = torch.arange(tokens)[:, None] * 100 ** (-torch.arange(dim // 2) / (dim // 2))
        self.register_buffer("cos", angles.cos().repeat_interleave(2, 1))
        self.register_buffer("sin", angles.sin().repeat_interleave(2, 1))

    def forward(self, heads):
        a, b = heads.unflatten(-1, (-1, 2)).unbind(-1)
        return heads * self.cos + torch.stack([-b, a], -1).flatten(-2) * self.sin


class Attention(nn.Module):
    def __init__(self, dim, heads, norm=None):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (norm(dim // heads) if norm else nn.Identity() for _ in range(2))

    def forward(self, x, rope=None):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


def modulate(x, shift, scale):
    x = x * (1 + scale.unsqueeze(1))
    return x if shift is None else x + shift.unsqueeze(1)


class Block(nn.Module):
    def __init__(self, norm=RMSNorm, swiglu=True, shifts=True):
        super().__init__()
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)
        self.attn = Attention(WIDTH, HEADS, RMSNorm)
        gelu_mlp = nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(2 * WIDTH, WIDTH)
        self.mlp = SwiGLU(WIDTH, 2 * WIDTH) if swiglu else nn.Sequential(*gelu_mlp)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, (6 if shifts else 4) * WIDTH))
        self.shifts = shifts

    def forward(self, x, c, feat_rope=None):
        shift = shift_mlp = None
        if self.shifts:
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        else:
            scale, gate, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(4, dim=1)
        x = x + gate.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift, scale), rope=feat_rope)
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class CompiledBlock(Block):
    forward = torch.compile(Block.forward, backend="aot_eager")


class FinalLayer(nn.Module):
    def __init__(self, norm=RMSNorm):
        super().__init__()
        self.norm_final, self.linear = norm(WIDTH), nn.Linear(WIDTH, 8)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class LightningDiT(nn.Module):
    def __init__(self, block=Block, rope=True, norm=RMSNorm, depth=1, **settings):
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.pos_embed = nn.Parameter(torch.zeros(1, TOKENS, WIDTH), requires_grad=False)
        self.feat_rope = Rotary(WIDTH // HEADS, TOKENS) if rope else None
        self.blocks = nn.ModuleList(block(norm, **settings) for _ in range(depth))
        self.final_layer = FinalLayer(norm)

    def forward(self, x, c):
        x = self.embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c, self.feat_rope)
        return self.final_layer(x, c)


class SiTBlock(nn.Module):
    """REPA's: LayerNorm without affine, qk-norm with it."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn = Attention(WIDTH, HEADS, nn.LayerNorm)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(approximate="tanh"), nn.Linear(96, WIDTH))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x, c):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift, scale))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class REPA(nn.Module):
    """Tokens in the middle go to projectors, whose output is compared with an encoder's."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(SiTBlock() for _ in range(2))
        self.projectors = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, 24), nn.SiLU(), nn.Linear(24, 12))])
        self.final_layer = FinalLayer(lambda dim: nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6))

    def forward(self, x, c):
        x = self.blocks[0](self.embed(x), c)
        projected = self.projectors[0](x)
        return torch.cat([self.final_layer(self.blocks[1](x, c), c), projected], dim=-1)


def off_zero(model):
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


def run(model, dtype, device, autocast=False):
    """The output and all gradients on fixed numbers."""
    draw = torch.Generator().manual_seed(7)
    x, c = (torch.randn(shape, generator=draw).to(device, dtype) for shape in ((2, TOKENS, 8), (2, WIDTH)))
    model.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        out = model(x.requires_grad_(), c.requires_grad_())
    out.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "x": x.grad, "c": c.grad, **gradients}


def near(got, wanted, tolerance):
    assert got.keys() == wanted.keys()
    largest = max(value.double().norm() for value in wanted.values())
    for name, value in wanted.items():
        # What attention hardly sees, such as the bias of the keys' norm, has a gradient that is mostly rounding.
        error = (got[name].double() - value.double()).norm() / (value.double().norm() + 1e-2 * largest)
        assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    """Blocks are compared on few tokens: the interpreter's time goes by tokens."""
    monkeypatch.setattr(patch, "TOKENS", 3)


@pytest.fixture
def counted(monkeypatch):
    """The launches of kernels by module."""
    counts = {}
    for name, module in {"adaln": adaln, "gated_residual": gated_residual, "gelu": gelu}.items():

        def launch(*args, _plain=module.launch, _name=name, **options):
            counts[_name] = counts.get(_name, 0) + 1
            return _plain(*args, **options)

        monkeypatch.setattr(module, "launch", launch)
    return counts


MODELS = {
    "LightningDiT": LightningDiT,
    "without rotary embedding, with GELU": lambda: LightningDiT(rope=False, swiglu=False),
    "without shifts": lambda: LightningDiT(shifts=False),
    "torch's RMSNorm without weight": lambda: LightningDiT(
        norm=lambda dim: nn.RMSNorm(dim, eps=1e-6, elementwise_affine=False)
    ),
    "LayerNorm": lambda: LightningDiT(norm=lambda dim: nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)),
    "REPA": REPA,
}


@pytest.mark.parametrize("which", MODELS)
def test_patched_is_the_same_function(which, device, counted):
    model = off_zero(MODELS[which]()).to(device)
    wanted, keys = run(model, torch.float32, device), list(model.state_dict())
    assert patch_dit(model) is model
    counted.clear()
    near(run(model, torch.float32, device), wanted, 1e-5)
    # forward: two norms a block and the final one, the gated residual at its end; backward likewise
    depth = len(model.blocks)
    assert counted["adaln"] == 2 * (2 * depth + 1) and counted["gated_residual"] == 2 * depth
    assert counted.get("gelu", 0) == (2 * depth if which in ("REPA", "without rotary embedding, with GELU") else 0)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_rounds_no_worse_than_the_blocks_own_forward(how, device):
    plain = off_zero(LightningDiT()).to(device)
    exact = run(copy.deepcopy(plain).double(), torch.float64, device)
    # Under the interpreter a cast to bfloat16 truncates: twice the error of rounding, to one side.
    factor, dtype = (1.5 if device == "cuda" else 4), torch.bfloat16 if how == "bfloat16" else torch.float32
    patched = patch_dit(copy.deepcopy(plain))
    found = [run(m.to(dtype), dtype, device, autocast=how == "autocast") for m in (plain, patched)]
    for name, value in exact.items():
        eager, got = (((f[name].double() - value).norm() / value.norm()).item() for f in found)
        assert got <= factor * eager + 2**-7, f"{name}: {got:.2e}, eager {eager:.2e}"


def test_each_norm_keeps_its_eps(device):
    model = off_zero(LightningDiT()).to(device)
    for i, norm in enumerate(m for name, m in model.named_modules() if name.endswith(("norm1", "norm2", "norm_final"))):
        norm.eps = 0.1 * (i + 1)
    wanted = run(model, torch.float32, device)
    near(run(patch_dit(model), torch.float32, device), wanted, 1e-5)


def test_arguments_as_the_block_names_them(device):
    block = off_zero(Block()).to(device)
    x, c = torch.randn(2, TOKENS, WIDTH, device=device), torch.randn(2, WIDTH, device=device)
    rope = Rotary(WIDTH // HEADS, TOKENS).to(device)
    without, wanted = block(x, c), block(x, c, rope)
    assert not torch.allclose(without, wanted)
    patch_dit(block)
    torch.testing.assert_close(block(x, c), without, rtol=1e-4, atol=1e-5)
    for got in (block(x, c, rope), block(x, feat_rope=rope, c=c)):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for given, named in (((x,), {}), ((x, c, rope, rope), {}), ((x, c), {"c": c}), ((x, c), {"d": c})):
        with pytest.raises(TypeError, match=r"forward takes \(x, c, feat_rope\)"):
            block(*given, **named)


def test_a_norm_that_is_replaced_or_watched_later_runs_itself(device, counted):
    model = patch_dit(off_zero(LightningDiT(depth=2)).to(device))
    model.blocks[0].norm1 = nn.RMSNorm(WIDTH, eps=1e-6, device=device)
    seen = []
    model.blocks[1].norm2.register_forward_hook(lambda *a: seen.append(a[0]))
    counted.clear()
    run(model, torch.float32, device)
    assert seen == [model.blocks[1].norm2] and counted == {"adaln": 2}  # of the final layer


def test_copies_stay_patched(device):
    model = patch_dit(off_zero(LightningDiT()).to(device))
    other = copy.deepcopy(model)
    assert type(other.blocks[0]) is type(model.blocks[0]) is not Block
    near(run(other, torch.float32, device), run(model, torch.float32, device), 0)


def test_a_compiled_forward_is_compiled_again(device):
    model = off_zero(LightningDiT(CompiledBlock)).to(device)
    with torch.compiler.set_stance("force_eager"):
        wanted = run(model, torch.float32, device)
        patch_dit(model)
        near(run(model, torch.float32, device), wanted, 1e-5)
    compiled, plain = type(model.blocks[0]).forward, type(patch_dit(LightningDiT()).blocks[0]).forward
    assert hasattr(compiled, "_torchdynamo_orig_callable") and not hasattr(plain, "_torchdynamo_orig_callable")


@pytest.mark.slow  # `test_patch.py` traces a patched model in the fast lane, `test_rmsnorm.py` compiles the operation
def test_full_graph(device):
    model = patch_dit(off_zero(LightningDiT()).to(device))
    wanted = run(model, torch.float32, device)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    got = {name.removeprefix("_orig_mod."): v for name, v in run(compiled, torch.float32, device).items()}
    near(got, wanted, 1e-5 if device == "cuda" else 1e-6)


# Refusals


class GemmaNorm(RMSNorm):
    """Times 1 + weight."""

    def forward(self, x):
        return super().forward(x) * (1 + 1 / self.weight)


class Unturned(Block):
    """Takes a rotary embedding and leaves it."""

    def forward(self, x, c, feat_rope=None):
        return super().forward(x, c)


class GatesFirst(Block):
    def forward(self, x, c, feat_rope=None):
        gate, scale, gate_mlp, scale_mlp = self.adaLN_modulation(c).chunk(4, dim=1)
        x = x + gate.unsqueeze(1) * self.attn(modulate(self.norm1(x), None, scale), rope=feat_rope)
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), None, scale_mlp))


class AngleTensors(Block):
    """A rotary embedding that is a pair of tensors, which a function does not stand in for."""

    def forward(self, x, c, feat_rope=None):
        cos, _ = feat_rope  # pyright: ignore[reportGeneralTypeIssues]
        return super().forward(x, c, lambda heads: heads * cos)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (lambda: Block(GemmaNorm), "in evaluation it computes something else than a DiT's"),
        (Unturned, "in evaluation it computes something else than a DiT's"),
        (lambda: GatesFirst(shifts=False), "in evaluation it computes something else than a DiT's"),
        (AngleTensors, r"it cannot be tried on 3 tokens \(TypeError: "),
        (lambda: Block(lambda dim: nn.RMSNorm(dim)), "norm1 is RMSNorm, .* as it has no eps of its own"),
        (lambda: Block(lambda dim: nn.RMSNorm((2, dim), eps=1e-6)), "RMSNorm over the last dimension"),
    ],
    ids=["another weight", "unturned", "another order", "tensors", "no eps", "two dimensions"],
)
def test_blocks_of_another_form_are_refused(block, message):
    found = block()
    with pytest.raises(ValueError, match=rf"^patch_dit: the model itself .* is no DiT block: .*{message}"):
        patch_dit(found)
    assert not hasattr(type(found), "_soflow_base")


def test_the_models_own_embedding_is_tried_where_a_block_needs_it(device):
    model = off_zero(LightningDiT(AngleTensors, rope=False)).to(device)
    model.feat_rope = (torch.linspace(0.5, 1.5, TOKENS, device=device)[:, None], None)
    for block in model.blocks:
        with pytest.raises(ValueError, match="cannot be tried"):
            patch_dit(block)
    with pytest.raises(ValueError, match="cannot be tried on 2 tokens"):
        patch_dit(model)  # the block says that it does without, and does not
