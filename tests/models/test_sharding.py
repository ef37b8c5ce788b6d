"""A network whose parameters are cut over ranks computes what a whole one does, and gathers one block at a time."""

import types
from collections import Counter

import pytest
import torch
import torch._dynamo.utils  # FSDP imports dynamo, which would take each fork seconds
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from soflow_fast import paired_forward
from soflow_fast.config.schema import RunConfig
from soflow_fast.errors import ConfigError
from soflow_fast.models import fused_layers, mlp_products
from soflow_fast.models.dit import MLP, Block, DiT, TapedOutputs
from soflow_fast.models.paired_forward import missed_part
from soflow_fast.models.sharding import shard
from soflow_fast.training.parallel import join
from tests.forked import on_ranks
from tests.networks import SIZES, network

BF16 = torch.bfloat16
BOUNDS = {None: 1e-6, BF16: 1e-2}
"""The relative error of a whole tensor: products of other widths are summed in another order, and in bf16 a sum here
and there is rounded to the neighbour, 2^-8 away."""
Found = dict[str, torch.Tensor]


def meet(launch, kind="fsdp"):
    return join(launch, RunConfig(parallel=kind, shard_ranks=2), torch.device("cpu"))


def networks(launch, rounded=None, kind="fsdp", **attributes):
    """A whole network, and one of the same weights that is cut over the ranks; rounded: the dtype of their blocks."""
    plain, cut = network(rounded=rounded, **attributes), network(**attributes)
    shard(cut, meet(launch, kind).mesh, blocks=rounded, reduce=torch.float32)
    return plain, cut


def batch(rank, B=4):
    """x, t, s, y and a direction, unlike those of other ranks."""
    source = torch.Generator().manual_seed(10 + rank)
    x, direction = torch.randn(2, B, 2, 8, 8, generator=source)
    t = torch.rand(B, generator=source)
    return x, t, 0.5 * t, torch.randint(6, (B,), generator=source), direction


def forward(net, given, rounded=None, **named):
    with torch.autocast("cpu", BF16, enabled=rounded is not None):
        return net(*given[:4], **named)


def increments(net, given, rounded=None, rows=slice(1, None), tape=None):
    x, t, s, y, direction = (value[rows] for value in given)
    dt = 0.01 * (s - t)
    dx = direction * dt[:, None, None, None]
    return paired_forward(net, x, dx, t, dt, s, y, dtype=rounded or torch.float32, tape=tape)


def step(net, given, rounded=None, *, taped=True) -> Found:
    """The network calls of a training step and its backward, which leaves the gradients."""
    x, t, *_, direction = given
    with torch.no_grad():
        guidance = forward(net, (x, t, t, None), rounded)
    tape = TapedOutputs(slice(1, None)) if taped else None
    output = forward(net, given, rounded, tape=tape)
    value, increment = increments(net, given, rounded, tape=tape)
    (output.float() * direction).sum().backward()
    return {"guidance": guidance, "output": output.detach(), "value": value, "increment": increment}


def gradients(net) -> Found:
    found = {}
    for name, p in net.named_parameters():
        found[name] = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
    net.zero_grad()
    return found


def mean_gradients(net, world, rounded) -> Found:
    """Those of a whole network, averaged over the batches of all ranks in float32."""
    each = []
    for rank in range(world):
        (forward(net, batch(rank), rounded).float() * batch(rank)[-1]).sum().backward()
        each.append(gradients(net))
    return {name: torch.stack([found[name].float() for found in each]).mean(0) for name in each[0]}


