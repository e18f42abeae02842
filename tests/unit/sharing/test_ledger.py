from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.sharing.admission import Claim
from pytest_gpumem.sharing.ledger import (
    HELD,
    RESIDENT,
    WAITING,
    Ledger,
    Page,
    card_key,
    entry_of,
)

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
    with waits.watch(waiting) as watch:
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
