from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.sharing.admission import Claim
from pytest_gpumem.sharing.ledger import HELD, WAITING, Ledger, Page, card_key, entry_of

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


def test_who_joins_clears_what_is_idle_and_leaves_the_rest_to_those_who_wait(ledgers, tmp_path):
    idle, asked = ledgers(), ledgers()
    assert idle.standing
    assert asked.standing
    entry = entry_of(WAITING, 1, asked.process, {"key": Claim(0, 1, exclusive=False)})
    asked.write(entry, "asked")
    die(idle)
    die(asked)
    new = ledgers()
    assert new.standing
    left = {entry.process, new.process}
    assert {path.name for path in (tmp_path / "alive").iterdir()} == left
    assert new.read().entries == [entry]
    assert new.dead(None) == [entry.process]
    assert new.bury([entry.process])
    assert new.read().entries == []


def test_a_living_process_is_not_buried(ledgers):
    one, other = ledgers(), ledgers()
    assert one.standing
    entry = entry_of(HELD, 1, one.process, {})
    one.write(entry, "living")
    assert not other.bury([entry.process])
    assert other.label(entry) == "living"
    assert other.read().entries == [entry]
