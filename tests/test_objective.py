"""Times, guidance and losses against the formulas of arXiv 2512.15657."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from soflow_fast import DiT, DiTConfig, Objective, ObjectiveConfig, SolutionFlow
from soflow_fast.flow import per_sample
from soflow_fast.objective import ConsistencyPoints, with_null

TINY = DiTConfig(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=2, num_heads=2, num_classes=3)


@pytest.fixture(params=[("linear", "euler"), ("trig", "trig"), ("linear", "trig"), ("trig", "euler")], ids="-".join)
def flow(request):
    return build(*request.param)


def build(path="linear", coefficients="euler"):
    torch.manual_seed(0)
    flow = SolutionFlow(DiT(TINY), path, coefficients).double()
    with torch.no_grad():  # off the zero initialisation, where the network is constant
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return flow


def batch(n=4):
    torch.manual_seed(1)
    x0, x1 = torch.randn(2, n, 2, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.95, 0.6, 0.4, 0.77], dtype=torch.float64)[:n]
    s = t * torch.tensor([0.2, 0.9, 0.0, 0.5], dtype=torch.float64)[:n]
    return x0, x1, t, s, torch.tensor([0, 1, 2, 1])[:n]


@pytest.mark.parametrize("kind", ["exponent", "cosine", "linear", "constant"])
def test_r_schedules(kind):
    objective = Objective(ObjectiveConfig(r_schedule=kind, r_init=0.1, r_end=0.002))
    k, K = 300, 1000
    wanted = {
        "exponent": 0.1 * (0.002 / 0.1) ** 0.3,
        "cosine": 0.002 + 0.098 * (1 + math.cos(0.3 * math.pi)) / 2,
        "linear": 0.1 - 0.098 * 0.3,
        "constant": 0.002,
    }[kind]
    assert objective.r(k, K) == pytest.approx(wanted, rel=1e-12)
    assert objective.r(K, K) == pytest.approx(0.002)
    if kind != "constant":
        assert objective.r(0, K) == pytest.approx(0.1)


def test_middle_time_keeps_its_distance():
    objective = Objective()
    t = torch.tensor([0.5, 0.5, 0.5])
    s = torch.tensor([0.0, 0.4999, 0.3])
    l = objective.middle_time(t, s, 0, 10)
    torch.testing.assert_close(l, torch.tensor([0.45, 0.4999, 0.48]))


def test_times_follow_their_laws():
    objective = Objective(ObjectiveConfig(sc_time=(-6.0, 3.0), sc_end_time=(2.0, 1.0), fm_time=(-0.2, 1.0)))
    source = torch.Generator().manual_seed(0)
    t = objective.flow_matching_times(20000, source)
    logit = torch.logit(t.double())
    assert abs(logit.mean() + 0.2) < 0.03 and abs(logit.std() - 1) < 0.03
    t, s = objective.consistency_times(20000, source)
    assert t.min() >= 1e-4 and (t - s).min() > 0.9e-4
    assert (s < t - 1.5e-4).any() and (s > t - 1.1e-4).any()  # both branches of the minimum were taken


def test_guidance_decay():
    c = Objective(ObjectiveConfig(guidance_decay_time=0.8)).guidance_decay(torch.tensor([0.0, 0.8, 0.9, 1.0]).double())
    assert c[0] == c[1] == 1
    assert c[2] == pytest.approx(1 - math.exp(-0.025 * 0.5 / 0.5))
    assert c[3] == 0
    assert torch.equal(
        Objective(ObjectiveConfig(guidance_decay_time=1.0)).guidance_decay(torch.tensor([1.0])), torch.ones(1)
    )


def test_target_mixes_guides_and_respects_dropped_labels():
    objective = Objective(ObjectiveConfig(guidance_scale=2.5, mix_ratio=0.25, guidance_decay_time=1.0))
    v_t, v_null, v_label = torch.randn(3, 2, 1, 2, 2)
    dropped = torch.tensor([True, False])
    t, l = torch.tensor([0.3, 0.9]), torch.tensor([0.2, 0.5])
    got, dx, x_l = objective.look_ahead(v_null, v_t, t, l, v_null, v_label, dropped)
    assert torch.equal(got[0], v_t[0])
    torch.testing.assert_close(got[1], 0.25 * (v_t[1] + 1.5 * (v_t[1] - v_null[1])) + 0.75 * v_label[1])
    torch.testing.assert_close(dx, got * per_sample(l - t, got))
    assert torch.equal(x_l, v_null + dx)
    assert torch.equal(objective.look_ahead(v_null, v_t, t, l, None, None, dropped).target, v_t)


def test_two_forms_of_the_quotient_agree(flow):
    """`quotient` against (f(x_t, t, s) - f(x_l, l, s)) / (t - l), and against the Euler form of it."""
    x0, x1, t, s, y = batch()
    objective = Objective()
    with torch.no_grad():
        x, v = flow.point(x0, x1, t)
        l = t + 0.01 * (s - t)
        x_l = x + v * per_sample(l - t, x)
        start, end = flow.network(x, t, s, y), flow.network(x_l, l, s, y)
        got = objective.quotient(flow, ConsistencyPoints(x, v, x_l - x, x_l, t, l, s, y), start, end - start)
        gap = per_sample(t - l, x)
        torch.testing.assert_close(
            got, (flow.solution(x, t, s, y) - flow.solution(x_l, l, s, y)) / gap, rtol=1e-9, atol=1e-9
        )
        if flow.coefficients == "euler":
            torch.testing.assert_close(got, v - end - (start - end) * per_sample((t - s) / (t - l), x))


def test_quotient_tends_to_meanflow_residual():
    """As l -> t: q -> -(u - (v - (t - s) du/dt)) of arXiv 2505.13447, with an error in proportion to t - l."""
    flow = build()
    x0, x1, t, s, y = batch()
    x, v = flow.point(x0, x1, t)
    with sdpa_kernel(SDPBackend.MATH):
        u, du = torch.func.jvp(  # pyright: ignore[reportAssignmentType]
            lambda x, t: flow.network(x, t, s, y), (x, t), (v, torch.ones_like(t))
        )
    assert du.norm() > 0.1 * u.norm()  # a zero tangent would prove nothing
    meanflow = -(u - (v - per_sample(t - s, x) * du))
    errors = []
    with torch.no_grad():
        for gap in (1e-3, 1e-4, 1e-5, 1e-6):
            l = t - gap
            x_l = x + v * per_sample(l - t, x)
            increment = flow.network(x_l, l, s, y) - u
            q = Objective().quotient(flow, ConsistencyPoints(x, v, x_l - x, x_l, t, l, s, y), u, increment)
            errors.append((q - meanflow).norm() / meanflow.norm())
    ratios = [float(errors[i] / errors[i + 1]) for i in range(3)]
    assert all(abs(ratio - 10) < 1 for ratio in ratios), ratios
    assert errors[-1] < 1e-4


def test_losses_have_the_gradient_of_the_weighted_squared_error(flow):
    """The surrogate's gradient is that of mean_i w_i mean(|f_t - sg f_l|^2 / (t - l)) / (2 |b|), weights held."""
    x0, x1, t, s, y = batch()
    objective = Objective(ObjectiveConfig(guidance_scale=1.0, p=0.75, eps=0.1))
    l = t + 0.1 * (s - t)
    objective.consistency(flow, x0, x1, t, l, s, y).loss.backward()
    got = [p.grad.clone() for p in flow.parameters()]
    flow.zero_grad()
    x, v = flow.point(x0, x1, t)
    x_l = x + v * per_sample(l - t, x)
    q = (flow.solution(x, t, s, y) - flow.solution(x_l, l, s, y).detach()) / per_sample(t - l, x)
    error = q.square().flatten(1).mean(1)
    weight = (error.detach() + 0.1) ** -0.75
    b = flow.solution_coefficients(t, s)[1].abs()
    (weight * error * (t - l) / (2 * b)).mean().backward()
    for mine, p in zip(got, flow.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-7, atol=1e-9)


