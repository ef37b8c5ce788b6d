"""Batches handed round devices: in order, in bounds, in threads that end."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soflow_fast.errors import ConfigError, Interrupted
from soflow_fast.sampling.devices import IN_FLIGHT, Devices, Work, copied
from soflow_fast.training import precision
from soflow_fast.training.precision import resolve_devices

CPU = torch.device("cpu")
Begin = Callable[[torch.device], Work]


def numbered(count: int) -> Iterator[Tensor]:
    return (torch.tensor([k]) for k in range(count))


def doing(work: Callable[[Tensor], object] = lambda batch: None) -> tuple[Begin, list[tuple[int, str]]]:
    """The work of a device, and which batch was worked on in which thread."""
    done: list[tuple[int, str]] = []

    def work_on(device: torch.device) -> Work:
        def twice(batch: Tensor) -> tuple[Tensor, ...]:
            work(batch)
            done.append((int(batch), threading.current_thread().name))
            return batch, 2 * batch

        return twice

    return work_on, done


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("device-")]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_results_come_in_order_from_all_devices(n: int) -> None:
    second = threading.Event()

    def work(batch: Tensor) -> None:
        if int(batch) == 1:
            second.set()
        assert int(batch) > 0 or n == 1 or second.wait(60)  # which another device begins meanwhile

    work_on, done = doing(work)
    with Devices([CPU] * n, work_on) as devices:
        found = [[int(value) for value in made] for made in devices.results(numbered(20))]
        assert len(running()) == n
    assert found == [[k, 2 * k] for k in range(20)] and not running()
    assert sorted(done) == [(k, f"device-{k % n}_0") for k in range(20)]


def test_nothing_begins_before_its_first_batch() -> None:
    begun = []
    with Devices([CPU] * 3, lambda device: begun.append(device) or (lambda batch: (batch,))) as devices:
        assert not list(devices.results([])) and not begun
        assert len(list(devices.results(numbered(2)))) == 2
        assert len(begun) == len(running()) == 2


def test_what_is_in_flight_is_bounded() -> None:
    asked = []
    work_on, _ = doing(lambda batch: time.sleep(0.005))
    with Devices([CPU] * 2, work_on) as devices:
        for k, _ in enumerate(devices.results(asked.append(1) or batch for batch in numbered(50))):
            assert k < len(asked) <= k + 2 * IN_FLIGHT
    assert len(asked) == 50


def test_what_is_there_is_not_kept_until_the_devices_are_full() -> None:
    handed, found = [], []

    class Seen(Devices):
        def _hand(self, k: int, batch: Tensor) -> Future[Any]:
            handed.append(super()._hand(k, batch))
            return handed[-1]

    def batches() -> Iterator[Tensor]:
        for batch in numbered(5):
            yield batch
            assert len(found) >= int(batch)
            wait(handed)

    with Seen([CPU] * 2, doing()[0]) as devices:
        for values in devices.results(batches()):
            found.append(int(values[0]))
    assert found == [0, 1, 2, 3, 4]


def test_an_error_ends_all_and_drops_what_waits() -> None:
    def work(batch: Tensor) -> None:
        if int(batch) == 1:
            raise ValueError("1 is wrong")

    work_on, done = doing(work)
    with pytest.raises(ValueError, match=r"^1 is wrong$"), Devices([CPU] * 3, work_on) as devices:
        list(devices.results(numbered(1000)))
    assert not running() and len(done) < 6 * IN_FLIGHT


def test_who_is_interrupted_waits_for_no_thread() -> None:
    go_on = threading.Event()
    work_on, done = doing(lambda batch: go_on.wait(60))
    with pytest.raises(Interrupted) as error, Devices([CPU] * 2, work_on) as devices:
        for batch in numbered(3):
            devices._hand(0, batch)
        raise Interrupted(15)
    assert error.value.at_once and not done
    go_on.set()
    while running():
        time.sleep(0.001)
    assert [batch for batch, _ in done] in ([], [0])  # what waited is dropped


def test_a_copy_of_a_module_on_another_device() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    module[2].weight = module[0].weight
    module[1].requires_grad_(False)
    there = copied(module, torch.device("meta"))
    assert copied(module, CPU) is module and {x.device for x in module.state_dict().values()} == {CPU}
    assert {x.device.type for x in there.state_dict().values()} == {"meta"} and type(there) is nn.Sequential
    assert list(there.state_dict()) == list(module.state_dict()) and there[2].weight is there[0].weight
    assert [p.requires_grad for p in there.parameters()] == [p.requires_grad for p in module.parameters()]


def test_devices_of_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_devices("cpu") == [CPU]
    for name, said in (
        ("cpu,cpu", "--device cpu,cpu: names a device twice"),
        ("cpu,cpu:0", "--device cpu,cpu:0: names a device twice"),
        ("cpu,", "--device : "),
        ("cpu,x", "--device x: "),
        ("meta", "--device meta: holds no data"),
    ):
        with pytest.raises(ConfigError) as error:
            resolve_devices(name)
        assert str(error.value).startswith(said) and "\n" not in str(error.value)
    monkeypatch.setattr(precision, "resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert resolve_devices("auto") == [torch.device("cuda", k) for k in range(3)]
    assert resolve_devices("cuda:2,cuda:0") == [torch.device("cuda:2"), torch.device("cuda:0")]
    assert resolve_devices("cuda:1") == [torch.device("cuda:1")]
    for name in ("cuda:0,cuda:0", "cuda,cuda:0"):
        with pytest.raises(ConfigError, match="names a device twice"):
            resolve_devices(name)
    with pytest.raises(ConfigError, match="--device cpu,cuda:0: give devices of one kind"):
        resolve_devices("cpu,cuda:0")
