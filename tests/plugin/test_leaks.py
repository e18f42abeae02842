"""Whose leak it is, and who holds it: what one test replaced is not the next one's doing."""

from __future__ import annotations

import random
import re

import pytest
from harness import SIMULATE, TAKE, run_pytest, write_suite

SUITE = """
KEEP = {}

@pytest.mark.parametrize("step", range(len(PROGRAM)))
def test_it(step):
    for name, units in PROGRAM[step]:
        if units:
            KEEP[name] = torch.zeros(units * 1024, dtype=torch.uint8, device="cuda")
        else:
            KEEP.pop(name, None)
"""


def test_holders_are_the_tests_own_tensors_and_never_more_than_the_leak(run):
    """Random steps of taking, replacing and dropping; sizes in KiB, so that blocks are exact."""
    chance = random.Random(5)  # noqa: S311  # no secret
    # First the plainest: what replaced a leak, so that nothing stayed, is not the next one's.
    program = [[("x", 4)], [("x", 4)], [("y", 4)]]
    program += [
        [
            (chance.choice("xyz"), chance.choice((0, 1, 4, 4, 9)))
            for _ in range(chance.randint(1, 3))
        ]
        for _ in range(45)
    ]
    finished = run(f"PROGRAM = {program}\n{SUITE}")

    there: dict[str, int] = {}
    for step, changes in enumerate(program):
        before, untouched = sum(there.values()), True
        own: set[str] = set()
        for name, units in changes:
            untouched &= name not in there or name in own
            there.pop(name, None)
            own.discard(name)
            if units:
                there[name] = units * 1024
                own.add(name)
        grown = sum(there.values()) - before
        cards = finished.test(f"test_it[{step}]").cards
        leaked = sum(card.leaked for card in cards)
        holders = [holder for card in cards for holder in card.holders]
        named = {each for holder in holders for each in re.findall(r"KEEP\['(.)'\]", holder.where)}
        said = (step, changes, there, cards)

        assert leaked == max(0, grown), said
        assert sum(holder.size for holder in holders) == leaked, said
        assert named <= own, said
        assert sum(holder.tensors for holder in holders) <= len(own), said
        if untouched and leaked:
            assert sum(holder.tensors for holder in holders) == len(own), said
            assert all(not holder.whole for holder in holders), said


def test_what_replaced_a_leak_is_not_told_as_left_by_a_later_test(run):
    fails = "def test_fails(): raise RuntimeError('CUDA out of memory')"
    finished = run(f"PROGRAM = {[[('x', 9)], [('x', 9)], [('y', 4)]]}\n{SUITE}\n{fails}")

    (alive,) = finished.test("test_fails").alive
    assert {group.size // 1024: group.owner for group in alive.groups} == {
        9: "from before the test",
        4: f"left by {finished.test('test_it[2]').nodeid}",
    }


def test_what_stays_is_laid_at_the_door_of_who_made_it(run):
    source = """
@pytest.fixture(scope="session")
def model():
    return torch.nn.Linear(256, 256, bias=False, device="cuda")

@pytest.fixture(scope="session")
def late():
    return take(8)

def train(model):
    model.zero_grad(set_to_none=True)
    model(torch.ones(1, 256, device="cuda")).sum().backward()

def test_first_gradients(model): train(model)
def test_gradients_made_anew(model): train(model)
def test_leak_beside_gradients(model): KEPT.append(take(4))
def test_leak_before_a_fixture(request):
    KEPT.append(take(4))
    request.getfixturevalue("late")
"""
    finished = run(source)

    assert finished.card("test_first_gradients").leaked == 0
    assert "held by fixture 'model' (session)" in finished.card("test_first_gradients").note
    for number, name in enumerate(("test_leak_beside_gradients", "test_leak_before_a_fixture")):
        card = finished.card(name)
        assert (card.leftover, card.leaked) == (4096, 4096), card
        assert [each.where for each in card.holders] == [
            f"test_it.py: module global KEPT[{number}]"
        ]


@pytest.mark.parametrize(
    "hook",
    [
        "pytest_runtest_logstart(nodeid): second(nodeid)",
        "pytest_runtest_logfinish(nodeid): first(nodeid)",
        "pytest_runtest_logreport(report): report.when == 'teardown' and first(report.nodeid)",
        "pytest_runtest_makereport(item, call): call.when == 'teardown' and first(item.nodeid)",
        "pytest_runtest_protocol(item): second(item.nodeid)",
    ],
    ids=lambda hook: hook.partition("(")[0],
)
def test_what_a_suites_hook_takes_between_two_tests_is_neithers(hook, tmp_path):
    conftest = f"""{TAKE}
take()
def first(nodeid): nodeid.endswith("first") and KEPT.append(take())
def second(nodeid): nodeid.endswith("second") and KEPT.append(take())
def {hook}
"""
    body = "def test_first(): pass\ndef test_second(): pass\ndef test_third(): pass"
    write_suite(tmp_path, conftest=conftest, test_it=body)
    run = run_pytest(tmp_path, *SIMULATE, "--gpumem-json=run.json")

    assert {each.nodeid: each.cards for each in run.record.tests} == {
        f"test_it.py::test_{name}": () for name in ("first", "second", "third")
    }


# What outlives a collection of the second generation, as in a long test, is garbage that only a
# full one finds; some of it, a function or a class, looks like a name that holds.
OLD_GARBAGE = """
import gc

@pytest.fixture(scope="session", autouse=True)
def only_what_is_asked_for():
    gc.disable()
    yield
    gc.enable()

class Ring:
    pass

def of_ring(value):
    ring = Ring()
    ring.itself, ring.value = ring, value
    return ring

def of_function(value):
    def call():
        return call, value
    return call

def of_class(value):
    class Kept:
        cache = value
    return Kept

def of_generator(value):
    def generate(itself):
        kept = value
        yield itself
    found = []
    found.append(generate(found))
    next(found[0])
    return found

@pytest.mark.parametrize(
    "garbage", [None, of_ring, None, of_function, None, of_class, None, of_generator]
)
def test_it(garbage):
    value = take(4)
    if garbage:
        cycle = garbage(value)
        gc.collect(1)
    else:
        KEPT.append(value)
"""


def test_old_garbage_is_no_leak_whether_or_not_holders_are_searched_first(run):
    finished = run(OLD_GARBAGE)
    assert finished.outcomes == {"passed": 8}

    kept = 0
    for each in finished.record.tests:
        (card,) = each.cards
        if "[of_" in each.nodeid:
            assert (card.leaked, card.holders) == (0, ()), each
        else:
            where = [holder.where for holder in card.holders]
            assert where == [f"test_it.py: module global KEPT[{kept}]"], each
            assert card.leaked == 4096
            kept += 1
