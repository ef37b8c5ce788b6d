"""Increment propagation: the difference of two forwards, exact however small, with products in low precision."""

import copy

import pytest
import torch
import torch.nn.functional as F

import soflow_kernels as kernels
from soflow_fast import DiT, DiTConfig, Objective, TrainState, paired_forward, preset, train_step
from soflow_fast.data import open_source
from soflow_fast.flow import per_sample
from soflow_fast.models.attention import flop_counter
from soflow_fast.models.dit import TapedOutputs
from soflow_fast.objective import ConsistencyPoints
from soflow_fast.training.precision import OPERAND, matmul_precision

RATIOS = (0.5, 0.1, 0.01, 0.002, 1e-4, 1e-5)
SIZES = {
    "64": DiTConfig(input_size=8, patch_size=2, in_channels=2, hidden_size=64, depth=4, num_heads=4, num_classes=5),
    "72, one head": DiTConfig(
        input_size=8, patch_size=4, in_channels=2, hidden_size=72, depth=2, num_heads=1, num_classes=5
    ),
    "48, normalised q and k": DiTConfig(
        input_size=8, patch_size=2, in_channels=2, hidden_size=48, depth=3, num_heads=2, num_classes=5, qk_norm=True
    ),
    "160": DiTConfig(input_size=8, patch_size=1, in_channels=2, hidden_size=160, depth=3, num_heads=5, num_classes=5),
}  # fmt: skip


