"""AdamWEMA on a model in low precision: float32 masters, whoever writes the parameters, and what a resume finds."""

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

import soflow_kernels
from soflow_kernels import AdamWEMA, adamw, testing

SHAPES = ((33, 31), (1024,), (3,), (0,), (2, 4, 8))
HYPER = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
LOW = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["kernel", "reference on the host", "reference on the device"])
def path(request, monkeypatch):
    """Each way in which a step is made."""
    if request.param == "reference on the device":
        monkeypatch.setattr(adamw, "_on_host", lambda tensor: False)
    with testing.mode("auto" if request.param == "kernel" else "reference"):
        yield request.param


def values(device, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source).to(device) for shape in SHAPES]


def low_parameters(masters, dtype=torch.bfloat16):
    return [nn.Parameter(m.to(dtype)) for m in masters]


def set_gradients(k, *models):
    for i, params in enumerate(zip(*models, strict=True)):
        source = torch.Generator().manual_seed(100 * k + i)
        gradient = torch.randn(params[0].shape, generator=source).bfloat16()
        for p in params:
            p.grad_dtype = None
            p.grad = gradient.to(p.device)


def same_bits(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        a, b = a.detach(), b.detach()
        assert a.dtype == b.dtype and a.shape == b.shape
        kind = torch.int32 if a.dtype == torch.float32 else torch.int16
        assert torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_step_is_that_of_the_masters(dtype, path, device):
    """Float32 parameters and their rounded values, to the bit; averages are of the masters."""
    masters = values(device)
    single = [nn.Parameter(m.clone()) for m in masters]
    low = low_parameters(masters, dtype)
    emas = [[m.clone() for m in masters] for _ in range(2)]
    mine = AdamWEMA(low, **HYPER, masters=masters, emas=emas[:1], ema_decays=(0.9,))
    wanted = AdamWEMA(single, **HYPER, emas=emas[1:], ema_decays=(0.9,))
    assert all(a is b for a, b in zip(mine.masters, masters, strict=True))
    scale, finite = torch.tensor(0.5, device=device), torch.tensor(True, device=device)
    for k in range(3):
        set_gradients(k, low, single)
        mine.step(grad_scale=scale, finite=finite)
        wanted.step(grad_scale=scale, finite=finite)
        same_bits(masters, single)
        same_bits(low, [p.to(dtype) for p in single])
        same_bits(*emas)
    assert all(a is b for a, b in zip(mine.masters, masters, strict=True))


def by_data(p, value):
    p.data.copy_(value)


def by_foreach(p, value):
    torch._foreach_copy_([p.detach()], [value])


def by_data_assignment(p, value):
    p.data = value.clone()


def by_load_state_dict(p, value):
    model = nn.Module()
    model.p = p
    model.load_state_dict({"p": value})


def by_numpy(p, value):
    """No version is counted."""
    p.detach().cpu().view(torch.int16).numpy()[...] = value.cpu().view(torch.int16).numpy()


WRITERS = (by_data, by_foreach, by_data_assignment, by_load_state_dict, by_numpy)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_what_is_written_between_steps_is_carried_on(write, dtype, path, device):
    """In the written elements the step starts from what was written, in the others from the master as it was."""
    if write is by_numpy and device == "cuda":
        pytest.skip("numpy writes into the CPU's memory")
    masters = values(device)
    low = low_parameters(masters, dtype)
    optimizer = AdamWEMA(low, **HYPER, masters=masters)
    set_gradients(0, low)
    optimizer.step()
    expected = []
    for p, master in zip(low, masters, strict=True):
        value = p.detach().clone()
        value.view(-1)[::3] = 5.3
        write(p, value)
        start = master.clone()
        start.view(-1)[::3] = torch.tensor(5.3, dtype=dtype).float()
        expected.append(nn.Parameter(start))
    other = AdamWEMA(expected, **HYPER)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    set_gradients(1, low, expected)
    optimizer.step()
    other.step()
    same_bits(masters, expected)
    same_bits(low, [p.to(dtype) for p in expected])


def test_a_refused_update_leaves_what_was_written(path, device):
    masters = values(device)
    low = low_parameters(masters)
    optimizer = AdamWEMA(low, **HYPER, masters=masters)
    before = [m.clone() for m in masters]
    for p in low:
        p.data.fill_(77.0)
    set_gradients(0, low)
    optimizer.step(finite=torch.tensor(False, device=device))
    same_bits(masters, before)
    assert all((p == 77).all() for p in low)
    for master, p in zip(optimizer.masters, low, strict=True):  # whoever asks is told
        assert torch.equal(master, p.float())


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_rounding_to_nearest_even(dtype, path, device):
    """Ties, the largest numbers, denormals, both zeros, and NaN, whose payload may lie in the bits that are cut off."""
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x00000001, 0x00008000, 0x00018000, 0x80000000]
    bits += [0x7F800001, 0x7FFFFFFF, 0xFF800001, 0x3F801000, 0x3F803000, 0x3F801001, 0x477FEFFF, 0x477FF000, 0x33000000]
    master = torch.tensor([b - 2**32 if b >= 2**31 else b for b in bits], dtype=torch.int32).view(torch.float32)
    master = master.to(device)
    low = nn.Parameter(torch.zeros(len(bits), dtype=dtype, device=device))
    low.data.copy_(master)
    optimizer = AdamWEMA([low], lr=0.0, weight_decay=0.0, masters=[master])
    kept = master.clone()
    low.grad = torch.zeros_like(low)
    optimizer.step()
    assert torch.equal(master.isnan(), kept.isnan()) and torch.equal(low.isnan(), kept.isnan())
    plain = ~kept.isnan()
    same_bits([master[plain], low[plain]], [kept[plain], kept.to(dtype)[plain]])


