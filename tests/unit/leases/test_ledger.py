from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.admission import Claim
from pytest_gpumem.leases import family
from pytest_gpumem.leases.entries import (
    HELD,
    RESIDENT,
    WAITING,
    card_key,
    entry_named,
    entry_of,
)
from pytest_gpumem.leases.family import kin_among
from pytest_gpumem.leases.ledger import Ledger
from pytest_gpumem.leases.page import Page
from pytest_gpumem.leases.request import YIELDS

KEYS = st.text("abcdefABCDEF0123456789", min_size=1, max_size=8)
CLAIMS = st.builds(Claim, st.just(0), st.integers(0, 2**63), st.booleans())


@pytest.fixture
def ledgers(tmp_path):
    made = []

    def make():
        made.append(Ledger(tmp_path))
        return made[-1]

    yield make
    for ledger in made:
        ledger.close()


def die(ledger):
    """What the kernel does when a process ends."""
    ledger.standing.alive.close()
    ledger.standing.guard.close()
    ledger.forget()


@given(st.integers(1, 10**9), st.dictionaries(KEYS, CLAIMS, max_size=8))
def test_a_name_says_all_of_its_entry_and_is_a_files_name(number, claims):
    entry = entry_of(HELD, number, "123456.0123abcd", claims)
    page = Page([entry.name])
    assert page.entries == [entry]
    assert page.entries[0].pid == 123456
    assert len(entry.name.encode()) <= 255 or len(claims) > 7


def test_strange_files_are_passed_over():
    assert Page([".swp", "README", "lock"]).entries == []


LINES = {"1.a": ("a",), "2.b": ("b", "x", "a"), "3.c": ("c", "b", "x", "a"), "4.d": ("d", "x")}


def kin(processes):
    return kin_among(processes, LINES.get)


def entry(state, number, process, size, *, test=False):
    claim = Claim(size, 0, False) if state == RESIDENT else Claim(0, size, exclusive=size == 0)
    return entry_of(state, number, process, {"key": claim}, test=test)


def against(page, request):
    return sorted(claim.resident + claim.extra for claim in page.against(request, "key"))


def test_what_descendants_hold_comes_out_of_a_lease_and_is_not_waited_for():
    """Of four processes b is a's child, c is b's, and d nobody's."""
    taken = [entry(HELD, 1, "1.a", 700), entry(HELD, 2, "2.b", 400), entry(HELD, 3, "3.c", 100)]
    waiting = [entry(WAITING, 4, "4.d", 900), entry(WAITING, 5, "2.b", 50)]
    page = Page([each.name for each in (*taken, *waiting)], kin)
    asked = {name: entry(WAITING, 9, name, 1) for name in LINES}

    assert against(page, asked["4.d"]) == [100, 300, 300]
    assert against(page, asked["3.c"]) == [100]  # its own, of another thread
    assert against(page, asked["2.b"]) == [100, 300]
    assert against(page, asked["1.a"]) == [100, 300, 300]
    kept = [claim.resident for claim in page.against(asked["1.a"], "key")]
    assert sorted(kept) == [100, 300, 300]
    # a's lease waits for b's request, and c's for nobody.
    assert [page.is_stuck(each) for each in taken] == [True, False, False]
    assert [page.left(asked[name], "key", 1000) for name in LINES] == [0, 300, 300, 0]
    ahead = [[claim.extra for claim in page.ahead(asked[name], "key")] for name in LINES]
    assert ahead == [[900], [50], [], [900, 50]]


def test_only_what_a_process_asks_for_later_comes_out_of_its_tests_lease():
    taken = [
        entry(HELD, 1, "4.d", 300),
        entry(HELD, 2, "4.d", 500, test=True),
        entry(HELD, 3, "4.d", 200),
        entry(RESIDENT, 0, "4.d", 50),
    ]
    page = Page([each.name for each in taken])

    assert against(page, entry(WAITING, 9, "1.a", 1)) == [50, 200, 300, 300]
    assert against(page, entry(WAITING, 9, "4.d", 1)) == [50, 200, 300]
    assert page.left(entry(WAITING, 9, "4.d", 1), "key", 1000) == 300


