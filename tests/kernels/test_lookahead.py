"""path_point and euler_lookahead against float64, beside eager PyTorch in the same dtype."""

import math

import pytest
import torch

from soflow_kernels import lookahead, testing
from soflow_kernels.lookahead import euler_lookahead, euler_lookahead_reference, path_point, path_point_reference

SHAPES = [(3, 4, 8, 8), (1, 4, 32, 32), (2, 3, 40, 40), (2, 1, 1, 1), (3, 7), (1, 5000), (0, 4, 8, 8), (2, 0)]
GUIDANCE = {"guidance_scale": 2.5, "guidance_decay_time": 0.6, "mix_ratio": 0.25}
PATHS = pytest.mark.parametrize("path", ["linear", "trig"])
MODES = pytest.mark.parametrize("mode", ["auto", "reference"])


def inputs(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]
    t = torch.rand(shape[0], generator=generator)
    l = t * torch.rand(shape[0], generator=generator)
    dropped = torch.rand(shape[0], generator=generator) < 0.4
    names = ("x", "v", "v_null", "v_label")
    return dict(zip(names, images, strict=True)) | {"t": t.to(device), "l": l.to(device), "dropped": dropped.to(device)}


def double(tensors):
    return {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}


def point(function, given, **settings):
    return function(given["x"], given["v"], given["t"], **settings)


def ahead(function, given, guided=True, mixed=True, drops=True, **others):
    optional = (given["v_null"] if guided else None, given["v_label"] if mixed else None)
    dropped = given["dropped"] if drops else None
    return function(given["x"], given["v"], given["t"], given["l"], *optional, dropped, **{**GUIDANCE, **others})


def named(outputs):
    return {f"output {i}": out for i, out in enumerate(outputs)}


def check(call, function, reference, given, **settings):
    with testing.poisoned():
        actual = named(call(function, given, **settings))
    eager = named(call(reference, given, **settings))
    testing.assert_matches(actual, eager, named(call(reference, double(given), **settings)))


@pytest.mark.parametrize(("path", "shape"), [("linear", shape) for shape in SHAPES] + [("trig", SHAPES[0])], ids=str)
def test_point(path, shape, device):
    check(point, path_point, path_point_reference, inputs(shape, torch.float32, device), path=path)


@PATHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_point_in_half_precision(dtype, path, device):
    check(point, path_point, path_point_reference, inputs((3, 4, 8, 8), dtype, device), path=path)


