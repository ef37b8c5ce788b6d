"""patch_dit on DiT's and SiT's interface, written here anew, and on diffusers' own model."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from soflow_kernels import adaln, gated_residual, gelu, patch, patch_dit, testing

WIDTH, HEADS, DEPTH, CLASSES = 48, 3, 2, 5


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """The children of timm's."""

    def __init__(self, dim, act=None, drop=0.0):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(dim, 4 * dim), act or nn.GELU(approximate="tanh"), nn.Dropout(drop)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(4 * dim, dim), nn.Dropout(drop)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    def __init__(self, dim=WIDTH, heads=HEADS, eps=1e-6, **mlp):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.mlp = Mlp(dim, **mlp)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        parts = self.adaLN_modulation(c).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, dim=WIDTH, out=8):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Model(nn.Module):
    def __init__(self, block=Block, **settings):
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(block(**settings) for _ in range(DEPTH))
        self.final_layer = FinalLayer()

    def forward(self, x, c):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)


def off_zero(model):
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


def run(model, dtype, device, autocast=False):
    """Outputs and all gradients on fixed numbers."""
    source = torch.Generator().manual_seed(7)
    x, c, weight = (torch.randn(shape, generator=source) for shape in ((2, 3, 8), (2, WIDTH), (2, 3, 8)))
    x, c, weight = (v.to(device, dtype) for v in (x, c, weight))
    model.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        out = model(x.requires_grad_(), c.requires_grad_())
    (out * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"output": out.detach(), "x": x.grad, "c": c.grad, **gradients}


def near(got, wanted, tolerance):
    largest = max(value.double().norm() for value in wanted.values())
    for name, value in wanted.items():
        if name.endswith("to_k.bias"):  # softmax does not see it: what is there is rounding
            assert max(value.norm(), got[name].norm()) < 1e-5 * largest
            continue
        error = (got[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-12)
        assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    """Blocks are compared on few tokens: the interpreter's time goes by tokens."""
    monkeypatch.setattr(patch, "TOKENS", 3)


@pytest.fixture
def counted(monkeypatch):
    """The launches of kernels by module."""
    counts = {}
    for module in (adaln, gated_residual, gelu):
        plain = module.launch
        name = module.__name__.rpartition(".")[2]

        def launch(*args, _plain=plain, _name=name, **options):
            counts[_name] = counts.get(_name, 0) + 1
            return _plain(*args, **options)

        monkeypatch.setattr(module, "launch", launch)
    return counts


def test_dit_block_is_the_same_function(device, counted):
    model = off_zero(Model()).to(device)
    wanted, keys = run(model, torch.float32, device), list(model.state_dict())
    assert patch_dit(model) is model
    counted.clear()
    near(run(model, torch.float32, device), wanted, 1e-5)
    # forward: 2 a block and the final norm, a gated residual, GELU; backward likewise
    assert counted == {"adaln": 2 * (2 * DEPTH + 1), "gated_residual": 2 * DEPTH, "gelu": 2 * DEPTH}
    assert list(model.state_dict()) == keys
    with testing.mode("reference"):
        near(run(model, torch.float32, device), wanted, 1e-5)


def test_each_norm_keeps_its_eps(device):
    model = off_zero(Model()).to(device)
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    for i, norm in enumerate(norms):
        norm.eps = 0.1 * (i + 1)
    wanted = run(model, torch.float32, device)
    near(run(patch_dit(model), torch.float32, device), wanted, 1e-5)


@pytest.mark.parametrize("where", ["kernels", "reference"])
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_rounds_no_worse_than_the_blocks_own_forward(how, where, device):
    plain, patched = off_zero(Model()).to(device), patch_dit(off_zero(Model()).to(device))
    exact = run(off_zero(Model()).double().to(device), torch.float64, device)
    # Under the interpreter a cast to bfloat16 truncates: twice the error of rounding, to one side.
    factor = 1.5 if device == "cuda" or where == "reference" else 4
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    with testing.mode("auto" if where == "kernels" else "reference"):
        found = [run(m.to(dtype), dtype, device, autocast=how == "autocast") for m in (plain, patched)]
    for name, value in exact.items():
        eager, got = (((f[name].double() - value).norm() / value.norm()).item() for f in found)
        assert got <= factor * eager + 2**-7, f"{name}: {got:.2e}, eager {eager:.2e}"


def test_patching_twice_changes_nothing(device):
    model = patch_dit(off_zero(Model()).to(device))
    classes = [type(m) for m in model.modules()]
    assert patch_dit(model) is model and [type(m) for m in model.modules()] == classes
    assert isinstance(model.blocks[0], Block) and type(model.blocks[0]).__name__ == "Block"


def test_copies_and_pickles_stay_patched(device):
    model = patch_dit(off_zero(Model()).to(device))
    given = torch.randn(1, 4, 8, device=device), torch.randn(1, WIDTH, device=device)
    wanted = model(*given)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.blocks[0] is not model.blocks[0] and type(other.blocks[0]) is type(model.blocks[0])
        assert torch.equal(other(*given), wanted)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    Model().load_state_dict(torch.load(buffer, weights_only=True))


@pytest.mark.slow  # `test_export_with_a_dynamic_batch` traces a patched model, the diffusers case checkpoints one
def test_checkpointing_and_compile(device):
    model = patch_dit(off_zero(Model()).to(device))
    wanted = run(model, torch.float32, device)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, c):
            return torch.utils.checkpoint.checkpoint(self.inner, x, c, use_reentrant=False)

    got = {name.removeprefix("inner."): v for name, v in run(Checkpointed(), torch.float32, device).items()}
    near(got, wanted, 0)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    got = {name.removeprefix("_orig_mod."): v for name, v in run(compiled, torch.float32, device).items()}
    near(got, wanted, 1e-5 if device == "cuda" else 1e-6)


