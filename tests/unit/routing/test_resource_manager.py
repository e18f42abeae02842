from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pytest_gpumem import devices
from pytest_gpumem.devices import DriverReading
from pytest_gpumem.leases import family
from pytest_gpumem.records import Card
from pytest_gpumem.routing import resource_manager as module
from pytest_gpumem.routing.resource_manager import HybridResourceManager
from pytest_gpumem.routing.thresholds import Thresholds

MIB = 2**20
TOTAL = 1000 * MIB


class FakeCard:
    """A card of 1000 MiB of which others use ``used`` MiB; it may fail to answer."""

    def __init__(self):
        self.card = Card("GPU-fake-routing", "fake", TOTAL)
        self.used = 0
        self.silent = False

    def reading(self, card):
        if self.silent:
            return None
        return DriverReading(self.used * MIB, TOTAL - self.used * MIB, TOTAL, 0)


@pytest.fixture
def card(monkeypatch, tmp_path):
    """Have one card, without contexts, whose leases are this test's own."""
    from pytest_gpumem.leases.store import LeaseStore

    fake = FakeCard()
    store = LeaseStore(tmp_path / "leases")
    store.headroom = 0
    found = devices.find_cards()._replace(cards=(fake.card,))
    monkeypatch.setattr(devices, "find_cards", lambda: found)
    monkeypatch.setattr(devices, "driver_reading", fake.reading)
    monkeypatch.setattr(devices, "allocators", list)
    monkeypatch.setattr(module, "store", lambda: store)
    monkeypatch.setattr(module, "shared", module.Shared())
    monkeypatch.setattr(module.limits, "context", 0)
    yield fake
    module.shared.give_back()


@pytest.mark.parametrize(
    ("used", "task", "device", "reason"),
    [
        (0, ("math", 100), "cuda", "there is room"),
        (0, ("quantum", 0), "cuda", "there is room"),
        (0, ("tensor", 1000), "cuda", "there is room"),
        (0, ("parsing", 1), "cpu", "not worth a card"),
        (851, ("parsing", 1), "cpu", "above 85%"),
        (0, ("math", 1001), "cpu", "of the card are free"),
        (850, ("math", 100), "cuda", "there is room"),
        (851, ("math", 1), "cpu", "above 85%"),
        (851, ("math", 0), "cpu", "above 85%"),
        (700, ("math", 201), "cuda", "there is room"),
        (701, ("math", 200), "cuda", "there is room"),
        (701, ("math", 201), "cpu", "above 70%"),
        (1000, ("math", 0), "cpu", "above 85%"),
    ],
)
def test_the_thresholds_are_the_plans(card, used, task, device, reason):
    card.used = used
    assert HybridResourceManager().allocate_task(*task) == device
    (route,) = module.shared.take_routes()
    assert (route.device, route.size) == (device, task[1] * MIB)
    assert reason in route.reason
    assert route.fell_back == (device == "cpu" and task[0] != "parsing")


def test_other_thresholds_hold_if_they_are_given(card):
    card.used = 400
    manager = HybridResourceManager(Thresholds(full=0.3))
    assert manager.allocate_task("math") == "cpu"
    assert HybridResourceManager().allocate_task("math") == "cuda"


def test_a_negative_size_is_refused(card):
    with pytest.raises(ValueError, match="estimated_size_mb=-1"):
        HybridResourceManager().allocate_task("math", -1)


def test_what_was_set_aside_is_not_set_aside_twice_and_comes_back(card):
    manager = HybridResourceManager()
    assert manager.allocate_task("math", 600) == "cuda"
    assert manager.allocate_task("math", 600) == "cpu"
    assert manager.allocate_task("math", 400) == "cuda"
    manager.release()
    with manager.task("math", 900) as device:
        assert device == "cuda"
        assert manager.allocate_task("math", 200) == "cpu"
    assert manager.allocate_task("math", 900) == "cuda"


def test_of_many_threads_only_those_go_to_the_card_that_fit(card):
    start = threading.Barrier(12)

    def ask(_):
        start.wait()
        return HybridResourceManager().allocate_task("math", 300)

    with ThreadPoolExecutor(12) as threads:
        devices_ = list(threads.map(ask, range(12)))
    assert devices_.count("cuda") == 3
    assert devices_.count("cpu") == 9