def train(model, optimizer, steps):
    for k in steps:
        set_gradients(k, list(model.parameters()))
        optimizer.step()


def saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def model_of(seed, device):
    return nn.ParameterList([*low_parameters(values(device, seed)), nn.Parameter(torch.ones(4, device=device))])


@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_a_resume_is_exact_in_either_order(first, device):
    whole, part, other = (model_of(seed, device) for seed in (0, 0, 1))
    optimizers = [AdamWEMA(m.parameters(), **HYPER) for m in (whole, part, other)]
    train(whole, optimizers[0], range(4))
    train(part, optimizers[1], range(2))
    train(other, optimizers[2], range(1))
    things = {
        "model": (other, saved(part.state_dict())),
        "optimizer": (optimizers[2], saved(optimizers[1].state_dict())),
    }
    kept = optimizers[2].masters
    for name in (first, *({"model", "optimizer"} - {first})):
        things[name][0].load_state_dict(things[name][1])
    train(other, optimizers[2], range(2, 4))
    same_bits(other, whole)
    same_bits(optimizers[2].masters, optimizers[0].masters)
    assert all(a is b for a, b in zip(kept, optimizers[2].masters, strict=True))
    for p, q in zip(whole, other, strict=True):
        a, b = (o.state[x] for o, x in ((optimizers[0], p), (optimizers[2], q)))
        assert set(a) == {"step", "exp_avg", "exp_avg_sq"} | ({"master"} if p.dtype == torch.bfloat16 else set())
        assert all(value.dtype == torch.float32 for value in b.values())
        same_bits([a[key] for key in sorted(a)], [b[key] for key in sorted(a)])


def test_states_of_torch_and_of_another_precision(device):
    """torch's has no masters: they are the parameters. A float32 model has none of its own."""
    theirs, mine = model_of(0, device), model_of(0, device)
    torchs = torch.optim.AdamW(theirs.parameters(), **HYPER)
    set_gradients(0, list(theirs))
    for p in theirs:
        p.grad = p.grad.to(p.dtype)
    torchs.step()
    optimizer = AdamWEMA(mine.parameters(), **HYPER, masters=[*[1 + m for m in values(device)], None])
    optimizer.load_state_dict(saved(torchs.state_dict()))
    for p in list(mine)[:-1]:
        assert torch.equal(optimizer.state[p]["master"], p.float())
    torchs.load_state_dict(saved(optimizer.state_dict()))
    torchs.step()
    single = [nn.Parameter(p.detach().float()) for p in mine]
    other = AdamWEMA(single)
    other.load_state_dict(saved(optimizer.state_dict()))
    assert all("master" not in other.state[p] for p in single) and other.masters == single


def test_a_hook_of_the_loader_sees_tensors(device):
    model = model_of(0, device)
    optimizer = AdamWEMA(model.parameters(), **HYPER)
    seen = []

    def look(optimizer, *state_dict):
        entries = state_dict[0]["state"].values() if state_dict else optimizer.state.values()
        seen.append(all(isinstance(v, torch.Tensor) for entry in entries for v in entry.values()))

    optimizer.register_load_state_dict_pre_hook(look)
    optimizer.register_load_state_dict_post_hook(look)
    optimizer.load_state_dict(saved(optimizer.state_dict()))
    assert seen == [True, True]


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_alone(twin, device):
    model = model_of(0, device)
    emas = [[p.detach().float() for p in model]]
    optimizer = AdamWEMA(model.parameters(), **HYPER, emas=emas, ema_decays=(0.9,))
    train(model, optimizer, range(1))
    before = [p.detach().clone() for p in (*model, *optimizer.masters, *emas[0])]
    other = twin(optimizer)
    twins = nn.ParameterList(other.param_groups[0]["params"])
    train(twins, other, range(1, 3))
    same_bits([*model, *optimizer.masters, *emas[0]], before)
    train(model, optimizer, range(1, 3))
    same_bits(twins, model)
    same_bits(other.masters, optimizer.masters)