@pytest.mark.parametrize("drop", [False, True], ids=["", "dropout"])
def test_mlp_as_a_sequence(drop, device, counted):
    model = off_zero(Model()).to(device)
    for block in model.blocks:
        mlp = block.mlp
        block.mlp = nn.Sequential(mlp.fc1, mlp.act, *[nn.Dropout(0.0)] * drop, mlp.fc2, *[nn.Dropout(0.0)] * drop)
    wanted = run(model, torch.float32, device)
    patch_dit(model)
    counted.clear()
    near(run(model, torch.float32, device), wanted, 1e-5)
    assert counted["gelu"] == 2 * DEPTH


@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU()], ids=["exact GELU", "SiLU"])
def test_another_mlp_is_called_as_it_is(act, device, counted):
    model = off_zero(Model(act=act)).to(device)
    wanted = run(model, torch.float32, device)
    counted.clear()
    near(run(patch_dit(model), torch.float32, device), wanted, 1e-5)
    assert "gelu" not in counted and counted["adaln"] > 0


def test_a_watched_mlp_is_called_as_it_is(device, counted):
    model = patch_dit(off_zero(Model()).to(device))
    seen = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *a: seen.append(a[0]))
    model.blocks[1].attn.qkv.register_forward_hook(lambda *a: seen.append(a[0]))
    counted.clear()
    # With a gradient: without one the GELU of a GPU is the epilogue of a product, and no kernel.
    model(torch.randn(1, 4, 8, device=device), torch.randn(1, WIDTH, device=device))
    assert seen == [model.blocks[0].mlp.fc1, model.blocks[1].attn.qkv] and counted["gelu"] == DEPTH - 1


def test_dropout_in_the_mlp_still_drops(device):
    model = patch_dit(off_zero(Model(drop=0.5)).to(device))
    x, c = torch.randn(1, 4, 8, device=device), torch.randn(1, WIDTH, device=device)
    assert not torch.equal(model(x, c), model(x, c))
    assert all(m.training for m in model.modules())  # the comparison left the modes as they were
    model.eval()
    assert torch.equal(model(x, c), model(x, c))


# Refusals


