"""What decays: the plan alone, without a store."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gpumem.archive.catalogue import Entry
from pytest_gpumem.archive.retention import Rules, plan


def entry(number, content):
    return Entry(f"{number:016x}", "t", "", (), {}, float(number), content, 0, 0)


ENTRIES = st.lists(st.sampled_from("abcd"), max_size=12).map(
    lambda contents: [entry(number, content) for number, content in enumerate(contents)]
)
RULES = st.fixed_dictionaries(
    {},
    optional={
        "before": st.integers(0, 12),
        "keep_last": st.integers(0, 14),
        "max_stored": st.integers(0, 40),
    },
)


@settings(deadline=None, max_examples=max(300, settings().max_examples))
@given(entries=ENTRIES, chosen=st.sets(st.integers(0, 11)), rules=RULES)
def test_every_rule_holds_after_a_plan_and_nothing_else_goes(entries, chosen, rules):
    sizes = {"a": 1, "b": 10, "c": 0, "d": 7}
    candidates = [each for at, each in enumerate(entries) if at in chosen]
    found = plan(entries, candidates, sizes, Rules(**rules))

    gone = set(found.decayed)
    kept = [each for each in entries if each.id not in gone]
    assert gone <= {each.id for each in candidates}
    assert len(found.decayed) == len(gone)
    states = {each.content for each in kept}
    assert found.orphans == {each.content for each in entries} - states
    left = [each for each in candidates if each.id not in gone]
    assert left == candidates[len(candidates) - len(left) :]  # the oldest go
    assert not any(each.created < rules.get("before", 0) for each in left)
    assert len(left) <= rules.get("keep_last", 99)
    within = sum(sizes[content] for content in states) <= rules.get("max_stored", 99)
    assert within or not left
    if not rules:
        assert not gone


@settings(deadline=None, max_examples=max(100, settings().max_examples))
@given(entries=ENTRIES, most=st.integers(0, 40))
def test_no_more_goes_for_room_than_must(entries, most):
    sizes = {"a": 1, "b": 10, "c": 0, "d": 7}
    found = plan(entries, entries, sizes, Rules(max_stored=most))
    if found.decayed:
        last = len(found.decayed) - 1
        states = {each.content for each in entries[last:]}
        assert sum(sizes[content] for content in states) > most