def test_a_group_that_joins_has_masters(device):
    first, second = low_parameters(values(device)[:2])
    optimizer = AdamWEMA([first], **HYPER)
    optimizer.add_param_group({"params": [second]})
    assert torch.equal(optimizer.masters[1], second.float())
    set_gradients(0, [first, second])
    optimizer.step()
    same_bits([second], [optimizer.masters[1].bfloat16()])


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "between steps"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_parameters_of_any_layout(dtype, layout, late, path, device):
    """The same numbers as contiguous ones; their gradients come in another order of elements."""
    value = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    plain, other = nn.Parameter(value.clone()), nn.Parameter(value.clone())
    if not late:
        other.data = LAYOUTS[layout](other.data)
    average = torch.zeros_like(other, dtype=torch.float32)
    extras = {} if late else {"emas": [[average]], "ema_decays": (0.5,)}
    optimizers = AdamWEMA([plain], **HYPER), AdamWEMA([other], **HYPER, **extras)
    for k in range(2):
        if late and k:
            other.data = LAYOUTS[layout](other.data)
        set_gradients(k, [plain], [other])
        for optimizer in optimizers:
            optimizer.step()
    assert not other.is_contiguous() and other.grad.is_contiguous()
    same_bits([other, optimizers[1].masters[0]], [plain, optimizers[0].masters[0]])
    if not late:
        assert not average.is_contiguous()
        with pytest.raises(ValueError, match=r"emas\[0\]\[0\] must have the strides"):
            AdamWEMA([other], emas=[[average.contiguous()]], ema_decays=(0.5,))


class Odd(torch.Tensor):
    """A subclass, whose memory need not be what it stands for."""


def test_parameters_that_the_kernel_does_not_know_are_refused(device):
    odd = torch.ones(4, device=device).as_subclass(Odd).requires_grad_()
    spread = nn.Parameter(torch.ones(4, 4, device=device)[:, :2])
    for wrong, message in (
        (odd, r"params\[0\] must be a plain tensor or a DTensor, got Odd"),
        (spread, r"params\[0\] must be dense"),
        (nn.Parameter(torch.ones(2, dtype=torch.complex64)), r"params\[0\] must be float32, .* got torch.complex64"),
    ):
        with pytest.raises(ValueError, match=message):
            AdamWEMA([wrong])
    one = torch.ones(4, device=device)
    p, low = nn.Parameter(one.clone()), nn.Parameter(one.bfloat16())
    for settings, message in (
        (
            {"emas": [[odd.detach(), one]], "ema_decays": [0.9]},
            r"emas\[0\]\[0\] must be a plain tensor, got Odd",
        ),
        (
            {"masters": [torch.ones(4, device=device), None]},
            r"masters\[0\] must be None: the parameter is torch.float32",
        ),
        ({"masters": [None, low.detach()]}, r"masters\[1\] must be float32, got torch.bfloat16"),
        ({"masters": [None, torch.ones(3, device=device)]}, "masters must have the parameters' shapes"),
        ({"emas": [[one, low.detach()]], "ema_decays": [0.9]}, r"emas\[0\]\[1\] must be float32"),
    ):
        with pytest.raises(ValueError, match=message):
            AdamWEMA([p, low], **settings)


def test_an_optimiser_takes_everything_with_it(device):
    model = model_of(0, device)
    optimizer = AdamWEMA(model.parameters(), **HYPER)
    train(model, optimizer, range(2))
    tables = [weakref.ref(t) for made in optimizer._tables.found.values() for table in made for t in table[:2]]
    made = [weakref.ref(t) for entry in optimizer.state.values() for t in entry.values()]
    number = id(optimizer._tables)
    assert len(tables) >= 4 and len(made) == 4 * len(SHAPES) + 3
    del optimizer
    gc.collect()
    assert all(ref() is None for ref in (*tables, *made)) and number not in adamw._owned


def test_the_compiler_is_not_imported():
    """torch's own optimisers import it at their first call, which takes seconds."""
    code = """
import sys, torch
from soflow_kernels import AdamWEMA
p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
optimizer = AdamWEMA([p], emas=[[torch.ones(4)]], ema_decays=[0.5])
p.grad = torch.ones_like(p)
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
optimizer.zero_grad()
optimizer.masters
assert "torch._dynamo" not in sys.modules
"""
    # The library operations import it themselves: this is a model on the CPU, or one that is built.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.path.dirname(os.path.dirname(soflow_kernels.__file__))
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