def test_flow_matching_weight_and_loss(flow):
    x0, x1, t, _, y = batch()
    term = Objective(ObjectiveConfig(guidance_scale=1.0, p=0.5, eps=0.2)).flow_matching(flow, x0, x1, t, y)
    x, v = flow.point(x0, x1, t)
    error = (flow.velocity(x, t, y) - v).square().flatten(1).mean(1)
    slope = math.pi / 2 if flow.coefficients == "trig" else 1.0
    weight = 1 / (slope * (error + 0.2).sqrt())
    for got, wanted in zip(term, ((weight * error).mean(), error.mean(), weight.mean()), strict=True):
        torch.testing.assert_close(got, wanted)


def test_no_gradient_reaches_the_target():
    """Only the student's own forward at (x_t, t, s) is differentiated."""
    flow = build()
    x0, x1, t, s, y = batch()
    calls = []
    forward = flow.network.forward
    flow.network.forward = lambda *a: calls.append(torch.is_grad_enabled()) or forward(*a)
    objective = Objective()
    objective.consistency(flow, x0, x1, t, t + 0.1 * (s - t), s, y)
    assert calls.count(True) == 1 and len(calls) == 4  # unlabelled, labelled, student, look-ahead
    calls.clear()
    objective.flow_matching(flow, x0, x1, t, y)
    assert calls.count(True) == 1 and len(calls) == 2