def relative(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module", params=SIZES, ids=list(SIZES))
def nets(request):
    """A network off its initial zeros, in float32 and float64; each product keeps about the size of its input."""
    net = DiT(SIZES[request.param])
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            size = 0.8 / p.shape[-1] ** 0.5 if p.dim() == 2 else 0.1
            p.add_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return net, copy.deepcopy(net).double()


@pytest.fixture(scope="module")
def batch():
    source = torch.Generator().manual_seed(7)
    x, v = torch.randn(2, 5, 2, 8, 8, generator=source)
    t = torch.tensor([0.9, 0.5, 0.7, 0.99, 0.2])
    return x, v, t, 0.3 * t, torch.tensor([0, 1, 2, 3, 5])


def exact(net64, x, dx, t, dt, s, y):
    with torch.no_grad():
        x, dx, t, dt, s = (v.double() for v in (x, dx, t, dt, s))
        start = net64(x, t, s, y)
        return start, net64(x + dx, t + dt, s, y) - start


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("r", RATIOS)
def test_equals_the_difference_of_two_float64_forwards(nets, batch, r, sign):
    net, net64 = nets
    x, v, t, s, y = batch
    dt = sign * r * (s - t)
    dx = v * per_sample(dt, x)
    start, difference = exact(net64, x, dx, t, dt, s, y)
    for dtype, value_bound, bound in (
        (torch.bfloat16, 3e-2, 3e-2),
        (torch.float16, 5e-3, 5e-3),
        (torch.float32, 1e-5, 1e-4),
    ):
        value, increment = paired_forward(net, x, dx, t, dt, s, y, dtype=dtype)
        assert value.dtype == increment.dtype == torch.float32
        assert relative(value, start) < value_bound, dtype
        assert relative(increment, difference) < bound, dtype


@pytest.mark.parametrize("still", ["x", "t", "both"])
def test_each_input_alone(nets, batch, still):
    net, net64 = nets
    x, v, t, s, _ = batch
    dt = 0.01 * (s - t)
    dx = v * per_sample(dt, x)
    dx, dt = dx * (still == "t"), dt * (still == "x")
    _, difference = exact(net64, x, dx, t, dt, s, None)
    increment = paired_forward(net, x, dx, t, dt, s, None, dtype=torch.float32)[1]
    if still == "both":
        assert increment.abs().max() == 0
    else:
        assert difference.norm() > 0 and relative(increment, difference) < 1e-4


def test_float64_weights_stay_float64(nets, batch):
    _, net64 = nets
    x, v, t, s, y = batch
    dt = 0.1 * (s - t)
    start, difference = exact(net64, x, v * per_sample(dt, x), t, dt, s, y)
    value, increment = paired_forward(net64, x, v * per_sample(dt, x), t, dt, s, y, dtype=torch.float64)
    assert relative(value, start) < 1e-12 and relative(increment, difference) < 1e-11


@pytest.mark.parametrize("r", RATIOS)
@pytest.mark.parametrize(("precision", "bound"), [("bf16", 3e-2), ("fp32", 1e-4)])
def test_rides_along_on_the_values_of_another_forward(nets, batch, r, precision, bound):
    """The last three samples of a forward with gradient: the same exactness, and its output as the value."""
    net, net64 = nets
    x, v, t, s, y = batch
    rows = slice(2, 5)
    dt = (r * (s - t))[rows]
    dx = v[rows] * per_sample(dt, x)
    tape = TapedOutputs(rows)
    with matmul_precision(precision, torch.device("cpu")):
        output = net(x, t, s, y, tape=tape)
    plain = net(x, t, s, y)
    assert relative(output.detach(), plain.detach().double()) < (1e-5 if precision == "fp32" else 5e-2)
    given = (net, x[rows], dx, t[rows], dt, s[rows], y[rows])
    value, increment = paired_forward(*given, dtype=OPERAND[precision], tape=tape)
    assert torch.equal(value, output[rows].float()) and not value.requires_grad
    assert relative(increment, exact(net64, *given[1:])[1]) < bound
    with flop_counter() as one:
        paired_forward(*given, dtype=OPERAND[precision], tape=tape)
    with flop_counter() as two:
        paired_forward(*given, dtype=OPERAND[precision])
    assert one.get_total_flops() < 0.75 * two.get_total_flops()
    output.sum().backward()
    got = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    plain.sum().backward()
    for (name, p), mine in zip(net.named_parameters(), got, strict=True):
        assert relative(mine, p.grad.double()) < (1e-4 if precision == "fp32" else 0.1), name
    net.zero_grad()


@pytest.mark.parametrize("size", [30.0, 3.0, 0.3, 1e-3, 1e-6])
def test_pieces_do_not_cancel_or_overflow(size):
    """Each nonlinear piece in float32 against float64, for increments from 30 times its value to a millionth."""
    source = torch.Generator().manual_seed(3)
    h, dh = torch.randn(2, 4, 6, 16, generator=source) * 3
    dh = dh * size
    one = torch.zeros(4, 16)
    pieces = {
        "silu": (lambda x: kernels.silu_increment(x), lambda a: a * torch.sigmoid(a)),
        "gelu": (lambda x: kernels.bias_gelu_increment(x), lambda a: F.gelu(a, approximate="tanh")),
        "layernorm": (
            lambda x: kernels.layernorm_modulate_increment(x, (one, one), (one, one)),
            lambda a: F.layer_norm(a, a.shape[-1:], eps=1e-6),
        ),
    }
    for name, (paired, plain) in pieces.items():
        increment = paired((h, dh))
        wide, dwide = h.double(), dh.double()
        assert relative(increment, plain(wide + dwide) - plain(wide)) < 1e-5, name
    t, dt = torch.rand(50, generator=source), torch.randn(50, generator=source) * min(size, 0.5)
    s = torch.rand(50, generator=source)
    increment = kernels.time_embedding_increment(t, dt, s)[1]
    t, dt, s = t.double(), dt.double(), s.double()
    start, end = (kernels.time_embedding_increment(u, dt, s)[0] for u in (t, t + dt))
    assert relative(increment, end - start) < 1e-5


@pytest.fixture(scope="module")
def trained():
    """A small DiT trained on the digits for long enough that its quotient means something."""
    changes = {"model.patch_size": 2, "model.hidden_size": 64, "model.depth": 3, "steps": 400, "optim.lr": 3e-3}
    config = preset("digits", device="cpu", precision="fp32", **changes)
    state, source = TrainState.build(config), open_source(config)
    while state.step < config.steps:
        train_step(state, *source.batch(state.step))
    return state.flow, source


@pytest.mark.slow
def test_quotient_of_a_trained_network(trained, capsys):
    """bf16 products with increments against plain pairs, relative error of q and its cosine with float64."""
    flow, source = trained
    wide = copy.deepcopy(flow).double()
    x0, y = source.batch(10_000)
    generator = torch.Generator().manual_seed(5)
    x1 = torch.randn(x0.shape, generator=generator)
    objective = Objective()
    t, s = objective.consistency_times(len(x0), generator)
    x, v = flow.point(x0, x1, t)
    rows = []
    for r in (0.1, 0.01, 0.002, 0.0003):
        l = torch.minimum(t + r * (s - t), t - 1e-6)
        dt, x_l = l - t, x + v * per_sample(l - t, x)
        args64 = (a.double() for a in (x, v, t, l, s))
        with torch.no_grad():
            start, difference = exact(wide.network, x, x_l - x, t, dt, s, y)
            x64, v64, t64, l64, s64 = args64
            at = ConsistencyPoints(x64, v64, x64, x64, t64, l64, s64, y)
            q64 = objective.quotient(wide, at, start, difference)
            found = {}
            value, increment = paired_forward(flow.network, x, x_l - x, t, dt, s, y, dtype=torch.bfloat16)
            found["increments, bf16"] = (value, increment)
            for name, dtype in (("bf16 pair", torch.bfloat16), ("fp16 pair", torch.float16), ("fp32 pair", None)):
                with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                    start, end = (flow.network(*a, s, y).float() for a in ((x, t), (x_l, l)))
                found[name] = (start, end - start)
        for name, (value, increment) in found.items():
            at = ConsistencyPoints(x, v, x_l - x, x_l, t, l, s, y)
            q = objective.quotient(flow, at, value, increment).double()
            cosine = float((q * q64).sum() / (q.norm() * q64.norm()))
            rows.append((r, name, relative(q, q64), cosine))
    with capsys.disabled():
        print("\n r       products           error of q  cosine")
        print("\n".join(f" {r:<7} {name:<18} {error:9.4f}  {cosine:8.5f}" for r, name, error, cosine in rows))
    ours = {r: cosine for r, name, _, cosine in rows if name == "increments, bf16"}
    plain = {r: cosine for r, name, _, cosine in rows if name == "bf16 pair"}
    assert all(cosine >= 0.999 for cosine in ours.values()), ours
    assert max(plain[0.002], plain[0.0003]) < 0.9  # the trap is there


def test_wrong_arguments_are_refused():
    net = DiT(SIZES["64"])
    x, t = torch.randn(2, 2, 8, 8), torch.rand(2)
    with pytest.raises(ValueError, match="net must be a DiT"):
        paired_forward(torch.nn.Linear(2, 2), x, x, t, t, t)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="dtype must be"):
        paired_forward(net, x, x, t, t, t, dtype=torch.int32)
    with pytest.raises(ValueError, match="dx and dt"):
        paired_forward(net, x, x[:1], t, t, t)
    with pytest.raises(ValueError, match=r"^x must be"):
        paired_forward(net, x[:, :1], x, t, t, t)