class Swapped(Block):
    """scale before shift, as some write it."""

    def forward(self, x, c):
        scale_msa, shift_msa, gate_msa, scale_mlp, shift_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class SwappedFinal(FinalLayer):
    """As a fresh DiT has it: whatever it computes is zero."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x, c):
        scale, shift = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class ResidualMlp(Mlp):
    def forward(self, x):
        return x + super().forward(x)


class DropsBranches(Block):
    """Stochastic depth without a module of its own: only training shows it."""

    def forward(self, x, c):
        return x + F.dropout(super().forward(x, c) - x, 0.1, self.training)


class Rotary(Block):
    def forward(self, x, c, rope=None):
        return super().forward(x, c)


class Broken(Block):
    def forward(self, x, c):
        raise RuntimeError("needs 256 tokens")


def changed(**parts):
    def make():
        block = Block()
        for name, part in parts.items():
            setattr(block, name, part)
        return block

    return make


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Swapped, "in evaluation it computes something else than a DiT's"),
        (SwappedFinal, "in evaluation it computes something else than a DiT's"),
        (changed(mlp=ResidualMlp(WIDTH)), "in evaluation it computes something else than a DiT's"),
        (DropsBranches, "in training it computes something else than a DiT's"),
        (changed(forward=lambda x, c: x), "its forward was replaced on the instance"),
        (Rotary, r"its forward takes \(x, c, rope\), not \(x, c\)"),
        (Broken, r"it cannot be tried on 3 tokens \(RuntimeError: needs 256 tokens\)"),
        (changed(norm1=nn.LayerNorm(WIDTH)), "norm1 has a weight of its own"),
        (changed(norm2=nn.RMSNorm(WIDTH)), "norm2 is RMSNorm, neither .* as it has no eps of its own"),
        (changed(norm2=nn.GroupNorm(1, WIDTH)), "norm2 is GroupNorm, neither torch.nn.LayerNorm nor RMSNorm"),
        (changed(norm2=nn.RMSNorm(2 * WIDTH, eps=1e-6)), "norm1 and norm2 are of different classes or widths"),
        (changed(cross_attn=nn.Linear(2, 2)), "it also has cross_attn"),
        (changed(ls1=nn.Parameter(torch.ones(WIDTH))), "it also has ls1"),
        (
            changed(adaLN_modulation=nn.Linear(WIDTH, 3 * WIDTH)),
            f"does not end with a Linear to 6 x {WIDTH} or 4 x {WIDTH}",
        ),
        # As wide as the four parts of a block without shifts; this one takes six.
        (
            changed(adaLN_modulation=nn.Linear(WIDTH, 4 * WIDTH)),
            r"it cannot be tried on 3 tokens \(RuntimeError: The size of tensor",
        ),
        (changed(norm2=None), "it has no norm2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unknown_blocks_are_refused_by_name_and_nothing_changes(block, message):
    model = Model()
    model.blocks[1] = block()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(
        ValueError, match=rf"^patch_dit: blocks\.1 \({type(model.blocks[1]).__name__}\) is no DiT block: .*{message}"
    ):
        patch_dit(model)
    assert [type(m) for m in model.modules()] == classes


def test_the_comparison_leaves_no_trace(device):
    model = off_zero(Model(drop=0.5)).to(device)
    model.blocks[0].eval()
    model.blocks[1].attn.proj = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(9)).to(device)
    model.pos_embed = torch.zeros(1, 9, WIDTH)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    patch_dit(model)
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="patch_dit: found no DiT block in Sequential"):
        patch_dit(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="patch_dit: found no DiT block in FinalLayer"):
        patch_dit(FinalLayer())
    with pytest.raises(ValueError, match=r"patch_dit: model must be a torch\.nn\.Module, got dict"):
        patch_dit({})
    with pytest.raises(ValueError, match=r"blocks\.0 \(Block\) is no DiT block: its parameters have no values yet"):
        patch_dit(Model().to("meta"))


# diffusers


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers is not installed")


def transformer(diffusers, **settings):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "num_layers": 2, "sample_size": 8}
    return off_zero(diffusers.DiTTransformer2DModel(**{**sizes, "num_embeds_ada_norm": CLASSES, **settings})).eval()


def run_transformer(model, device):
    source = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(2, 4, 8, 8, generator=source).to(device) for _ in range(2))
    model.zero_grad()
    labels, times = torch.tensor([1, 3], device=device), torch.tensor([10, 700], device=device)
    out = model(x.requires_grad_(), timestep=times, class_labels=labels).sample
    (out * weight[:, :1].expand_as(out)).sum().backward()
    return {"output": out.detach(), "x": x.grad, **{n: p.grad.clone() for n, p in model.named_parameters()}}


@pytest.mark.parametrize(
    "checkpointing", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "checkpointing"]
)
def test_diffusers_transformer_is_the_same_function(diffusers, checkpointing, device, counted):
    model = transformer(diffusers).to(device)
    wanted, keys = run_transformer(model, device), list(model.state_dict())
    patch_dit(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
        model.train()
        for m in model.modules():  # the label's dropout is random
            if hasattr(m, "dropout_prob"):
                m.dropout_prob = 0.0
    counted.clear()
    near(run_transformer(model, device), wanted, 2e-5)
    assert min(counted[name] for name in ("adaln", "gated_residual", "gelu")) >= 4
    assert list(model.state_dict()) == keys


def test_diffusers_watched_product_is_called_as_it_is(diffusers, device, counted):
    model, seen = patch_dit(transformer(diffusers).to(device)), []
    watched = model.transformer_blocks[0].ff.net[0].proj
    watched.register_forward_hook(lambda *a: seen.append(a[0]))
    counted.clear()
    run_transformer(model, device)
    assert seen == [watched] and counted["gelu"] == 2  # forward and backward of the other block


def test_diffusers_chunked_feed_forward_takes_its_own_way(diffusers, device, counted):
    model = transformer(diffusers).to(device)
    wanted = run_transformer(model, device)
    patch_dit(model)
    for block in model.transformer_blocks:
        block.set_chunk_feed_forward(8, 1)
    counted.clear()
    near(run_transformer(model, device), wanted, 1e-6)
    assert counted == {}


def test_diffusers_blocks_of_another_form_are_refused(diffusers):
    from diffusers.models.attention import BasicTransformerBlock

    class Ungated(BasicTransformerBlock):
        def forward(self, hidden_states, *args, **keywords):
            return hidden_states + super().forward(hidden_states, *args, **keywords)

    model = transformer(diffusers)
    model.transformer_blocks[1].__class__ = Ungated
    with pytest.raises(
        ValueError, match=r"transformer_blocks\.1 \(Ungated\) is no DiT block: in evaluation it computes"
    ):
        patch_dit(model)

    with pytest.raises(ValueError, match="norm3 has a weight of its own"):
        patch_dit(transformer(diffusers, norm_elementwise_affine=True))
    with pytest.raises(ValueError, match="its norm_type is 'layer_norm', not 'ada_norm_zero'"):
        patch_dit(BasicTransformerBlock(48, 2, 24))


class Sometimes(Block):
    """The same class and the same children, but another function where an attribute says so."""

    def __init__(self, twice):
        super().__init__()
        self.twice = twice

    def forward(self, x, c):
        return (1 + self.twice) * super().forward(x, c)


class OtherNames(Block):
    def forward(self, x, cond):
        return super().forward(x, cond)


class LastDimension(Block):
    """Takes a condition for every token too."""

    def forward(self, x, c):
        parts = self.adaLN_modulation(c).chunk(6, dim=-1)
        a, b, g, a2, b2, g2 = (part if part.dim() == 3 else part.unsqueeze(1) for part in parts)
        x = x + g * self.attn(self.norm1(x) * (1 + b) + a)
        return x + g2 * self.mlp(self.norm2(x) * (1 + b2) + a2)


class Checkpointed(Block):
    def forward(self, x, c):
        return torch.utils.checkpoint.checkpoint(super().forward, x, c, use_reentrant=False)


def tokens(B, T, device, condition=None):
    source = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, WIDTH, generator=source).to(device)
    return x, torch.randn(condition or (B, WIDTH), generator=source).to(device)


def test_every_block_is_compared(device):
    model = nn.ModuleList([Sometimes(False), Sometimes(True)]).to(device)
    with pytest.raises(ValueError, match=r"patch_dit: 1 \(Sometimes\) is no DiT block: in evaluation it computes"):
        patch_dit(model)
    assert all(type(block) is Sometimes for block in model)
    wrapped = nn.ModuleList([Block(), Block()]).to(device)
    plain = wrapped[1].mlp.forward
    wrapped[1].mlp.forward = lambda h: 2 * plain(h)
    given = tokens(2, 4, device)
    wanted = wrapped[1](*given)
    torch.testing.assert_close(patch_dit(wrapped)[1](*given), wanted, rtol=1e-4, atol=1e-5)


def test_a_forward_replaced_later_is_run(device):
    model = patch_dit(nn.ModuleList([Block()]).to(device))
    given = tokens(2, 4, device)
    before = model[0](*given)
    plain = model[0].mlp.forward
    model[0].mlp.forward = lambda h: 0 * plain(h)
    assert not torch.allclose(model[0](*given), before)


def test_global_hooks_see_the_mlp(device):
    model = patch_dit(nn.ModuleList([Block()]).to(device))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, a, out: seen.append(type(module).__name__))
    try:
        model[0](*tokens(2, 4, device))
    finally:
        handle.remove()
    assert seen.count("Linear") >= 5  # modulation, qkv, projection and both products of the MLP


def test_arguments_keep_their_names(device):
    block = OtherNames().to(device)
    x, c = tokens(2, 4, device)
    wanted = block(x, cond=c)
    patch_dit(nn.ModuleList([block]))
    for got in (block(x, cond=c), block(x=x, cond=c), block(x, c)):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for wrong in (lambda: block(x, c=c), lambda: block(x), lambda: block(x, c, c)):
        with pytest.raises(TypeError):
            wrong()


@pytest.mark.parametrize("rows", [(4, 1), (1, 3)], ids=str)
def test_one_row_serves_all(rows, device):
    block = Block().to(device)
    x, _ = tokens(rows[0], 6, device)
    c = tokens(rows[1], 6, device)[1]
    wanted = block(x, c)
    torch.testing.assert_close(patch_dit(nn.ModuleList([block]))[0](x, c), wanted, rtol=1e-4, atol=1e-5)


def test_a_condition_for_every_token_goes_to_the_block_itself(device):
    block = LastDimension().to(device)
    given = tokens(2, 4, device, condition=(2, 4, WIDTH))
    wanted = block(*given)
    torch.testing.assert_close(patch_dit(nn.ModuleList([block]))[0](*given), wanted)


def test_a_block_that_checkpoints_itself_is_refused(device):
    with pytest.raises(ValueError, match=r"recomputes itself in the backward.*checkpoint around the block"):
        patch_dit(nn.ModuleList([Checkpointed()]).to(device))


def test_autocast_does_not_disturb_the_comparison(device):
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        patch_dit(nn.ModuleList([Block()]).to(device))


def test_export_with_a_dynamic_batch(device):
    model = patch_dit(off_zero(Model()).to(device)).eval()
    batch = torch.export.Dim("batch", min=2)
    given = (torch.randn(2, 4, 8, device=device), torch.randn(2, WIDTH, device=device))
    program = torch.export.export(model, given, dynamic_shapes=({0: batch}, {0: batch}))
    x, c = torch.randn(5, 4, 8, device=device), torch.randn(5, WIDTH, device=device)
    torch.testing.assert_close(program.module()(x, c), model(x, c))


@pytest.mark.parametrize("norm", ["norm1", "norm2"])
def test_a_hook_on_a_norm_is_seen_and_a_replaced_norm_runs(norm, device):
    model = patch_dit(nn.ModuleList([Block()]).to(device))
    given = tokens(2, 4, device)
    plain = model[0](*given)
    handle = model[0].get_submodule(norm).register_forward_hook(lambda module, a, out: 0 * out)
    assert not torch.allclose(model[0](*given), plain)
    handle.remove()
    assert torch.equal(model[0](*given), plain)
    setattr(model[0], norm, nn.LayerNorm(WIDTH, eps=1e-6, bias=False, device=device))
    with torch.no_grad():
        getattr(model[0], norm).weight.mul_(2)
    assert not torch.allclose(model[0](*given), plain)


def test_a_hook_on_the_final_norm_is_seen(device):
    model = patch_dit(off_zero(Model()).to(device))
    seen = []
    model.final_layer.norm_final.register_forward_hook(lambda *a: seen.append(a[0]))
    model(torch.randn(1, 4, 8, device=device), torch.randn(1, WIDTH, device=device))
    assert seen == [model.final_layer.norm_final]


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_lora_keeps_its_effect(order, device):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["qkv", "proj", "fc1"], r=2, init_lora_weights=False)
    plain = off_zero(Model()).to(device)
    model = copy.deepcopy(plain)
    torch.manual_seed(0)
    wanted = peft.get_peft_model(plain, config)
    if order == "before":
        patch_dit(model)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, config)
    if order == "after":
        patch_dit(model)
    given = torch.randn(2, 4, 8, device=device), torch.randn(2, WIDTH, device=device)
    out = wrapped(*given)
    torch.testing.assert_close(out, wanted(*given), rtol=1e-4, atol=1e-5)
    with wrapped.disable_adapter():
        assert not torch.allclose(wrapped(*given), out)
