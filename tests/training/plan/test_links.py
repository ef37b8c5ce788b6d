"""What collectives send over which links, by hand."""

import pytest

from soflow_fast.config.gpus import GPUS, Gpu
from soflow_fast.errors import ConfigError
from soflow_fast.training.plan.links import (
    ALONE,
    Group,
    Layout,
    Traffic,
    all_gather,
    all_reduce,
    layout,
    reduce_scatter,
)

GPU = Gpu(
    "card",
    0,
    copy=1.0,
    products={},
    attention=1.0,
    attention_backward=1.0,
    nvlink=100.0,
    network=10.0,
    collective=0.5,
    nvlink_hop=0.01,
    network_hop=0.1,
)


def test_a_ring_on_one_node_sends_all_but_an_nth() -> None:
    assert all_gather(800, Group(8, 1)) == Traffic(nvlink=700, network=0, calls=1, nvlink_hops=7)
    assert all_gather(800, ALONE) == Traffic()


def test_a_ring_over_nodes_shares_its_border_among_the_adapters() -> None:
    """16 ranks: 15 of 16 parts pass each link, and of each 8 rings one link in 8 leaves a node."""
    found = all_gather(1600, Group(8, 2))
    assert found == Traffic(nvlink=1500 * 7 / 8, network=1500 / 8, calls=1, nvlink_hops=14, network_hops=1)
    assert found.nvlink + found.network == 1600 * 15 / 16
    assert all_gather(400, Group(1, 4)) == Traffic(network=300, calls=1, network_hops=3)


def test_a_reduce_scatter_is_an_all_gather_backwards() -> None:
    for group in (ALONE, Group(4, 1), Group(4, 3)):
        assert reduce_scatter(96, group) == all_gather(96, group)


def test_an_all_reduce_is_both() -> None:
    one_node = all_reduce(800, Group(8, 1))
    assert one_node == Traffic(nvlink=1400, calls=1, nvlink_hops=14)
    # Within a node 2 S (g - 1) / g; between the 4 nodes each of 8 adapters takes an eighth, 2 S / g (k - 1) / k.
    assert all_reduce(800, Group(8, 4)) == Traffic(1400, 150, 1, 14, 4)
    assert all_reduce(800, Group(1, 5)) == Traffic(0, 1280, 1, 0, 6)
    assert all_reduce(800, ALONE) == Traffic()


def test_links_carry_at_the_same_time_and_hops_come_one_after_the_other() -> None:
    both = Traffic(nvlink=1000, network=200, calls=2, nvlink_hops=3, network_hops=4)
    assert both.seconds(GPU) == pytest.approx(20 + 1 + 0.03 + 0.4)
    assert Traffic(nvlink=3000, network=200).seconds(GPU) == 30
    assert Traffic().seconds(GPU) == 0
    assert both + both == both.times(2)


def test_layouts() -> None:
    assert layout("ddp", 8, 4) == Layout(ALONE, Group(8, 4))
    assert layout("fsdp", 8, 4) == Layout(Group(8, 4), ALONE)
    assert layout("hsdp", 8, 4) == Layout(Group(8, 1), Group(1, 4))
    assert layout("hsdp", 8, 4, 2) == Layout(Group(2, 1), Group(4, 4))
    assert layout("hsdp", 8, 4, 16) == Layout(Group(8, 2), Group(1, 2))
    for nodes in (1, 3, 8):
        for shards in (2, 4, 8):
            found = layout("hsdp", 8, nodes, shards)
            assert found.shards.size * found.replicas.size == 8 * nodes


@pytest.mark.parametrize(
    ("gpus", "nodes", "shards", "message"),
    [
        (8, 4, 6, "--parallel hsdp: the state is cut over 6 ranks, 32 are no multiple"),
        (8, 3, 12, "run.shard_ranks must divide the 8 GPUs of a node or be a multiple of them to be predicted, got 12"),
        (1, 4, 0, "--parallel hsdp: nothing is cut over one rank"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(gpus: int, nodes: int, shards: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        layout("hsdp", gpus, nodes, shards)
    assert str(error.value).startswith(message)


def test_rates_are_below_the_peaks_of_the_links() -> None:
    for name, nvlink, network in (("h100", 450e9, 50e9), ("h200", 450e9, 50e9), ("a100", 300e9, 25e9)):
        assert 0.5 * nvlink < GPUS[name].nvlink < nvlink and 0.5 * network < GPUS[name].network < network
