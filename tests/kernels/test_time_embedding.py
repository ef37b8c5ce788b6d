"""dual_time_embedding against float64, beside eager PyTorch in the same dtype, and the engine's conditioning."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from soflow_fast import DiT, DiTConfig
from soflow_kernels import testing, time_embedding_increment
from soflow_kernels import time_embedding as te

SPECIAL = (0.0, 1e-7, 1e-4, 0.5, 1 - 1e-7, 1.0)
CLASSES = 5
LABELS = (3, 0, 3, CLASSES, 3, 1, 0)
NAMES = ("W1", "b1", "W2", "b2")
PARAMETERS = (*(f"{embedder}_{name}" for embedder in "ts" for name in NAMES), "table")
THIRD = (*PARAMETERS, *(f"g_{name}" for name in NAMES))
"""With the embedder of a third number."""


def inputs(B, D, dtype, device, H=None, frequencies=16, seed=0, third=False):
    """({parameter: tensor}, times and labels, one weight for the output). third: with g, as of a guidance scale."""
    H = D if H is None else H
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W1": (H, frequencies), "b1": (H,), "W2": (D, H), "b2": (D,), "table": (CLASSES + 1, D)}
    parameters = {}
    for name in THIRD if third else PARAMETERS:
        shape = shapes[name[2:] if name != "table" else name]
        scale = shape[-1] ** -0.5 if len(shape) == 2 and name != "table" else 1.0
        parameters[name] = (scale * torch.randn(shape, generator=generator)).to(device, dtype)
    t = torch.rand(B, generator=generator)
    s = t * torch.rand(B, generator=generator)
    y = torch.tensor([LABELS[b % len(LABELS)] for b in range(B)], dtype=torch.int64)
    others = {"t": t.to(device), "s": s.to(device), "y": y.to(device)}
    if third:
        others["g"] = torch.rand(B, generator=generator).to(device)
    return parameters, others, torch.randn(B, D, generator=generator).to(device, dtype)


def call(function, t, s, y, table, **parameters):
    t_weights, s_weights = (tuple(parameters[f"{embedder}_{name}"] for name in NAMES) for embedder in "ts")
    options = {name: value for name, value in parameters.items() if name not in THIRD}
    if "g" in parameters:
        options["g_weights"] = tuple(parameters[f"g_{name}"] for name in NAMES)
    return function(t, s, y, t_weights, s_weights, table, **options)


def run(function, parameters, others, weight):
    return testing.grads(partial(call, function, **others), parameters, [weight])


def truth(parameters, others, weight):
    wide = {name: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for name, v in others.items()}
    return run(te.dual_time_embedding_reference, {n: p.double() for n, p in parameters.items()}, wide, weight.double())


def assert_close(actual, eager, exact, rounds=True):
    """Hold the norm of each error to twice eager PyTorch's, and four units of float32 for what has few elements.

    The bounds of single elements, `testing.assert_matches`, hold for the kernels alone. Products lie between them here:
    one sums 2 H terms where eager PyTorch sums H twice, which alone makes its rounding error sqrt 2 times larger. Where
    the interpreter truncates to bfloat16 instead of rounding, errors double and have one sign.
    """
    factor = 2 if rounds or not testing.INTERPRETED else 5
    for name, want in exact.items():
        assert actual[name].shape == want.shape and actual[name].dtype == eager[name].dtype, name
        error, allowed = ((found[name].double() - want).norm().item() for found in (actual, eager))
        allowed = factor * allowed + 4 * torch.finfo(torch.float32).eps * want.norm().item()
        assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"


def check(parameters, others, weight):
    with testing.poisoned():
        actual = run(te.dual_time_embedding, parameters, others, weight)
    eager = run(te.dual_time_embedding_reference, parameters, others, weight)
    rounds = parameters["t_W1"].dtype != torch.bfloat16
    assert_close(actual, eager, truth(parameters, others, weight), rounds)
    return actual


def hidden_reference(ht, hs, bt, bs, hg=None, bg=None):
    return F.silu(torch.cat([ht + bt, hs + bs, *([] if hg is None else [hg + bg])], dim=1)).to(ht.dtype)


def tail_reference(x, bt, bs, table, y, bg=0):
    return F.silu(x + bt + bs + bg + (table[-1:] if y is None else F.embedding(y, table)))


def parts(B, D, dtype, device):
    """The kernels around the products: (function, reference, tensors) by name, and a generator for more."""
    generator = torch.Generator().manual_seed(B + D)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)  # noqa: E731
    y = torch.tensor([LABELS[b % len(LABELS)] for b in range(B)], dtype=torch.int64, device=device)
    biases = {"bt": draw(D), "bs": draw(D)}
    tail = {"x": 3 * draw(B, D), **biases, "table": draw(CLASSES + 1, D)}
    return {
        "hidden": (
            te._hidden,
            hidden_reference,
            {"ht": 3 * draw(B, D), "hs": 3 * draw(B, D), **biases},
            draw(B, 2 * D),
        ),
        "tail": (partial(te._tail, y=y), partial(tail_reference, y=y), tail, draw(B, D)),
        "hidden of three": (
            lambda hg, bg, **two: te._hidden(*two.values(), hg, bg),
            hidden_reference,
            {"ht": 3 * draw(B, D), "hs": 3 * draw(B, D), **biases, "hg": 3 * draw(B, D), "bg": draw(D)},
            draw(B, 3 * D),
        ),
        "tail of three": (
            lambda bg, **two: te._tail(*two.values(), y, bg),
            partial(tail_reference, y=y),
            {**tail, "bg": draw(D)},
            draw(B, D),
        ),
        "null tail": (partial(te._tail, y=None), partial(tail_reference, y=None), tail, draw(B, D)),
    }


def check_part(function, reference, tensors, weight):
    with testing.poisoned():
        actual = testing.grads(function, tensors, [weight])
    eager = testing.grads(reference, tensors, [weight])
    exact = testing.grads(reference, {name: tensor.double() for name, tensor in tensors.items()}, [weight.double()])
    testing.assert_matches(actual, eager, exact)


all_parts = pytest.mark.parametrize("part", ["hidden", "tail", "null tail", "hidden of three", "tail of three"])
# One column, a tile of rows that is not full, no rows, a masked tile, many tiles of rows, many of columns.
PART_SHAPES = ((3, 1), (7, 64), (0, 40), (1, 100), (70, 40), (2, 1152))


@pytest.mark.parametrize(
    ("part", "shape"),
    [(part, shape) for part in ("hidden", "tail") for shape in PART_SHAPES]
    + [("null tail", shape) for shape in ((7, 64), (0, 40), (70, 40))]
    + [(f"{part} of three", shape) for part in ("hidden", "tail") for shape in ((7, 64), (0, 40), (70, 136))],
    ids=str,
)
def test_parts(part, shape, device):
    check_part(*parts(*shape, torch.float32, device)[part])


@all_parts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parts_in_half_precision(dtype, part, device):
    check_part(*parts(7, 100, dtype, device)[part])


@all_parts
@pytest.mark.parametrize("layout", testing.LAYOUTS[1:])
def test_parts_in_other_layouts(layout, part, device):
    function, reference, tensors, weight = parts(7, 72, torch.float32, device)[part]
    tensors = {name: testing.lay_out(tensor, layout) for name, tensor in tensors.items()}
    check_part(function, reference, tensors, testing.lay_out(weight, layout))


@all_parts
def test_parts_of_mixed_dtypes(part, device):
    """Products in bfloat16 and parameters in float32, as under autocast; the last bias in bfloat16 too."""
    function, reference, tensors, weight = parts(7, 72, torch.float32, device)[part]
    products = {name: tensor.bfloat16() for name, tensor in tensors.items() if name in ("x", "ht", "hs", "hg", "bs")}
    check_part(function, reference, {**tensors, **products}, weight)


def angles(t, s, frequencies, max_period):
    """The angles of both times in float64; the difference of the times is float32's."""
    w = max_period ** (-torch.arange(frequencies // 2, device=t.device, dtype=torch.float64) * (2 / frequencies))
    return torch.stack([t, t - s]).double()[..., None] * w


@pytest.mark.parametrize(
    ("frequencies", "max_period"),
    [(256, 1e4), (2, 1e4), (4, 1e4), (100, 1e4), (600, 1e4), (100, 1.0), (100, 37.5), (100, 1e9)],
)
def test_sinusoids(frequencies, max_period, device):
    """2e-7 absolute for times in [0, 1], and the relative precision of float32 for small sines."""
    pairs = list(itertools.product(SPECIAL, SPECIAL)) + [(0.123456 + 0.0137 * i, 0.011 * i) for i in range(60)]
    t, s = torch.tensor(pairs, device=device).unbind(1)
    with testing.poisoned():
        got = te._sinusoids(t, s, frequencies, max_period, torch.float32).double()
    angle = angles(t, s, frequencies, max_period)
    cos, sin = got.chunk(2, dim=-1)
    assert got.shape == (2, len(pairs), frequencies)
    assert (cos - angle.cos()).abs().max() <= 2e-7
    assert (sin - angle.sin()).abs().max() <= 2e-7


@pytest.mark.parametrize(
    ("frequencies", "max_period"), [(256, 1e4), (4, 1e4), (600, 1e4), (8192, 1e4), (600, 37.5), (600, 1e9)]
)
def test_frequencies(frequencies, max_period, device):
    """The sine of a tiny power of two is that power times the frequency: one unit in the last place of float32."""
    t = torch.tensor([2.0**-30], device=device)
    got = te._sinusoids(t, t, frequencies, max_period, torch.float32)[0, :, frequencies // 2 :].double() * 2**30
    torch.testing.assert_close(got, angles(t, t, frequencies, max_period)[0] * 2**30, rtol=1.25e-7, atol=0)


def test_sinusoids_of_large_times(device):
    """Times scaled by 1000 or more: what float32 can say of the angle, and never outside [-1, 1]."""
    u = torch.cat(
        [
            torch.linspace(-1e4, 1e4, 201),
            torch.linspace(0, 1000, 101),
            torch.arange(60) * (math.pi / 4),
            torch.tensor([1e9, -1e30]),
        ]
    )
    u = u.to(device)
    got = te._sinusoids(u, torch.zeros_like(u), 256, 10_000.0, torch.float32)[0].double()
    angle = angles(u, torch.zeros_like(u), 256, 10_000.0)[0]
    error = (got - torch.cat([angle.cos(), angle.sin()], dim=1)).abs().amax(1)
    near = u.abs() <= 1e4
    exact = got[:, [0, 128]] - torch.stack([u, u]).double().T.sub(torch.tensor([0, math.pi / 2], device=device)).cos()
    assert exact[near].abs().max() <= 2e-7  # w_0 = 1: the reduction alone
    assert (error[near] <= 2e-7 + 1.2e-7 * u[near].double().abs()).all()
    assert (got[u.abs() <= 1e9].abs() <= 1 + 1e-6).all()


def test_sinusoids_of_what_is_no_number(device):
    t = torch.tensor([torch.nan, torch.inf, 0.5], device=device)
    got = te._sinusoids(t, torch.zeros_like(t), 8, 10_000.0, torch.float32)
    assert got.isnan().all(-1).tolist() == [[True, True, False]] * 2
    assert not got[:, 2].isnan().any()


@pytest.mark.parametrize(
    ("D", "null"), [(1, False), (72, False), (384, False), (72, True)], ids=["1", "72", "384", "72 null"]
)
def test_forward_and_gradients(D, null, device):
    """Labels come several times; a row of the table without a sample gets an exact zero."""
    parameters, others, weight = inputs(3, D, torch.float32, device, H=max(D, 24))
    others["y"] = None if null else others["y"]
    found = check(parameters, others, weight)["gradient of table"]
    used = {CLASSES} if null else set(LABELS[:3])
    assert all((found[row] == 0).all() == (row not in used) for row in range(CLASSES + 1))


@pytest.mark.parametrize("null", [False, True], ids=["labels", "null"])
def test_a_third_number(null, device):
    """Beside the two times, with its gradients; without it the other two and the label are what they were."""
    parameters, others, weight = inputs(9, 72, torch.float32, device, H=40, third=True)
    others["y"] = None if null else others["y"]
    found = check(parameters, others, weight)
    assert (found["gradient of g_W1"] != 0).any()
    # An embedder of zeros adds nothing, and rounds nothing.
    zeros = {name: torch.zeros_like(value) if name[:2] == "g_" else value for name, value in parameters.items()}
    without = run(te.dual_time_embedding, {n: parameters[n] for n in PARAMETERS}, {n: others[n] for n in "tsy"}, weight)
    torch.testing.assert_close(
        run(te.dual_time_embedding, zeros, others, weight)["output 0"], without["output 0"], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_third_number_in_half_precision(dtype, device):
    parameters, others, weight = inputs(5, 100, dtype, device, frequencies=64, third=True)
    assert check(parameters, others, weight)["output 0"].dtype == dtype


@pytest.mark.parametrize(("B", "null"), [(0, False), (1, False), (70, False), (70, True)])
def test_batches(B, null, device):
    """70 samples are three tiles of labels and nine of hidden rows."""
    parameters, others, weight = inputs(B, 40, torch.float32, device, H=24)
    others["y"] = None if null else others["y"]
    check(parameters, others, weight)


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_empty_batch(mode, device):
    """The gradients of all parameters are exact zeros."""
    parameters, others, weight = inputs(0, 40, torch.float32, device)
    for y in (others["y"], None):
        with testing.mode(mode):
            found = run(te.dual_time_embedding, parameters, {**others, "y": y}, weight)
        assert found.pop("output 0").shape == (0, 40)
        assert all((value == 0).all() for value in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, device):
    parameters, others, weight = inputs(5, 100, dtype, device, frequencies=64)
    assert check(parameters, others, weight)["output 0"].dtype == dtype


def test_times_of_half_precision_are_taken_in_float32(device):
    parameters, others, weight = inputs(5, 40, torch.float32, device)
    for name in ("t", "s"):
        others[name] = others[name].bfloat16()
    check(parameters, others, weight)


def test_table_of_another_dtype(device):
    parameters, others, weight = inputs(5, 40, torch.bfloat16, device)
    parameters["table"] = parameters["table"].float()
    found = check(parameters, others, weight)
    assert found["output 0"].dtype == found["gradient of table"].dtype == torch.float32


def test_autocast(device):
    """The products in bfloat16, everything that is kept in float32."""
    parameters, others, weight = inputs(5, 40, torch.float32, device, frequencies=64)
    with torch.autocast(device, torch.bfloat16):
        actual = run(te.dual_time_embedding, parameters, others, weight)
        eager = run(te.dual_time_embedding_reference, parameters, others, weight)
    assert_close(actual, eager, truth(parameters, others, weight), rounds=False)
    single = run(te.dual_time_embedding, parameters, others, weight)
    assert (actual["output 0"] - single["output 0"]).abs().max() > 1e-4  # autocast did reach the products


@pytest.mark.parametrize("layout", testing.LAYOUTS[1:])
def test_layouts(layout, device):
    parameters, others, weight = inputs(5, 72, torch.float32, device)
    laid_out = {name: testing.lay_out(tensor, layout) for name, tensor in parameters.items()}
    if layout != "transposed":
        others = {name: testing.lay_out(v.double(), layout).to(v.dtype) for name, v in others.items()}
        strided = {name: v.repeat_interleave(2)[::2] for name, v in others.items()}
        check(laid_out, strided, testing.lay_out(weight, layout))
    check(laid_out, others, testing.lay_out(weight, layout))


def test_max_period(device):
    parameters, others, weight = inputs(5, 40, torch.float32, device)
    found = check(parameters, {**others, "max_period": 100.0}, weight)["output 0"]
    assert not torch.equal(found, call(te.dual_time_embedding, **parameters, **others))


def test_special_times_and_flow_matching(device):
    """Both ends of the path, and t = s, where the second embedder sees 0."""
    parameters, others, _ = inputs(len(SPECIAL) ** 2, 40, torch.float32, device)
    t, s = torch.tensor(list(itertools.product(SPECIAL, SPECIAL)), device=device).unbind(1)
    weight = torch.ones(len(t), 40, device=device)
    check(parameters, {**others, "t": t, "s": s}, weight)
    check(parameters, {**others, "t": t, "s": t}, weight)


@pytest.mark.parametrize(("null", "third"), [(False, False), (True, False), (False, True)])
def test_is_the_engines_conditioning(null, third, device):
    """The modules of a DiT, called one by one in float64, and the network's own conditioning."""
    sizes = {"input_size": 8, "in_channels": 2, "hidden_size": 40, "depth": 1, "num_heads": 2, "num_classes": CLASSES}
    network = DiT(DiTConfig(patch_size=2, guidance_range=(1.0, 4.0) if third else None, **sizes)).to(device)
    network.requires_grad_(False)
    for p in network.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p))
    _, others, _ = inputs(7, 1, torch.float32, device)
    others["y"] = None if null else others["y"]
    w = torch.tensor([1, 1.25, 2, 2.5, 3, 4, 1.1], device=device) if third else None
    got = network.conditioning(*others.values(), w)
    network.double()
    t, s, y = others["t"].double(), others["s"].double(), others["y"]
    y = torch.full(t.shape, CLASSES, device=t.device) if null else y
    parts = [(network.t_embedder, t), (network.s_embedder, t - s)]
    parts += [] if w is None else [(network.w_embedder, 1 - 1 / w.double())]
    c = sum(embedder.mlp(time_embedding_increment(u, u, u)[0, 0]) for embedder, u in parts) + network.y_embedder(y)
    torch.testing.assert_close(got.double(), F.silu(c), rtol=1e-5, atol=1e-6)


def test_far_arguments_of_silu(device):
    """The exponential overflows on the left: neither value nor slope becomes NaN."""
    c = torch.tensor([[-1e4, -200.0, -90.0, 0.0, 90.0, 1e4]], device=device).requires_grad_()
    zero = torch.zeros(6, device=device)
    out = te._tail(c, zero, zero, zero[None], None)
    (slope,) = torch.autograd.grad(out.sum(), c)
    exact = c.detach().double().requires_grad_()
    want = F.silu(exact)
    (want_slope,) = torch.autograd.grad(want.sum(), exact)
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(slope.double(), want_slope, rtol=1e-6, atol=1e-30)


def test_nan_stays_in_its_sample(device):
    parameters, others, weight = inputs(7, 40, torch.float32, device)
    others["t"][1] = torch.nan
    found = run(te.dual_time_embedding, parameters, others, weight)
    assert found["output 0"].isnan().all(1).tolist() == [b == 1 for b in range(7)]
    table = found["gradient of table"].isnan()
    assert table.any(1).tolist() == table.all(1).tolist() == [row == LABELS[1] for row in range(CLASSES + 1)]
    assert all(found[f"gradient of {name}"].isnan().any() for name in PARAMETERS if name != "table")


@pytest.mark.parametrize("wrong", [-1, CLASSES + 1, 2**40])
def test_a_label_outside_the_table_is_seen(wrong, device):
    parameters, others, weight = inputs(7, 40, torch.float32, device)
    parameters["table"] = torch.randn(CLASSES + 3, 40, device=device)[1:-1]  # memory of its own on both sides
    others["y"][2] = wrong
    found = run(te.dual_time_embedding, parameters, others, weight)
    assert found["output 0"].isnan().all(1).tolist() == [b == 2 for b in range(7)]
    assert not found["gradient of table"].isnan().any()
    assert found["gradient of t_b2"].isnan().all()
    if device == "cpu":
        with pytest.raises(IndexError):
            call(te.dual_time_embedding_reference, **others, **parameters)


def test_same_bits_every_time(device):
    parameters, others, weight = inputs(70, 40, torch.float32, device)
    first, second = (run(te.dual_time_embedding, parameters, others, weight) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_many_samples_of_one_label(device):
    """A sum over 300 samples, against torch's own gradient of an embedding."""
    dc = torch.randn(300, 33, generator=torch.Generator().manual_seed(0)).to(device)
    y = torch.tensor([2] * 299 + [0], device=device)
    zero = torch.zeros(33, device=device)
    x = torch.full((300, 33), 60.0, device=device)  # where the slope of SiLU is 1
    _, dbias, dtable = te._tail_backward(dc, x, zero, zero, torch.zeros(4, 33, device=device), y)
    want = torch.ops.aten.embedding_dense_backward(dc.double(), y, 4, -1, False)
    torch.testing.assert_close(dtable.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dbias.double(), dc.double().sum(0), rtol=1e-5, atol=1e-5)


def test_reference_has_right_gradients():
    parameters, others, _ = inputs(2, 3, torch.float64, "cpu", frequencies=4)
    leaves = [tensor.requires_grad_() for tensor in (others["t"].double(), others["s"].double(), *parameters.values())]

    def function(t, s, *values):
        parameters = dict(zip(PARAMETERS, values, strict=True))
        return call(te.dual_time_embedding_reference, t, s, others["y"], **parameters)

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_reference_has_right_gradients_of_the_third_number():
    parameters, others, _ = inputs(2, 3, torch.float64, "cpu", frequencies=4, third=True)
    leaves = [others["g"].double().requires_grad_(), *(parameters[f"g_{name}"].requires_grad_() for name in NAMES)]

    def function(g, *values):
        given = {**parameters, **dict(zip((f"g_{name}" for name in NAMES), values, strict=True))}
        return call(te.dual_time_embedding_reference, **{**others, "g": g}, **given)

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)


def test_times_with_a_gradient_take_the_reference(device):
    parameters, others, _ = inputs(3, 40, torch.float32, device)
    for name in ("t", "s"):
        time = others[name].clone().requires_grad_()
        given = {**others, name: time}
        wanted = torch.autograd.grad(call(te.dual_time_embedding_reference, **given, **parameters).sum(), time)[0]
        found = torch.autograd.grad(call(te.dual_time_embedding, **given, **parameters).sum(), time)[0]
        assert wanted.abs().max() > 0 and torch.equal(found, wanted)
        with torch.no_grad():
            without = call(te.dual_time_embedding, **given, **parameters)
        assert torch.equal(without, call(te.dual_time_embedding, **others, **parameters))


def test_forward_mode_and_reference_mode(device):
    parameters, others, _ = inputs(3, 40, torch.float32, device)

    def tangent(function):
        given = {name: value for name, value in others.items() if name != "t"}
        at = lambda t: call(function, t, **given, **parameters)  # noqa: E731
        return torch.func.jvp(at, (others["t"],), (torch.ones_like(others["t"]),))[1]

    wanted = tangent(te.dual_time_embedding_reference)
    assert wanted.abs().max() > 0 and torch.equal(tangent(te.dual_time_embedding), wanted)
    with testing.mode("reference"):
        got = call(te.dual_time_embedding, **others, **parameters)
    want = call(te.dual_time_embedding_reference, **others, **parameters)
    assert torch.equal(got, want)
    assert not torch.equal(call(te.dual_time_embedding, **others, **parameters), want)  # the kernels did run


def test_opcheck(device):
    parameters, others, _ = inputs(3, 40, torch.float32, device)
    x, h = (torch.randn(3, 40, device=device, requires_grad=True) for _ in range(2))
    b, a, table = (parameters[name].requires_grad_() for name in ("t_b2", "s_b2", "table"))
    torch.library.opcheck(te._sinusoids.library, (others["t"], others["s"], 16, 10_000.0, torch.bfloat16))
    torch.library.opcheck(te._hidden.library, (x, h, b, a))
    torch.library.opcheck(te._tail.library, (x, b, a, table, None))
    g, c = (tensor.detach().clone().requires_grad_() for tensor in (h, b))
    torch.library.opcheck(te._sinusoids.library, (others["t"], others["s"], 16, 1e4, torch.bfloat16, others["t"]))
    torch.library.opcheck(te._hidden.library, (x, h, b, a, g, c))
    torch.library.opcheck(te._tail.library, (x, b, a, table, others["y"], c))
    torch.library.opcheck(te._tail.library, (x.detach().bfloat16().requires_grad_(), b, a, table, others["y"]))


@pytest.mark.parametrize(
    ("null", "autocast", "third"),
    [(False, False, False), (True, False, False), (False, True, False), (False, True, True)],
)
def test_compile_equals_eager(null, autocast, third, device):
    parameters, others, weight = inputs(5, 40, torch.float32, device, third=third)
    others["y"] = None if null else others["y"]
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(te.dual_time_embedding, fullgraph=True, backend=backend)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        eager = run(te.dual_time_embedding, parameters, others, weight)
        found = run(compiled, parameters, others, weight)
    assert all(torch.equal(found[name], value) for name, value in eager.items())


def test_wrong_arguments_are_named(device):
    parameters, others, _ = inputs(3, 8, torch.float32, device)
    weights = {e: [parameters[f"{e}_{name}"] for name in NAMES] for e in "ts"}

    def refused(match, **changed):
        given = {**others, "t_weights": weights["t"], "s_weights": weights["s"], "table": parameters["table"]}
        with pytest.raises(ValueError, match=f"^dual_time_embedding: {match}"):
            te.dual_time_embedding(**{**given, **changed})

    for name in ("t", "s"):
        for wrong in (None, 0.5, others[name].long(), others[name][None], others[name].to("meta")):
            if name == "s" or not torch.is_tensor(wrong) or not wrong.is_meta:
                refused(name, **{name: wrong})
    refused("s must have shape", s=others["s"][:2])
    for wrong in (3, others["t"], others["y"][:2], others["y"][None], others["y"].int(), others["y"].to("meta")):
        refused("y must", y=wrong)
    for e, i in itertools.product("ts", range(4)):
        name = rf"{e}_weights\[{i}\]"
        value = weights[e][i]
        for wrong in (None, value.long(), value[None], value.to("meta")):
            refused(name, **{f"{e}_weights": [wrong if j == i else w for j, w in enumerate(weights[e])]})
        if (e, i) != ("t", 0):
            wrong = [value.bfloat16() if j == i else w for j, w in enumerate(weights[e])]
            refused(name + " must be torch.float32", **{f"{e}_weights": wrong})
            wrong = [torch.cat([v, v]) if j == i else v for j, v in enumerate(weights[e])]
            refused(r"[ts]_weights\[\d\] must have shape", **{f"{e}_weights": wrong})
        refused(f"{e}_weights must be a tuple", **{f"{e}_weights": weights[e][:3]})
        refused(f"{e}_weights must be a tuple", **{f"{e}_weights": value})
    given = {"g": others["t"], "g_weights": weights["s"]}
    for wrong in (0.5, others["t"].long(), others["t"][None], others["t"][:2], others["t"].to("meta")):
        refused("g must", **{**given, "g": wrong})
    refused("g must come with g_weights", g_weights=weights["s"])
    refused("g_weights must be a tuple", **{**given, "g_weights": None})
    refused(
        r"g_weights\[2\] must have shape",
        **{**given, "g_weights": [*weights["s"][:2], weights["s"][0], weights["s"][3]]},
    )
    odd = [weights["t"][0][:, :15], *weights["t"][1:]]
    refused(r"t_weights\[0\] must be \[H, F\] with an even F above 0, got F = 15", t_weights=odd)
    refused(r"t_weights\[0\] must be .* got F = 0", t_weights=[weights["t"][0][:, :0], *weights["t"][1:]])
    for wrong in (None, parameters["table"].long(), parameters["table"][:, :7], parameters["table"][:0]):
        refused("table must", table=wrong)
    for wrong in (None, 0.0, -1.0, math.nan, math.inf):
        refused("max_period must be a number from 1 to", max_period=wrong)
