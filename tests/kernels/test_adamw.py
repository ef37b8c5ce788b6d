"""adamw_ema and AdamWEMA against torch's AdamW, and the averages and copies against their formulas."""

import copy
import io

import pytest
import torch

from soflow_kernels import AdamWEMA, adamw, clip_scale, testing
from soflow_kernels.adamw import adamw_ema, adamw_ema_reference

SHAPES = ((7,), (1,), (33, 31), (1024,), (4097,), (2, 4, 8), (0,), (3, 1032))
HYPER = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def parameters(device, seed=0, shapes=SHAPES):
    source = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=source).to(device)) for shape in shapes]


def set_gradients(params, k, dtype=torch.float32, scale=1.0):
    for i, p in enumerate(params):
        source = torch.Generator().manual_seed(1000 * k + i)
        gradient = torch.randn(p.shape, generator=source).to(p.device, dtype)
        if dtype == torch.float32:
            p.grad = gradient * scale
        else:
            p.grad_dtype = dtype
            p.grad = gradient


def torch_adamw(params, **changes):
    """The plain formula in torch's own words, in float64."""
    doubles = [torch.nn.Parameter(p.detach().double()) for p in params]
    return doubles, torch.optim.AdamW(doubles, **{**HYPER, **changes}, foreach=False)


def averages_of(params, n):
    return [[p.detach().clone() for p in params] for _ in range(n)]


