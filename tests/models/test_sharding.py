"""A network whose parameters are cut over ranks computes what a whole one does, and gathers one block at a time."""

import gc
import types
from collections import Counter

import pytest
import torch
import torch._dynamo  # FSDP imports it, which takes each fork seconds
import torch.distributed as dist
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
    x, t, s, y, direction = given
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


def two_steps(launch, rounded=None, kind="fsdp", taped=True, defers=False, compiled=False, **attributes):
    if defers:  # as on a GPU: biases are left to the operations after, which here are their references
        fused_layers.use_kernel = mlp_products.use_kernel = lambda *tensors: True
    plain, cut = networks(launch, rounded, kind, **attributes)
    if compiled:
        cut.compile_blocks(backend="eager")
    assert missed_part(cut) is None
    for _ in range(2):
        wanted, given = mean_gradients(plain, launch.world, rounded), batch(launch.rank)
        whole = step(plain, given, rounded, taped=taped)
        plain.zero_grad()
        assert_same(step(cut, given, rounded, taped=taped), whole, BOUNDS[rounded])
        assert_same(gradients(cut), wanted, BOUNDS[rounded])
        halve(plain)
        halve(cut)


CASES = {
    "float32": {},
    "bf16": {"rounded": BF16},
    "a pass of its own": {"rounded": BF16, "taped": False},
    "keeps norms": {"keep_norms": True},
    "recompute mlp": {"recompute": "mlp", "taped": False},
    "recompute block": {"rounded": BF16, "recompute": "block", "taped": False},
    "deferred biases": {"defers": True},
    "deferred biases, a pass of its own": {"defers": True, "taped": False},
    "deferred biases, recompute block": {"defers": True, "recompute": "block", "taped": False},
    "compiled": {"compiled": True, "defers": True},
}


def named(launch, function, settings):
    return function(launch, **settings)


@pytest.mark.parametrize("settings", CASES.values(), ids=list(CASES))
def test_two_ranks_step_as_a_whole_network(settings):
    """Guidance, the student, increments between its forward and its backward; twice, with shards written between."""
    on_ranks(2, named, two_steps, settings)


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


def gathered_bytes(net) -> tuple[int, int]:
    """The bytes of all whole parameters of blocks that are alive, and how many tensors these are in."""
    shapes = {p.shape for block in net.blocks for p in block.parameters()}
    alive = [v for v in gc.get_objects() if type(v) is nn.Parameter and v.shape in shapes]
    return sum(v.untyped_storage().size() for v in alive), len(alive)


def most_gathered(launch, grad):
    """The most bytes of whole parameters at any block's attention, and those after each call."""
    cut, seen, after = network(), [], []
    shard(cut, meet(launch).mesh, blocks=None, reduce=None)
    block = sum(p.numel() * p.itemsize for p in cut.blocks[0].parameters())

    def attend(q, k, v):
        seen.append(gathered_bytes(cut)[0])
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    cut.set_attention(attend)
    given = batch(launch.rank)
    with torch.set_grad_enabled(grad):
        tape = TapedOutputs(slice(None))
        out = forward(cut, given, tape=tape)
        after.append(gathered_bytes(cut))
        increments(cut, given, rows=slice(None), tape=tape)
        after.append(gathered_bytes(cut))
        increments(cut, given)
        after.append(gathered_bytes(cut))
        if grad:
            out.sum().backward()
            after.append(gathered_bytes(cut))
    return block, seen, after


@pytest.mark.parametrize("grad", [False, True])
def test_two_blocks_are_gathered_at_most_and_none_after_a_call(grad):
    for block, seen, after in on_ranks(2, most_gathered, grad):
        # The last modulation, a ninth of a block, may have the shapes of none: it is not looked for.
        assert 2 * SIZES.depth == len(seen) and all(block <= size <= 2 * block for size in seen), (block, seen)
        assert all(size == 0 and tensors for size, tensors in after), after


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


def replace_a_block(net):
    net.blocks[1] = Block(SIZES)
    nn.init.ones_(net.blocks[1].adaLN_modulation[1].bias)
    return "blocks.1"


CHANGES = [add_hook, hook_a_layer, hook_the_modulation, prune_a_layer, replace_forward, replace_a_block]


def changed(launch, change, before):
    """Whether a change before or after the network is cut is named, refused and has its effect."""
    torch.manual_seed(0)
    plain, cut = network(), network()
    mesh, given = meet(launch).mesh, batch(launch.rank)
    if before:
        change(cut)
    shard(cut, mesh, blocks=None, reduce=None)
    name = change(plain) if before else None
    if not before:
        torch.manual_seed(1)
        name = change(cut)
        torch.manual_seed(1)
        change(plain)
    assert cut.changed_part() == name
    assert missed_part(cut) == f"net.{name}"
    with torch.no_grad():
        got, wanted, usual = forward(cut, given), forward(plain, given), forward(network(), given)
    assert torch.allclose(got, wanted, atol=1e-5) and not torch.allclose(got, usual, atol=1e-2)
    with pytest.raises(ValueError, match=rf"^net\.{name} was replaced, wrapped or hooked"):
        increments(cut, given)