@PATHS
def test_point_at_the_ends(path, device):
    x0, x1 = torch.randn(2, 2, 8, device=device)
    x, v = path_point(x0, x1, torch.tensor([0.0, 1.0], device=device), path=path)
    torch.testing.assert_close(x, torch.stack([x0[0], x1[1]]), rtol=0, atol=1e-7)
    scale = 1.0 if path == "linear" else math.pi / 2
    wanted = (x1 - x0) if path == "linear" else scale * torch.stack([x1[0], -x0[1]])
    torch.testing.assert_close(v, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lookahead(shape, device):
    check(ahead, euler_lookahead, euler_lookahead_reference, inputs(shape, torch.float32, device))


@pytest.mark.parametrize("kind", [{"mixed": False}, {"drops": False}, {"guided": False, "mixed": False}], ids=str)
def test_lookahead_without(kind, device):
    check(ahead, euler_lookahead, euler_lookahead_reference, inputs((3, 4, 8, 8), torch.float32, device), **kind)


@pytest.mark.parametrize("kind", [{}, {"mixed": False}, {"drops": False}, {"guided": False, "mixed": False}], ids=str)
def test_a_guidance_scale_for_each_sample(kind, device):
    """The same as each sample by itself with a number."""
    given = inputs((5, 4, 8, 8), torch.float32, device)
    w = torch.linspace(1, 4, 5, device=device)
    check(ahead, euler_lookahead, euler_lookahead_reference, given, guidance_scale=w, **kind)
    every = ahead(euler_lookahead, given, guidance_scale=w, **kind)
    for b in range(5):
        one = ahead(euler_lookahead, {k: v[b : b + 1] for k, v in given.items()}, guidance_scale=float(w[b]), **kind)
        assert all(torch.equal(a, b_) for a, b_ in zip(one, (v[b : b + 1] for v in every), strict=True))


@MODES
def test_empty_batch(mode, device):
    """Forward, and backward by the reference."""
    given = inputs((0, 4, 8, 8), torch.float32, device)
    given["x"].requires_grad_()
    with testing.mode(mode):
        for call, function in ((point, path_point), (ahead, euler_lookahead)):
            outs = call(function, given)
            assert all(out.shape == (0, 4, 8, 8) for out in outs)
            assert torch.autograd.grad(outs[-1].sum() + outs[0].sum(), given["x"], allow_unused=True)[0].numel() == 0
            with torch.no_grad():
                assert all(out.shape == (0, 4, 8, 8) for out in call(function, given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lookahead_in_half_precision(dtype, device):
    check(ahead, euler_lookahead, euler_lookahead_reference, inputs((3, 4, 8, 8), dtype, device))


def test_lookahead_by_hand(device):
    """One number, worked out from the formulas: w = 3, m = 0.25, before the decay time, t = 0.5, l = 0.3."""
    x, v, v_null, v_label = (torch.full((2, 1), value, device=device) for value in (0.5, 2.0, 1.0, -1.0))
    t, l = torch.tensor([0.5, 0.5], device=device), torch.tensor([0.3, 0.3], device=device)
    dropped = torch.tensor([False, True], device=device)
    got = euler_lookahead(x, v, t, l, v_null, v_label, dropped, guidance_scale=3.0, mix_ratio=0.25)
    # v_g = 2 + 2 (2 - 1) = 4, target = 0.25 * 4 - 0.75 = 0.25; the dropped one keeps 2.
    for found, wanted in zip(got, ([0.25, 2.0], [-0.05, -0.4], [0.45, 0.1]), strict=True):
        torch.testing.assert_close(found.flatten().cpu(), torch.tensor(wanted), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("t_d", [0.0, 0.5, 0.8, 1.0])
def test_guidance_decay(t_d, device):
    t = torch.cat([torch.linspace(0, 1, 41), 1 - torch.logspace(-7, -2, 20)]).to(device)
    zero, one = torch.zeros(len(t), 1, device=device), torch.ones(len(t), 1, device=device)
    got = euler_lookahead(zero, one, t, t, zero, guidance_scale=2.0, guidance_decay_time=t_d).target[:, 0] - 1
    wanted = lookahead.guidance_decay(t.double(), t_d)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=5e-7)


@pytest.mark.parametrize("layout", testing.LAYOUTS[1:])
def test_layouts(layout, device):
    given = inputs((3, 4, 8, 8), torch.float32, device)
    given = {k: testing.lay_out(v, layout) if v.dim() > 1 else v for k, v in given.items()}
    check(point, path_point, path_point_reference, given)
    check(ahead, euler_lookahead, euler_lookahead_reference, given)


# Composition


def test_gradients_take_the_reference(device):
    """The outputs feed a loss of somebody else's now and then: no gradient is lost without a word."""
    given = inputs((3, 8), torch.float32, device)
    x = given["x"].requires_grad_()
    path_point(x, given["v"], given["t"])[0].sum().backward()
    torch.testing.assert_close(x.grad, (1 - given["t"])[:, None].expand(3, 8))
    x.grad = None
    ahead(euler_lookahead, given).x_l.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 8, device=device))
    with torch.no_grad():
        assert not ahead(euler_lookahead, given).x_l.requires_grad


@PATHS
def test_references_are_differentiated_rightly(path):
    given = double(inputs((2, 3), torch.float32, "cpu"))
    leaves = [given[name].requires_grad_() for name in ("x", "v", "t", "l")]
    assert torch.autograd.gradcheck(lambda x, v, t: path_point_reference(x, v, t, path=path), leaves[:3])
    rest = (given["v_null"], given["v_label"], given["dropped"])
    assert torch.autograd.gradcheck(lambda *first: euler_lookahead_reference(*first, *rest, **GUIDANCE), leaves)


def test_forward_mode_and_reference_mode(device):
    """A dual tensor takes the reference, whose tangent is exact, and so does everything in reference mode."""
    given = inputs((3, 8), torch.float32, device)
    primal, tangent = given["x"], torch.ones_like(given["x"])
    for call, function in ((point, path_point), (ahead, euler_lookahead)):
        found = torch.func.jvp(lambda x: call(function, {**given, "x": x})[-1], (primal,), (tangent,))[1]  # noqa: B023
        assert found.abs().min() > 0
    with testing.mode("reference"):
        got = ahead(euler_lookahead, given)
    assert all(map(torch.equal, got, ahead(euler_lookahead_reference, given)))


def test_nan_stays_in_its_element(device):
    given = inputs((2, 8), torch.float32, device)
    given["dropped"][:] = False
    given["v_null"][1, 3] = torch.nan
    for out in ahead(euler_lookahead, given):
        assert out.isnan().nonzero().tolist() == [[1, 3]]


def test_opcheck(device):
    g = inputs((2, 8), torch.float32, device)
    x, v, t, l = (g[name] for name in ("x", "v", "t", "l"))
    torch.library.opcheck(lookahead._path_point.library, (x, v, t, True))
    arguments = (x, v, t, l, g["v_null"], g["v_label"], g["dropped"], 2.0, 0.5, 0.3)
    torch.library.opcheck(lookahead._euler_lookahead.library, arguments)
    torch.library.opcheck(lookahead._euler_lookahead.library, (*arguments, torch.tensor([1.0, 4.0], device=device)))


def test_compile_equals_eager(device):
    given = inputs((2, 40), torch.float32, device)

    def both(given):
        x, v = path_point(given["x"], given["v"], given["t"])
        return x, v, *ahead(euler_lookahead, {**given, "x": x, "v": v})

    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    for got, wanted in zip(torch.compile(both, fullgraph=True, backend=backend)(given), both(given), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": [1.0]}, "x0 must be a tensor"),
        ({"x1": torch.zeros(2, 7)}, r"x1 must have shape \[2, 8\]"),
        ({"t": torch.zeros(3)}, r"t must have shape \[2\]"),
        ({"x1": None}, "x1 must be a tensor"),
        ({"t": torch.zeros(2, dtype=torch.int64)}, "t must be bfloat16"),
        ({"path": "straight"}, "path must be one of linear, trig, got 'straight'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_points_are_named(change, message):
    arguments = {"x0": torch.zeros(2, 8), "x1": torch.zeros(2, 8), "t": torch.zeros(2)}
    with pytest.raises(ValueError, match=f"^path_point: {message}"):
        path_point(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_t": None}, "x_t must be a tensor"),
        ({"v_t": torch.zeros(2, 7)}, r"v_t must have shape \[2, 8\]"),
        ({"v_null": torch.zeros(8)}, r"v_null must have shape \[2, 8\]"),
        ({"v_label": torch.zeros(2, 8).long()}, "v_label must be bfloat16"),
        ({"l": torch.zeros(1)}, r"l must have shape \[2\]"),
        ({"label_dropped": torch.zeros(2)}, r"label_dropped must be a bool tensor of shape \[2\] or None"),
        ({"label_dropped": [True, False]}, r"label_dropped must be a bool tensor of shape \[2\] or None, got list"),
        ({"v_null": None}, "v_label must come with v_null"),
        ({"guidance_scale": torch.ones(3)}, r"guidance_scale must have shape \[2\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_lookaheads_are_named(change, message):
    names = ("x_t", "v_t", "v_null", "v_label")
    arguments = {name: torch.zeros(2, 8) for name in names} | {"t": torch.zeros(2), "l": torch.zeros(2)}
    with pytest.raises(ValueError, match=f"^euler_lookahead: {message}"):
        euler_lookahead(**{**arguments, **change})


@MODES
def test_mixed_dtypes_come_out_in_that_of_the_first(mode, device):
    x0, x1 = torch.randn(2, 3).to(device, torch.bfloat16), torch.randn(2, 3).to(device)
    t = torch.rand(2).to(device)
    with testing.mode(mode):
        found = [*path_point(x0, x1, t), *euler_lookahead(x0, x1, t, 0.5 * t)]
        found += path_point(x0, x1.clone().requires_grad_(), t)
    assert {value.dtype for value in found} == {torch.bfloat16}