SIZES = st.lists(st.tuples(st.sampled_from(sorted(LINES)), st.integers(0, 99), st.booleans()))


@given(SIZES)
def test_a_family_never_counts_for_less_than_its_leases_or_than_any_of_them(leases):
    """Nor for more than all of them."""
    taken = [entry(HELD, n, *each[:2], test=each[2]) for n, each in enumerate(leases, 1)]
    page = Page([each.name for each in taken], kin)
    counted = sum(claim.extra for claim in page.claims["key"].values())

    assert counted <= sum(size for _, size, _ in leases)
    assert counted >= max((size for _, size, _ in leases), default=0)
    for process in LINES:
        outermost = process in ("1.a", "4.d") and not any(test for *_, test in leases)
        own = [size for name, size, _ in leases if name == process]
        assert not outermost or counted >= sum(own)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_is_stopped_is_called_so_and_no_other_of_its_number(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        name, (born, *_) = f"{process.pid}.0123abcd", family.lineage(process.pid)
        (tmp_path / name).write_text(f"{born}\n")
        (tmp_path / "1.0123abcd").write_text(f"{born}\n")
        families = family.Families(tmp_path, "2.0123abcd")
        assert not families.is_stopped(name)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert families.is_stopped(name)
        assert not families.is_stopped("1.0123abcd")
    finally:
        process.kill()
        process.wait()


def test_the_key_of_a_card_is_the_end_of_its_uuid():
    assert card_key("GPU-6ab9cbd1-3c7d-4e04-9e1c-0123456789ab") == "456789ab"
    assert card_key("MPS-0") == "MPS0"


def test_who_joins_clears_what_the_dead_left_and_wakes_all_who_may_wait_for_it(ledgers, tmp_path):
    idle, asked, waits = ledgers(), ledgers(), ledgers()
    for each in (idle, asked, waits):
        assert each.standing
    claims = {"key": Claim(0, 1, exclusive=False)}
    for ledger, state in ((asked, HELD), (asked, RESIDENT), (waits, WAITING)):
        ledger.write(entry_of(state, 1, ledger.process, claims), "")
    waiting = entry_of(WAITING, 1, waits.process, claims)
    with waits.alive.watch() as watch:
        die(idle)
        die(asked)
        new = ledgers()
        assert new.standing
        assert watch.wait(10).nudged
    assert {path.name for path in (tmp_path / "alive").iterdir()} == {waits.process, new.process}
    assert new.read().entries == [waiting]


def test_a_living_process_is_not_buried(ledgers):
    one, other = ledgers(), ledgers()
    assert one.standing
    entry = entry_of(HELD, 1, one.process, {})
    one.write(entry, "living")
    assert not other.bury([entry.process])
    assert other.label(entry) == "living"
    assert other.read().entries == [entry]


def test_one_of_low_priority_lets_a_thousand_later_ones_go_first_and_no_more():
    def named(number, name, **kind):
        claims = {"cafe": Claim(0, 700, exclusive=False)}
        return entry_of(WAITING, number, f"{name}.0a", claims, **kind)

    first, low = named(7, 1), named(7 + 1 + YIELDS, 2, low=True)
    assert entry_named(low.name) == low
    page = Page([first.name, low.name])
    assert page.last == 7  # whoever comes now comes before it
    later = [named(page.last + 2 + place, 10 + place) for place in range(YIELDS + 10)]
    page = Page([first.name, low.name, *(each.name for each in later)])
    assert page.last == later[-1].number
    assert page.waiting.index(low) == 1 + YIELDS - 1
    assert len(page.ahead(low, "cafe")) == YIELDS
    assert low.claims["cafe"] in page.ahead(later[-1], "cafe")
    assert len(page.ahead(later[-1], "cafe")) == len(later) + 1