def test_teacher_takes_the_difference_at_both_ends():
    flow, teacher = build(), build()
    x0, x1, t, s, y = batch()
    l = t + 0.05 * (s - t)
    objective = Objective()
    plain = objective.consistency(flow, x0, x1, t, l, s, y)
    same = objective.consistency(flow, x0, x1, t, l, s, y, teacher=teacher)  # equal weights
    torch.testing.assert_close(plain.mse, same.mse)
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(0.9)
    near = [
        objective.consistency(flow, x0, x1, t, t - gap, s, y, teacher=teacher).mse.item() for gap in (1e-2, 1e-4, 1e-6)
    ]
    assert near[2] < 10 * near[0]  # the literal target would grow as 1 / (t - l)^2, by 10^8


def test_dropped_labels_become_null_and_unconditional_stays():
    flow = build()
    y = torch.tensor([2, 0])
    assert with_null(flow, y, torch.tensor([True, False])).tolist() == [3, 0]
    assert with_null(flow, None, torch.tensor([True, False])) is None


def test_unconditional_ignores_guidance():
    flow = build()
    x0, x1, t, _, _ = batch()
    terms = [Objective(ObjectiveConfig(guidance_scale=w)).flow_matching(flow, x0, x1, t, None) for w in (1.0, 4.0)]
    assert torch.equal(terms[0].loss, terms[1].loss)


@pytest.mark.parametrize(
    "field,value",
    [("guidance_scale", 0.5), ("mix_ratio", 1.2), ("p", -1.0), ("eps", 0.0), ("r_schedule", "cosin"), ("r_end", 0.0),
     ("fm_fraction", -0.1), ("label_drop", 2.0), ("sc_time", (0.0, 0.0))],
)  # fmt: skip
def test_wrong_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        Objective(ObjectiveConfig(**{field: value}))


def test_a_teacher_that_is_asked_for_must_be_given(flow):
    x, t = torch.randn(2, 1, 2, 2), torch.full((2,), 0.8)
    with pytest.raises(ValueError, match=r"teacher must be given: config\.teacher is 'ema'"):
        Objective(ObjectiveConfig(teacher="ema")).consistency(flow, x, x, t, 0.5 * t, 0.1 * t, None)


@pytest.mark.parametrize("wrong", [(0.0, 4.0), (4.0, 1.0), (2.0, 2.0), (1.0, 1e9)])
def test_a_range_of_scales_that_is_none(wrong):
    with pytest.raises(ValueError, match="guidance_range must be none or two numbers"):
        Objective(ObjectiveConfig(), wrong)