def errors(got, wanted):
    """Of each tensor that is not empty, relative to its largest element."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(got, wanted, strict=True) if b.numel()]
    return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs])


def close(got, wanted, tolerance=1e-6):
    found = errors(got, wanted)
    assert (found <= tolerance).all(), found


def test_equals_torch_over_40_steps_with_a_moving_rate(device):
    mine = parameters(device)
    decays = (0.9, 0.99, 0.5)
    emas = averages_of(mine, 3)
    optimizer = AdamWEMA(mine, **HYPER, emas=emas, ema_decays=decays)
    theirs, reference = torch_adamw(mine)
    single = parameters(device)
    eager = torch.optim.AdamW(single, **HYPER, foreach=False)
    expected = averages_of(theirs, 3)
    for k in range(40):
        rate = HYPER["lr"] * (1 - k / 80)
        for group in (*optimizer.param_groups, *reference.param_groups, *eager.param_groups):
            group["lr"] = rate
        set_gradients(mine, k)
        set_gradients(single, k)
        for p, q in zip(mine, theirs, strict=True):
            q.grad = p.grad.double()
        optimizer.step()
        reference.step()
        eager.step()
        for average, decay in zip(expected, decays, strict=True):
            torch._foreach_lerp_(average, [q.detach() for q in theirs], 1 - decay)
    # torch's own float32 is not always within a millionth of the truth.
    close(mine, theirs, (1.5 * errors(single, theirs)).clamp_min(1e-6))
    for name in ("exp_avg", "exp_avg_sq"):
        got, wanted, other = (
            [o.state[p][name] for p in params]
            for o, params in ((optimizer, mine), (reference, theirs), (eager, single))
        )
        close(got, wanted, (1.5 * errors(other, wanted)).clamp_min(1e-6))
    for average, wanted in zip(emas, expected, strict=True):
        close(average, wanted)
    assert all(optimizer.state[p]["step"] == 40 for p in mine)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_half_precision(dtype, device):
    mine = parameters(device)
    lists = [[torch.zeros_like(p) for p in mine] for _ in range(2)]
    gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(3)).to(device, dtype) for p in mine]
    theirs, reference = torch_adamw(mine)
    steps = [torch.ones((), device=device) for _ in mine]
    lr = torch.tensor(HYPER["lr"], device=device)
    rest = {name: HYPER[name] for name in ("betas", "eps", "weight_decay")}
    adamw_ema([p.detach() for p in mine], gradients, *lists, steps, lr, **rest)
    for q, gradient in zip(theirs, gradients, strict=True):
        q.grad = gradient.double()
    reference.step()
    close(mine, theirs)


def test_many_kinds_of_beta_and_the_first_steps(device):
    """The bias corrections of the first steps do not cancel, however near 1 a beta is."""
    for betas in ((0.9, 0.999), (0.0, 0.99999), (0.5, 0.0)):
        mine = parameters(device, shapes=((40,),))
        optimizer = AdamWEMA(mine, lr=0.1, betas=betas, eps=1e-12, weight_decay=0.0)
        theirs, reference = torch_adamw(mine, lr=0.1, betas=betas, eps=1e-12, weight_decay=0.0)
        for k in range(3):
            set_gradients(mine, k)
            theirs[0].grad = mine[0].grad.double()
            optimizer.step()
            reference.step()
            close(mine, theirs, 2e-6)


@pytest.mark.parametrize("norm", [0.5, 4.0, float("nan"), float("inf")])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_clipping_and_the_finite_flag(norm, max_norm, device):
    norm = torch.tensor(norm, device=device)
    scale, finite = clip_scale(norm, max_norm)
    mine, theirs = parameters(device), parameters(device)
    emas = averages_of(mine, 1)
    optimizer = AdamWEMA(mine, **HYPER, emas=emas, ema_decays=(0.9,))
    set_gradients(mine, -1)
    optimizer.step()  # so that the state is not empty
    before = [t.clone() for t in (*mine, *emas[0], *(optimizer.state[mine[3]].values()))]
    set_gradients(mine, 0)
    optimizer.step(grad_scale=scale, finite=finite)
    after = [*mine, *emas[0], *(optimizer.state[mine[3]].values())]
    if not norm.isfinite():
        assert all(map(torch.equal, before, after))
        return
    reference = torch.optim.AdamW(theirs, **HYPER, foreach=False)
    for k, factor in ((-1, 1.0), (0, min(1.0, max_norm / (norm.item() + 1e-6)) if max_norm else 1.0)):
        set_gradients(theirs, k, scale=factor)
        reference.step()
    close(mine, theirs)


def test_state_goes_both_ways_with_torch(device):
    """Two steps by one, a save and a load, two by the other: as four by either."""

    def train(first, second):
        params = parameters(device)
        optimizer = first(params)
        for k in range(4):
            if k == 2:
                buffer = io.BytesIO()
                torch.save(optimizer.state_dict(), buffer)
                buffer.seek(0)
                optimizer = second(params)
                optimizer.load_state_dict(torch.load(buffer, weights_only=True))
            set_gradients(params, k)
            optimizer.step()
        assert set(optimizer.state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
        return params

    ours = lambda params: AdamWEMA(params, **HYPER)  # noqa: E731
    theirs = lambda params: torch.optim.AdamW(params, **HYPER)  # noqa: E731
    wanted = train(theirs, theirs)
    for first, second in ((ours, theirs), (theirs, ours), (ours, ours)):
        close(train(first, second), wanted)


def test_groups_and_parameters_without_a_gradient(device):
    mine, theirs = parameters(device), parameters(device)

    def groups(params):
        return [{"params": params[:3]}, {"params": params[3:], "lr": 1e-2, "weight_decay": 0.0}]

    emas = averages_of(mine, 1)
    optimizer = AdamWEMA(groups(mine), **HYPER, emas=emas, ema_decays=(0.5,))
    reference = torch.optim.AdamW(groups(theirs), **HYPER, foreach=False)
    still = mine[4].detach().clone()
    for k in range(3):
        for params in (mine, theirs):
            set_gradients(params, k)
            params[4].grad = None
        optimizer.step()
        reference.step()
    close(mine, theirs)
    assert torch.equal(mine[4], still) and torch.equal(emas[0][4], still) and not optimizer.state[mine[4]]


def test_steps_and_gradient_dtypes_of_their_own_and_a_large_eps(device):
    """Parameters that join later have their own bias corrections; kinds of gradients do not share a launch."""
    mine = parameters(device)
    optimizer = AdamWEMA(mine, **{**HYPER, "eps": 0.5})
    theirs, reference = torch_adamw(mine, eps=0.5)
    for k in range(4):
        set_gradients(mine, k)
        for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            if i % 2 and k < 2:
                p.grad = None
            elif i % 3 == 0:
                gradient = p.grad.bfloat16()
                p.grad = None
                p.grad_dtype = torch.bfloat16
                p.grad = gradient
            q.grad = None if p.grad is None else p.grad.double()
            p.grad_dtype = None  # any, again
        optimizer.step()
        reference.step()
    close(mine, theirs)
    assert [int(optimizer.state[p]["step"]) for p in mine] == [4, 2] * 4


def test_a_decay_near_one_is_not_rounded(device):
    """1 - d to its last digits: of a float32 d it would be off by a thousandth here."""
    (p,) = parameters(device, shapes=((16,),))
    average = torch.zeros_like(p)
    optimizer = AdamWEMA([p], lr=0.0, weight_decay=0.0, emas=[[average]], ema_decays=(0.99999,))
    p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(average, 1e-5 * p.detach(), rtol=1e-6, atol=0)


def test_a_gradient_scaler_unscales(device):
    found = []
    for kind in (AdamWEMA, torch.optim.AdamW):
        params = parameters(device)
        optimizer = kind(params, **{**HYPER, "eps": 1.0})  # an eps at which the scale of gradients shows
        scaler = torch.amp.GradScaler(device, init_scale=1024.0)
        for overflow in (False, True):
            optimizer.zero_grad()
            scaler.scale(sum(p.square().sum() for p in params)).backward()
            if overflow:
                set_gradients(params, 0, scale=torch.inf)
            before = [p.detach().clone() for p in params]
            scaler.step(optimizer)
            assert all(map(torch.equal, before, params)) == overflow
            scaler.update()
        found.append(params)
    close(*found)


@pytest.mark.parametrize("kind", [(torch.float32, ()), (torch.float64, ()), (torch.float32, (1,))], ids=str)
def test_learning_rate_is_a_tensor(kind, device):
    dtype, shape = kind
    mine, theirs = parameters(device), parameters(device)
    lr = torch.full(shape, 0.1, dtype=dtype)  # on the CPU, where torch takes it too
    for params, optimizer in ((mine, AdamWEMA(mine, lr=lr)), (theirs, torch.optim.AdamW(theirs, lr=0.1))):
        set_gradients(params, 0)
        optimizer.step()
    close(mine, theirs)


def test_deepcopy_goes_on_alone(device):
    params = parameters(device)
    emas = averages_of(params, 1)
    optimizer = AdamWEMA(params, **HYPER, emas=emas, ema_decays=(0.9,))
    set_gradients(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in (*params, *emas[0])]
    other = copy.deepcopy(optimizer)
    twins = other.param_groups[0]["params"]
    set_gradients(twins, 1)
    other.step()
    assert all(map(torch.equal, before, (*params, *emas[0])))
    set_gradients(params, 1)
    optimizer.step()
    assert all(map(torch.equal, params, twins))


def test_no_group_joins_averages(device):
    first, second, third = parameters(device, shapes=((8,), (8,), (8,)))
    AdamWEMA([first]).add_param_group({"params": [second]})
    with pytest.raises(ValueError, match="no group can be added"):
        AdamWEMA([first], emas=averages_of([first], 1), ema_decays=(0.9,)).add_param_group({"params": [third]})


def test_tables_of_many_groups_are_made_once(device, monkeypatch):
    params = parameters(device, shapes=((8,),) * 12)
    optimizer = AdamWEMA([{"params": [p]} for p in params], **HYPER)
    set_gradients(params, 0)
    optimizer.step()
    monkeypatch.setattr(adamw, "_upload", lambda *_: pytest.fail("a table was made again"))
    optimizer.step()


def test_chunks_cover_every_element_once():
    sizes = (8, 1024, 1032, 5000, 1)
    chunks = adamw._chunks(sizes).tolist()
    assert chunks == [[i, c] for i, n in enumerate(sizes) for c in range(-(-n // adamw.BLOCK))]


def test_misaligned_tensors_and_gradients_that_move(device, monkeypatch):
    """No wide load fits; and the table follows the gradients to where they are now."""
    monkeypatch.setattr(adamw, "KEPT_TABLES", 3)
    flat = torch.randn(2 * 1035 + 1, device=device)
    mine = [torch.nn.Parameter(flat[1:1036]), torch.nn.Parameter(flat[1036:])]
    theirs, reference = torch_adamw(mine)
    optimizer = AdamWEMA(mine, **HYPER)
    for k in range(6):  # more tables than are kept
        kept = [p.grad for p in mine]
        set_gradients(mine, k)
        for p, q in zip(mine, theirs, strict=True):
            q.grad = p.grad.double()
        optimizer.step()
        reference.step()
        del kept
    close(mine, theirs)
    assert len(optimizer._tables.found) <= adamw.KEPT_TABLES


def test_same_bits_every_time(device):
    runs = []
    for _ in range(3):
        params = parameters(device)
        optimizer = AdamWEMA(params, **HYPER)
        for k in range(2):
            set_gradients(params, k)
            optimizer.step()
        runs.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_the_kernel_runs_and_nothing_waits_for_the_host(device, monkeypatch):
    launches = []
    plain = adamw.launch
    monkeypatch.setattr(adamw, "launch", lambda *a, **k: launches.append(a[1]) or plain(*a, **k))
    operation = adamw._adamw_ema._init_fn  # itself: a dispatch mode does not look into a library operation
    monkeypatch.setattr(adamw, "_adamw_ema", operation)

    class NoReads(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default, "a tensor was read on the host"
            return function(*args, **(kwargs or {}))

    params = parameters(device)
    optimizer = AdamWEMA(params, **HYPER, emas=averages_of(params, 1), ema_decays=(0.9,))
    set_gradients(params, 0)
    scale, finite = clip_scale(torch.tensor(2.0, device=device), 1.0)
    with NoReads():
        optimizer.step(grad_scale=scale, finite=finite)
    assert len(launches) == 2  # tensors that wide loads fit, and the others
    with testing.mode("reference"):
        optimizer.step()
    assert len(launches) == 2


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("finite", [True, False])
def test_reference_is_the_same_update(on_host, finite, device, monkeypatch):
    monkeypatch.setattr(adamw, "_on_host", lambda tensor: on_host and not tensor.is_cuda)
    mine, theirs = parameters(device), parameters(device)
    results = []
    for params, function in ((mine, adamw_ema), (theirs, adamw_ema_reference)):
        state = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        emas, copies = averages_of(params, 2), [p.detach().half() for p in params]
        steps = [torch.ones((), device=device) for _ in params]
        values = [p.detach() for p in params]
        gradients = [torch.ones_like(p) * 0.3 for p in values]
        function(
            values, gradients, *state, steps, torch.tensor(0.01, device=device), betas=(0.8, 0.95), weight_decay=0.2,
            grad_scale=torch.tensor(0.5, device=device), emas=emas, low_precision=copies,
            ema_decays=torch.tensor([0.9, 0.3], dtype=torch.float64, device=device),
            finite=torch.tensor(finite, device=device),
        )  # fmt: skip
        results.append([*values, *state[0], *state[1], *emas[0], *emas[1], *copies])
        assert all(torch.equal(g, torch.ones_like(g) * 0.3) for g in gradients)  # gradients are only read
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3 if got.dtype == torch.float16 else 1e-6, atol=1e-9)


def test_opcheck(device):
    params = [p.detach() for p in parameters(device, shapes=((8,), (3,)))]
    lists = [[torch.rand_like(p) for p in params] for _ in range(4)]
    one = torch.ones((), device=device)
    decays = torch.tensor([0.9], dtype=torch.float64, device=device)
    go = torch.ones((), dtype=torch.uint8, device=device)
    copies = [p.bfloat16() for p in params]
    steps = [one.clone(), one.clone()]
    arguments = (params, *lists[:3], lists[3], copies, steps, one, one, go, decays, 0.9, 0.99, 1e-8, 0.1, 0)
    torch.library.opcheck(adamw._adamw_ema, arguments)


def good(device="cpu"):
    params = [torch.zeros(4, device=device), torch.zeros(2, 3, device=device)]
    lists = [[torch.zeros_like(p) for p in params] for _ in range(3)]
    return {
        "params": params,
        "grads": lists[0],
        "exp_avgs": lists[1],
        "exp_avg_sqs": lists[2],
        "steps": [torch.ones((), device=device), torch.ones((), device=device)],
        "lr": torch.tensor(0.1, device=device),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": torch.zeros(4)}, "params must be a list"),
        ({"grads": [torch.zeros(4)]}, "grads must be a list of 2 tensors"),
        ({"grads": [torch.zeros(4), torch.zeros(3, 2)]}, r"grads\[1\] must be a tensor of shape \[2, 3\]"),
        ({"grads": [torch.zeros(4), torch.zeros(2, 3).long()]}, r"grads\[1\] must be float32, bfloat16, float16"),
        ({"grads": [torch.zeros(4), torch.zeros(2, 3).half()]}, r"grads\[1\] must be .* all alike"),
        ({"exp_avgs": [torch.zeros(4), torch.zeros(3, 2).t()]}, r"exp_avgs\[1\] must have the strides"),
        ({"exp_avg_sqs": [None, None]}, r"exp_avg_sqs\[0\] must be a tensor"),
        ({"steps": [1, 1]}, r"steps\[0\] must be a tensor of shape \[\]"),
        ({"lr": 0.1}, "lr must be a float32 tensor"),
        ({"grad_scale": 1.0}, "grad_scale must be a float32 tensor"),
        ({"finite": torch.tensor(1.0)}, "finite must be a bool tensor"),
        ({"emas": [[torch.zeros(4), torch.zeros(2, 3)]]}, r"ema_decays must be a float64 tensor of shape \[1\]"),
        ({"emas": [[]] * 4}, "emas must be at most 3 lists, got 4"),
        ({"low_precision": [torch.zeros(4), torch.zeros(2, 3)]}, r"low_precision\[0\] must be bfloat16, float16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=f"^adamw_ema: {message}"):
        adamw_ema(**{**good(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"emas": [[]], "ema_decays": ()}, "as many decays"),
        ({"emas": [[torch.zeros(4)]], "ema_decays": (1.0,)}, r"ema_decays must be in \[0, 1\)"),
        ({"emas": [[torch.zeros(4)] * 2], "ema_decays": (0.5,)}, r"emas\[0\] must hold 1 tensors, got 2"),
        ({"masters": []}, "masters must hold 1 tensors, got 0"),
        ({"lr": -1.0}, "Invalid learning rate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_optimizers_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AdamWEMA([torch.nn.Parameter(torch.zeros(4))], **change)


def test_amsgrad_is_refused():
    p = torch.nn.Parameter(torch.ones(4))
    theirs, ours = torch.optim.AdamW([p], amsgrad=True), AdamWEMA([p])
    ours.load_state_dict(theirs.state_dict())
    p.grad = torch.ones(4)
    with pytest.raises(ValueError, match="amsgrad and maximize are not supported"):
        ours.step()


@pytest.mark.parametrize("wrong", [{"grad_scale": 0.5}, {"finite": True}, {"finite": torch.tensor(1)}], ids=str)
def test_a_refused_step_counts_nothing(wrong, device):
    params = parameters(device, shapes=((8,),))
    optimizer = AdamWEMA(params, **HYPER)
    set_gradients(params, 0)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        optimizer.step(**wrong)
    assert float(optimizer.state[params[0]]["step"]) == 0


@pytest.mark.parametrize("betas", [(1.0, 1.0), 0.9, (0.9,), (-0.1, 0.9)], ids=str)
def test_wrong_betas_are_named(betas, device):
    arguments = good(device)
    with pytest.raises(ValueError, match="betas must be two numbers"):
        adamw_ema(**arguments | {"betas": betas})


def test_averages_must_fit_when_the_optimiser_is_made(device):
    with pytest.raises(ValueError, match=r"emas\[0\] must have the parameters"):
        AdamWEMA([torch.nn.Parameter(torch.ones(4))], emas=[[torch.ones(3)]], ema_decays=[0.5])


def test_nothing_is_pinned_while_a_graph_captures(monkeypatch):
    """Two captures, each after steps that were not: their tables come from memory that was pinned before, and stay as
    they were while other steps follow."""
    state = {"capturing": False}
    allocated = []

    def pin(tensor):
        allocated.append(state["capturing"])
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(adamw, "_is_capturing", lambda device: state["capturing"])
    sent = []
    monkeypatch.setattr(adamw, "_upload", lambda values, device: sent.append(values) or values)
    tables, gpu, captured = adamw._Tables(), torch.device("cuda", 1), []
    shapes = ((7,), (1024,), (64, 32))

    def lists(seed):
        return [[torch.full(shape, float(seed + k)) for shape in shapes] for k in range(5)]

    kept = [lists(seed) for seed in range(6)]
    for k, capturing in enumerate((False, False, True, False, True, False)):
        state["capturing"] = capturing
        made = tables.of(kept[k], gpu)
        rows = sorted(row[1:6].tolist() for table, _, _ in made for row in table)
        assert rows == sorted([tensor.data_ptr() for tensor in each] for each in zip(*kept[k], strict=True))
        if capturing:
            captured.append(([values.clone() for table, chunks, _ in made for values in (table, chunks)], made))
    assert allocated and not any(allocated)
    assert len(tables.captured) == 2
    for before, made in captured:
        after = [values for table, chunks, _ in made for values in (table, chunks)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # A capture of tensors that were seen before needs none.
    state["capturing"] = True
    assert tables.of(kept[5], gpu) is tables.found[next(reversed(tables.found))]


def test_whether_a_graph_captures_is_asked_of_the_device_of_the_tensors(monkeypatch):
    asked, current = [], [0]

    class On:
        def __init__(self, device):
            self.device = torch.device(device)

        def __enter__(self):
            current.append(self.device.index)

        def __exit__(self, *error):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", On)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: asked.append(current[-1]) or True)
    assert adamw._is_capturing(torch.device("cuda", 1)) and asked == [1]
    assert not adamw._is_capturing(torch.device("cpu")) and asked == [1]
