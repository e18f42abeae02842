from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem.simulator import card as card_module
from pytest_gpumem.simulator.card import SharedCard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 2**20
TOTAL, CONTEXT = 1000 * MIB, 100 * MIB

# A process that has the card open and evaluates what it is asked, one line each.
MEMBER = """
import gc, os, random, signal, sys, threading
from pathlib import Path
from pytest_gpumem.simulator.card import SharedCard

card = SharedCard.open(Path(sys.argv[1]))

def in_forked_child(work):
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            answer = repr(work())
        except BaseException as error:
            answer = repr(error)
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as told:
        answer = told.read().decode()
    os.waitpid(pid, 0)
    return answer

def churn(times, seed):
    held, chance = [], random.Random(seed)
    for _ in range(times):
        size = chance.randrange(1, 300) * 2**20
        if card.reserve(size):
            held.append(size)
        elif held:
            card.release(held.pop(chance.randrange(len(held))))
    return sum(held)

def fork_beside_a_busy_thread(times):
    done = threading.Event()
    def busy():
        while not done.is_set():
            card.free()
    thread = threading.Thread(target=busy)
    thread.start()
    answers = {in_forked_child(card.free) for _ in range(times)}
    done.set()
    thread.join()
    return answers

def overdrawn(times):
    # How often another process held, at the same time as this one, what only one can hold.
    count = 0
    for _ in range(times):
        if card.reserve(card.total // 2):
            count += sum(card.processes().values()) > card.total
            card.release(card.total // 2)
    return count

def hold_the_lock(child=0):
    with card._alone():
        card.free()
        print(child, flush=True)
        signal.pause()

def fork_and_hold_the_lock():
    child = os.fork()
    if child:
        hold_the_lock(child)
    os.close(1)
    signal.pause()

class Cycle:
    def __init__(self):
        self.me = self
    def __del__(self):
        card.release(1)

def collect_in_the_middle_of_calls(times):
    card.reserve(times)
    gc.set_threshold(1)
    for _ in range(times):
        Cycle()
        card.free()
    gc.set_threshold(700)
    gc.collect()
    return card.processes()

for line in sys.stdin:
    print(eval(line), flush=True)
"""


UNSHARE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