OTHER = """
import sys
from pathlib import Path
from pytest_gpumem.errors import LeaseError
from pytest_gpumem.leases.request import Want
from pytest_gpumem.leases.store import LeaseStore
store = LeaseStore(Path(sys.argv[1]))
store.headroom = 0
try:
    store.acquire({sys.argv[2]: Want(600 * 2**20)}, {sys.argv[2]: 1000 * 2**20}, "x", timeout=0)
    print("got it", flush=True)
    sys.stdin.read()
except LeaseError:
    print("refused", flush=True)
"""


def test_another_process_cannot_have_the_same_bytes_too(card, tmp_path, monkeypatch):
    monkeypatch.setattr(family, "lineage", lambda _: ())  # what it starts is a stranger
    command = [sys.executable, "-c", OTHER, str(tmp_path / "leases"), card.card.uuid]
    manager = HybridResourceManager()
    with manager.task("math", 600) as device:
        assert device == "cuda"
        done = subprocess.run(command, capture_output=True, text=True, check=False, input="")
        assert done.stdout == "refused\n", done.stderr
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with other:
        assert other.stdout.readline() == "got it\n"
        assert manager.allocate_task("math", 600) == "cpu"
        other.communicate("")
    assert manager.allocate_task("math", 600) == "cuda"


def test_a_task_within_a_lease_uses_that_and_asks_for_what_is_missing(card):
    from pytest_gpumem.leases.request import Want

    leases, uuid = module.store(), card.card.uuid
    manager = HybridResourceManager()
    lease = leases.acquire({uuid: Want(700 * MIB)}, {uuid: TOTAL}, "a test", timeout=0)
    assert manager.allocate_task("math", 600) == "cuda"  # of the 700
    assert manager.allocate_task("math", 400) == "cuda"  # 100 of them and 300 more
    assert manager.allocate_task("math", 1) == "cpu"
    manager.release()
    lease.release()
    with leases.acquire({uuid: Want(None)}, {uuid: TOTAL}, "alone", timeout=0):
        assert manager.allocate_task("math", 1000) == "cuda"


def test_a_driver_that_goes_away_leaves_the_leases_to_decide(card):
    manager = HybridResourceManager()
    assert manager.allocate_task("math", 100) == "cuda"
    card.silent = True
    assert manager.get_system_status().cards == ()
    assert manager.get_system_status().vram_percent == 0
    assert manager.allocate_task("math", 800) == "cuda"
    assert manager.allocate_task("math", 800) == "cpu"


def test_without_a_card_everything_goes_to_the_cpu(monkeypatch, card):
    found = devices.find_cards()._replace(cards=())
    monkeypatch.setattr(devices, "find_cards", lambda: found)
    assert HybridResourceManager().allocate_task("tensor", 1) == "cpu"
    assert module.get_sentence_transformer_device() == "cpu"
    assert {route.reason for route in module.shared.take_routes()} == {"there is no card"}


def test_a_sentence_transformer_goes_to_the_cpu_if_the_card_cannot_be_read(
    monkeypatch, card, caplog
):
    assert module.get_sentence_transformer_device(90 * MIB) == "cuda"
    monkeypatch.setattr(module, "_reserved_part", lambda: 0.81)
    assert module.get_sentence_transformer_device() == "cpu"
    assert "81% of the card are reserved, above 80%" in caplog.text

    def gone():
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(module, "_reserved_part", gone)
    assert module.get_sentence_transformer_device() == "cpu"
    assert "the card cannot be read: the driver is gone" in caplog.text


def test_a_status_tells_of_every_card_and_is_kept_for_a_moment(card):
    card.used = 250
    manager = HybridResourceManager()
    status = manager.get_system_status()
    assert status.vram_percent == 25
    assert (status.cards[0].used, status.cards[0].free) == (250 * MIB, 750 * MIB)
    assert 0 <= status.ram_percent <= 100
    assert manager.get_system_status() is status or manager.get_system_status() == status