def assert_same(got: Found, wanted: Found, bound: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        error = float((got[name].double() - value.double()).norm() / value.double().norm())
        assert error <= bound, (name, error)


@torch.no_grad()
def halve(net) -> None:
    """Write to the parameters, each rank to its part, as an optimiser does. Rounding commutes with this."""
    for p in net.parameters():
        (p.to_local() if isinstance(p, DTensor) else p).mul_(0.5)


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def two_steps(launch, rounded=None, kind="fsdp", taped=True, defers=False, compiled=False, **attributes):
    if defers:  # as on a GPU: biases are left to the operations after, which here are their references
        fused_layers.use_kernel = mlp_products.use_kernel = lambda *tensors: True
    plain, cut = networks(launch, rounded, kind, **attributes)
    if compiled:
        cut.compile_blocks(backend="aot_eager")
    assert missed_part(cut) is None
    graphs = [compiled_graphs()]
    for _ in range(3 if compiled else 2):
        wanted, given = mean_gradients(plain, launch.world, rounded), batch(launch.rank)
        whole = step(plain, given, rounded, taped=taped)
        plain.zero_grad()
        assert_same(step(cut, given, rounded, taped=taped), whole, BOUNDS[rounded])
        assert_same(gradients(cut), wanted, BOUNDS[rounded])
        halve(plain)
        halve(cut)
        graphs.append(compiled_graphs())
    assert (graphs[1] > graphs[0]) == compiled and graphs[-1] == graphs[-2]  # no step is compiled anew


CASES = {
    "float32": {"keep_norms": True},
    "bf16": {"rounded": BF16},
    "recompute mlp": {"recompute": "mlp", "taped": False},
    "recompute block": {"rounded": BF16, "recompute": "block", "taped": False},
    "deferred biases": {"defers": True},
    "normalised q and k": {"rounded": BF16, "qk_norm": True},
    "deferred biases, recompute block": {"defers": True, "recompute": "block", "taped": False},
}


def named(launch, function, settings):
    return function(launch, **settings)


@pytest.mark.parametrize("settings", CASES.values(), ids=list(CASES))
def test_two_ranks_step_as_a_whole_network(settings):
    """Guidance, the student, increments between its forward and its backward; twice, with shards written between."""
    on_ranks(2, named, two_steps, settings)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_blocks_step_as_a_whole_network():
    on_ranks(2, named, two_steps, {"compiled": True, "defers": True, "taped": False})


def compiled_once(launch):
    plain, cut = networks(launch)
    cut.compile_blocks(backend="eager")
    given, before = batch(launch.rank), compiled_graphs()
    with torch.no_grad():
        got, wanted = forward(cut, given), forward(plain, given)
    assert compiled_graphs() > before
    assert (got - wanted).norm() <= BOUNDS[None] * wanted.norm()


def test_blocks_are_compiled_in_one_graph():
    on_ranks(2, compiled_once)


@pytest.mark.slow
@pytest.mark.parametrize("rounded", [None, BF16], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", ["fsdp", "hsdp"])
def test_four_ranks_step_as_a_whole_network(kind, rounded):
    """Some parts are empty: a table of 6 rows is cut into 2, 2, 2 and none."""
    on_ranks(4, named, two_steps, {"rounded": rounded, "kind": kind})


def equal_bits(launch):
    plain, cut = networks(launch, BF16)
    given = batch(launch.rank)
    with torch.no_grad():
        return torch.equal(forward(plain, given, BF16), forward(cut, given, BF16))


def test_a_forward_in_bf16_has_the_bits_of_a_whole_network():
    """The masters, rounded when they are gathered, are the parameters of a network that was rounded."""
    assert all(on_ranks(2, equal_bits))


def average(launch):
    """A network that is never trained, whose first use is a pass of increments."""
    plain, cut = networks(launch)
    cut.requires_grad_(False)
    given = batch(launch.rank)
    for _ in range(2):
        for got, wanted in zip(increments(cut, given), increments(plain, given), strict=True):
            assert (got - wanted).norm() <= BOUNDS[None] * wanted.norm()
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                got = forward(cut, given)
                assert not got.requires_grad and torch.allclose(got, forward(plain, given), atol=1e-5)
        halve(plain)
        halve(cut)


def test_an_average_of_the_weights_takes_increments_and_forwards():
    on_ranks(2, average)


class Collectives(TorchDispatchMode):
    """How often ranks have met within the context, by the name of the operation."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func._overloadpacket.__name__] += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def meetings(launch):
    _, cut = networks(launch)
    step(cut, batch(launch.rank))
    with Collectives() as collectives:
        step(cut, batch(launch.rank))
    return +collectives.found


def test_a_step_gathers_each_part_once_for_each_call_and_reduces_it_once():
    """What is gathered ahead is what comes next: else it would be gathered in vain."""
    parts = SIZES.depth + 2  # blocks, the last modulation, the ends
    calls = 4  # guidance, the student, increments, the backward
    for found in on_ranks(2, meetings):
        assert found == {"_allgather_base_": calls * parts, "_reduce_scatter_base_": parts}


def bytes_gathered(launch, grad):
    """The bytes of a block, of all whole parameters at each block's attention, and of those after each call."""
    cut, whole, within, after = network(), {}, [], []
    shard(cut, meet(launch).mesh, blocks=None, reduce=None)
    block = sum(p.numel() * p.itemsize for p in cut.blocks[0].parameters())

    def bytes_now():  # FSDP frees the memory of the tensors and keeps these
        whole.update({id(p): p for b in cut.blocks for p in b.parameters() if not isinstance(p, DTensor)})
        return sum(p.untyped_storage().size() for p in whole.values())

    def attend(q, k, v):
        within.append(bytes_now())
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    cut.set_attention(attend)
    given = batch(launch.rank)
    for _ in range(2):
        with torch.set_grad_enabled(grad):
            tape = TapedOutputs(slice(None))
            out = forward(cut, given, tape=tape)
            after.append(bytes_now())
            increments(cut, given, rows=slice(None), tape=tape)
            after.append(bytes_now())
            increments(cut, given)
            after.append(bytes_now())
            if grad:
                out.sum().backward()
                after.append(bytes_now())
    assert len(whole) == sum(1 for b in cut.blocks for _ in b.parameters())
    return block, within, after


@pytest.mark.parametrize("grad", [False, True])
def test_two_blocks_are_gathered_at_most_and_none_after_a_call(grad):
    for block, within, after in on_ranks(2, bytes_gathered, grad):
        assert len(within) == 4 * SIZES.depth  # a forward and a pass with values of its own, twice
        assert all(block <= size <= 2 * block for size in within) and not any(after)


def kept_by_a_tape(launch):
    fused_layers.use_kernel = mlp_products.use_kernel = lambda *tensors: True
    cut = network()
    shard(cut, meet(launch).mesh, blocks=None, reduce=None)
    given, tape = batch(launch.rank), TapedOutputs(slice(None))
    forward(cut, given, tape=tape)
    kept = [*tape.modulations, tape.residual, tape.patches]
    kept += [value for block in tape.blocks for value in block if isinstance(value, torch.Tensor)]
    assert len(tape.modulations) == 6 * SIZES.depth + 2 and len(tape.blocks) == SIZES.depth
    return [value.untyped_storage().size() for value in kept if value is not None]


def test_a_tape_holds_no_parameter_that_was_gathered():
    assert all(min(sizes) > 0 for sizes in on_ranks(2, kept_by_a_tape))


def add_hook(net):
    net.blocks[1].register_forward_hook(lambda module, given, out: 1.5 * out)
    return "blocks.1"


def hook_a_layer(net):
    net.blocks[0].mlp.fc1.register_forward_pre_hook(lambda module, given: (1.5 * given[0],))
    return "blocks.0.mlp.fc1"


def hook_the_modulation(net):
    net.final_layer.adaLN_modulation.register_forward_hook(lambda module, given, out: 1.5 * out)
    return "final_layer.adaLN_modulation"


def prune_a_layer(net):
    prune.custom_from_mask(net.blocks[2].mlp.fc2, "weight", torch.zeros(40, 160))
    return "blocks.2.mlp.fc2"


def replace_forward(net):
    part = net.blocks[1].mlp
    part.forward = types.MethodType(lambda self, x: 2 * MLP.forward(self, x), part)
    return "blocks.1.mlp"


CHANGES = {
    "a hook": (add_hook, False),
    "a hook that was there before": (add_hook, True),
    "a hook of a layer": (hook_a_layer, False),
    "a hook of the last modulation": (hook_the_modulation, False),
    "a layer that was pruned before": (prune_a_layer, True),
    "another forward": (replace_forward, False),
}


def changed(launch, change, before):
    """A change, made before the network is cut or after, is named, takes effect, and is refused where it would be
    missed."""
    usual, plain, cut, given = network(), network(), network(), batch(launch.rank)
    name = change(plain)
    if before:
        change(cut)
    shard(cut, meet(launch).mesh, blocks=None, reduce=None)
    if not before:
        change(cut)
    assert (cut.changed_part(), missed_part(cut)) == (name, f"net.{name}")
    with torch.no_grad():
        got, wanted = forward(cut, given), forward(plain, given)
        assert torch.allclose(got, wanted, atol=1e-5) and not torch.allclose(got, forward(usual, given), atol=1e-2)
    with pytest.raises(ValueError, match=rf"^net\.{name} was replaced, wrapped or hooked"):
        increments(cut, given)


@pytest.mark.parametrize(("change", "before"), CHANGES.values(), ids=list(CHANGES))
def test_what_others_change_is_seen(change, before):
    on_ranks(2, changed, change, before)


def cut_off(launch):
    plain, cut = networks(launch)
    given = batch(launch.rank)

    def attend(q, k, v):
        raise MemoryError

    usual, cut.blocks[1].attn.backend = cut.blocks[1].attn.backend, attend
    with pytest.raises(MemoryError):
        increments(cut, given)
    cut.blocks[1].attn.backend = usual
    assert all(isinstance(p, DTensor) for p in cut.parameters())
    halve(plain)
    halve(cut)
    for got, wanted in zip(increments(cut, given), increments(plain, given), strict=True):
        assert (got - wanted).norm() <= BOUNDS[None] * wanted.norm()


def test_increments_that_are_cut_off_leave_nothing_gathered_or_on_its_way():
    """What was on its way would be old at the next use."""
    on_ranks(2, cut_off)


def called(launch, recompute):
    """Gradients of modules that are called one by one, as a hook is there."""
    plain, cut = networks(launch, recompute=recompute)
    wanted = mean_gradients(plain, launch.world, None)
    heard = []
    cut.blocks[1].register_forward_hook(lambda *_: heard.append(1))
    x, t, s, y, direction = batch(launch.rank)
    (cut(x, t, s, y) * direction).sum().backward()
    assert heard
    assert_same(gradients(cut), wanted, BOUNDS[None])


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_called_modules_have_the_gradients_of_a_whole_network(recompute):
    on_ranks(2, called, recompute)


def replaced_block(launch):
    _, cut = networks(launch)
    cut.blocks[1] = Block(SIZES)
    assert cut.changed_part() == "blocks.1"


def hooked_itself(launch):
    """The network is called, but increments would miss it."""
    cut = network()
    shard(cut, meet(launch).mesh, blocks=None, reduce=None)
    assert missed_part(cut) is None
    cut.register_forward_hook(lambda module, given, out: 2 * out)
    assert missed_part(cut) == "net" and cut.changed_part() is None


def sharded_by_others(launch):
    cut, mesh = network(), meet(launch).mesh
    fully_shard(cut.blocks[1], mesh=mesh)
    assert cut.changed_part() == "blocks.1"


@pytest.mark.parametrize("case", [replaced_block, hooked_itself, sharded_by_others])
def test_only_what_was_made_here_passes(case):
    on_ranks(2, case)


def filled_later(launch):
    plain, given = network(), batch(launch.rank)
    with torch.device("meta"):
        cut = DiT(SIZES)
    cut.keep_norms = False
    shard(cut, meet(launch).mesh, blocks=None, reduce=None)
    cut.to_empty(device="cpu")
    cut.pos_embed.copy_(plain.pos_embed)
    with torch.no_grad():
        for p, weight in zip(cut.parameters(), plain.parameters(), strict=True):
            assert isinstance(p, DTensor)
            part = weight.chunk(launch.world)[launch.rank]
            p.to_local().copy_(part)
    assert missed_part(cut) is None
    assert_same(step(cut, given), step(plain, given), BOUNDS[None])


def test_a_network_without_memory_is_cut_and_filled_later():
    on_ranks(2, filled_later)


def parts(launch):
    """The numbers of a rank, of which each matrix is cut over the ranks, and the dtypes of its blocks."""
    cut, inside = network(), set()
    whole = sum(p.numel() for p in cut.parameters())
    shard(cut, meet(launch).mesh, blocks=BF16, reduce=torch.float32)

    def attend(q, k, v):
        inside.update(p.dtype for p in cut.blocks[0].parameters() if not isinstance(p, DTensor))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    cut.set_attention(attend)
    step(cut, batch(launch.rank), BF16)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in cut.parameters())
    assert inside == {BF16}
    return sum(p.to_local().numel() for p in cut.parameters()) / whole


def test_a_rank_holds_its_part_in_float32_and_gathers_bf16():
    assert on_ranks(2, parts) == [0.5, 0.5]


def test_layers_in_float8_are_refused():
    net = network()
    kind = type("Float8Linear", (nn.Linear,), {"__module__": "torchao.float8.float8_linear"})
    net.blocks[0].mlp.fc1 = kind(40, 160)
    with pytest.raises(ConfigError, match=r"^--precision fp8: "):
        shard(net, None, blocks=BF16, reduce=None)  # pyright: ignore[reportArgumentType]