class Member:
    def __init__(self, path: Path, *before: str) -> None:
        self.process = subprocess.Popen(
            [*before, sys.executable, "-c", MEMBER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid

    def begin(self, expression: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, expression: str) -> str:
        self.begin(expression)
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def card(tmp_path: Path) -> Iterator[SharedCard]:
    card = SharedCard.create(tmp_path / "card", total=TOTAL, context=CONTEXT)
    yield card
    card.close()


@pytest.fixture
def new_member(card: SharedCard) -> Iterator[Callable[..., Member]]:
    members: list[Member] = []

    def start(*before: str) -> Member:
        members.append(Member(card.path, *before))
        return members[-1]

    yield start
    for member in members:
        member.end()


def test_every_process_that_opens_the_file_sees_the_same_card(
    card: SharedCard, new_member: Callable[[], Member]
) -> None:
    member = new_member()
    described = "(card.uuid, card.name, card.total, card.context)"
    assert member.ask(described) == str((card.uuid, card.name, TOTAL, CONTEXT))
    assert len(card.uuid) == len("GPU-") + 36


def test_two_cards_differ_by_uuid(card: SharedCard, tmp_path: Path) -> None:
    other = SharedCard.create(tmp_path / "other", total=TOTAL, context=CONTEXT)
    assert other.uuid != card.uuid
    other.close()


def test_a_process_pays_its_context_when_it_joins_and_once_only(card: SharedCard) -> None:
    assert (card.joined, card.free()) == (False, TOTAL)
    assert card.join()
    assert card.join()
    assert (card.joined, card.free()) == (True, TOTAL - CONTEXT)
    assert card.processes() == {os.getpid(): CONTEXT}


def test_a_context_that_does_not_fit_is_refused(
    card: SharedCard, new_member: Callable[[], Member]
) -> None:
    assert card.join()
    assert card.reserve(TOTAL - 2 * CONTEXT + 1)
    member = new_member()
    assert member.ask("card.join(), card.joined") == "(False, False)"
    card.release(1)
    assert member.ask("card.join(), card.joined") == "(True, True)"


def test_what_fits_exactly_is_reserved_and_one_byte_more_is_not(card: SharedCard) -> None:
    card.join()
    assert not card.reserve(TOTAL - CONTEXT + 1)
    assert card.reserve(TOTAL - CONTEXT)
    assert card.free() == 0
    card.release(TOTAL - CONTEXT)
    assert card.free() == TOTAL - CONTEXT


def test_leaving_gives_everything_back(card: SharedCard) -> None:
    card.join()
    card.reserve(10 * MIB)
    card.leave()
    assert (card.joined, card.free(), card.processes()) == (False, TOTAL, {})
    assert not card.reserve(1)
    assert card.join()
    assert card.free() == TOTAL - CONTEXT


def test_a_process_that_has_not_joined_reserves_nothing(card: SharedCard) -> None:
    assert not card.reserve(1)
    card.release(1)
    assert card.free() == TOTAL


def test_more_than_was_reserved_is_not_released(card: SharedCard) -> None:
    card.join()
    card.reserve(5)
    with pytest.raises(ValueError, match="6 bytes released on the simulated card, 5 reserved"):
        card.release(6)


def test_processes_that_reserve_at_once_never_exceed_the_capacity(
    card: SharedCard, new_member: Callable[[], Member]
) -> None:
    members = [new_member() for _ in range(4)]
    assert [member.ask("card.join()") for member in members] == ["True"] * 4
    for member in members:
        member.begin("overdrawn(1000)")
    assert [member.answer() for member in members] == ["0"] * 4
    for seed, member in enumerate(members):
        member.begin(f"churn(500, {seed})")
    held = {member.pid: CONTEXT + int(member.answer()) for member in members}
    assert card.processes() == held
    assert card.free() == TOTAL - sum(held.values())
    for member in members:
        member.ask("card.leave()")
    assert card.free() == TOTAL


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_what_a_killed_process_held_can_be_reserved_at_once(
    card: SharedCard, new_member: Callable[[], Member], reaped: bool
) -> None:
    card.join()
    member = new_member()
    assert member.ask(f"card.join(), card.reserve({700 * MIB})") == "(True, True)"
    assert not card.reserve(750 * MIB)
    os.kill(member.pid, signal.SIGKILL)
    if reaped:
        member.process.wait()
    else:
        os.waitid(os.P_PID, member.pid, os.WEXITED | os.WNOWAIT)
    assert card.reserve(750 * MIB)
    assert card.processes() == {os.getpid(): CONTEXT + 750 * MIB}


def lock_is_free(card: SharedCard) -> bool:
    with card.path.with_name("card.lock").open("r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_call_within_a_call_does_not_let_other_processes_in(
    card: SharedCard, new_member: Callable[[], Member]
) -> None:
    assert lock_is_free(card)
    assert new_member().ask("hold_the_lock()") == "0"
    assert not lock_is_free(card)


def test_the_lock_of_a_killed_process_is_not_kept_by_its_forked_child(
    card: SharedCard, new_member: Callable[[], Member]
) -> None:
    member = new_member()
    child = int(member.ask("fork_and_hold_the_lock()"))
    assert not lock_is_free(card)
    member.process.kill()
    member.process.wait()
    assert lock_is_free(card)
    os.kill(child, signal.SIGKILL)


def test_a_process_killed_at_any_moment_leaves_neither_a_lock_nor_bytes(
    card: SharedCard, new_member: Callable[[], Member]
) -> None:
    members = [new_member() for _ in range(8)]
    for number, member in enumerate(members):
        assert member.ask("card.join()") == "True"
        member.begin("churn(10**9, 1)")
        time.sleep(0.003 * number)
        member.process.kill()
        member.process.wait()
        assert card.free() == TOTAL


def test_a_process_that_got_the_number_of_a_dead_one_neither_is_it_nor_pays_for_it(
    card: SharedCard, new_member: Callable[[], Member]
) -> None:
    member = new_member()
    assert member.ask("card.join(), card.reserve(9)") == "(True, True)"
    member.end()
    card._words[card_module._HEADER + card_module._PID] = os.getpid()
    assert card.processes() == {}
    assert card.join()
    assert card.processes() == {os.getpid(): CONTEXT}


def can_unshare() -> bool:
    tried = [*UNSHARE, "true"]
    return bool(shutil.which("unshare")) and subprocess.run(tried, check=False).returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="pid namespaces cannot be made here")
def test_processes_of_several_pid_namespaces_share_the_card(
    card: SharedCard, new_member: Callable[..., Member]
) -> None:
    card.join()
    one, other = new_member(*UNSHARE), new_member(*UNSHARE)
    for member, size in ((one, 300 * MIB), (other, 200 * MIB)):
        assert member.ask(f"os.getpid(), card.join(), card.reserve({size})") == "(1, True, True)"
    # Each calls itself 1, and sees none of the others; from here all are seen.
    assert sorted(card.processes().values()) == [CONTEXT, CONTEXT + 200 * MIB, CONTEXT + 300 * MIB]
    assert all(Path("/proc", str(pid)).exists() for pid in card.processes())
    assert one.ask("card.processes()") == str({1: CONTEXT + 300 * MIB})
    assert card.free() == TOTAL - 3 * CONTEXT - 500 * MIB
    assert not card.reserve(201 * MIB)
    assert one.ask(f"card.release({100 * MIB}), card.reserve({100 * MIB})") == "(None, True)"
    one.end()  # with unshare its namespace, which nobody else can look into
    end = time.monotonic() + 10
    while card.free() != TOTAL - 2 * CONTEXT - 200 * MIB:  # the kill goes on from unshare
        assert time.monotonic() < end
        time.sleep(0.01)
    assert other.ask("card.processes()") == str({1: CONTEXT + 200 * MIB})


def test_closing_one_opening_leaves_the_slot_of_another(
    card: SharedCard, new_member: Callable[[], Member]
) -> None:
    member = new_member()
    other = "(lambda other: (other.join(), card.join(), other.close()))(SharedCard.open(card.path))"
    assert member.ask(other) == "(True, True, None)"
    assert card.processes() == {member.pid: CONTEXT}


@pytest.mark.parametrize(
    ("work", "answer"),
    [
        ("card.joined", "False"),
        ("card.reserve(1)", "False"),
        ("card.release(1)", "None"),
        ("card.leave()", "None"),
        ("card.close()", "None"),
        ("card.free()", str(TOTAL - CONTEXT - 9)),
        (
            "card.join()",
            "RuntimeError('the parent of this forked process had joined the simulated card')",
        ),
    ],
)
def test_a_forked_child_is_not_its_parent(
    card: SharedCard, new_member: Callable[[], Member], work: str, answer: str
) -> None:
    member = new_member()
    assert member.ask("card.join(), card.reserve(9)") == "(True, True)"
    assert member.ask(f"in_forked_child(lambda: {work})") == answer
    assert card.processes() == {member.pid: CONTEXT + 9}
    assert member.ask("card.joined, card.reserve(1)") == "(True, True)"


def test_a_forked_child_joins_for_itself_when_its_parent_had_not(
    card: SharedCard, new_member: Callable[[], Member]
) -> None:
    member = new_member()
    told = member.ask("in_forked_child(lambda: (card.join(), list(card.processes().values())))")
    assert told == f"(True, [{CONTEXT}])"
    assert card.processes() == {}


def test_a_child_forked_while_a_thread_uses_the_card_can_use_it(
    new_member: Callable[[], Member],
) -> None:
    assert new_member().ask("fork_beside_a_busy_thread(30)") == str({str(TOTAL)})


def test_an_object_collected_in_the_middle_of_a_call_may_use_the_card(
    card: SharedCard, new_member: Callable[[], Member]
) -> None:
    member = new_member()
    member.ask("card.join()")
    told = member.ask("collect_in_the_middle_of_calls(200)")
    assert told == str({member.pid: CONTEXT})


def test_processes_go_on_sharing_a_card_whose_file_was_removed(
    tmp_path: Path, new_member: Callable[[], Member], card: SharedCard
) -> None:
    member = new_member()
    assert member.ask(f"card.join(), card.reserve({700 * MIB})") == "(True, True)"
    shutil.rmtree(tmp_path)
    assert card.join()
    assert not card.reserve(200 * MIB)
    assert member.ask("card.leave()") == "None"
    assert card.reserve(200 * MIB)
    assert not tmp_path.exists()


def test_the_slots_of_dead_processes_are_used_again(
    card: SharedCard, new_member: Callable[[], Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card_module, "_MAX_PROCESSES", 1)
    member = new_member()
    assert member.ask("card.join()") == "True"
    member.end()
    assert card.join()


def test_one_process_too_many_is_told_so(card: SharedCard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_module, "_MAX_PROCESSES", 1)
    card.join()
    other = SharedCard.open(card.path)
    with pytest.raises(RuntimeError, match="1 processes use the simulated card"):
        other.join()
    other.close()


def test_two_openings_in_one_process_share_the_capacity_too(card: SharedCard) -> None:
    other = SharedCard.open(card.path)
    assert card.join()
    assert other.join()
    assert other.reserve(TOTAL - 2 * CONTEXT)
    assert not card.reserve(1)
    assert card.processes() == {os.getpid(): TOTAL}
    other.close()
    assert card.processes() == {os.getpid(): CONTEXT}


def test_closing_leaves_the_card_and_closes_every_file(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    card = SharedCard.create(tmp_path / "card", total=TOTAL, context=CONTEXT)
    other = SharedCard.open(card.path)
    card.join()
    card.close()
    card.close()
    assert other.free() == TOTAL
    other.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(
    "sizes",
    [{"total": 0, "context": 0}, {"total": 5, "context": -1}, {"total": 5, "context": 6}],
    ids=str,
)
def test_sizes_that_make_no_card_are_refused(tmp_path: Path, sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the total must be above 0"):
        SharedCard.create(tmp_path / "card", **sizes)
    assert list(tmp_path.iterdir()) == []


def test_a_card_is_not_created_over_another_file(card: SharedCard) -> None:
    with pytest.raises(ValueError, match="exists already"):
        SharedCard.create(card.path, total=1, context=0)


def test_opening_nothing_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no simulated card at .*nowhere"):
        SharedCard.open(tmp_path / "nowhere")


def test_opening_another_file_is_told_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("no card at all")
    with pytest.raises(ValueError, match="text is not the file of a simulated card"):
        SharedCard.open(path)
