"""The book in which children tell what they hold, with real processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from pytest_gpumem.devices import family
from pytest_gpumem.devices.allocator import AllocatorReading
from pytest_gpumem.devices.book import NOBODY, Book, key, left_behind

MIB = 2**20
CARD = "GPU-book"
ROOT = """
import sys
from pathlib import Path
from pytest_gpumem.devices.book import Book
print(Book.create(Path(sys.argv[1]), 5).path, flush=True)
sys.stdin.read()
"""
CHILD = """
import sys
from pathlib import Path
from pytest_gpumem.devices.allocator import AllocatorReading
from pytest_gpumem.devices.book import Book
page = Book(Path(sys.argv[1])).join(int(sys.argv[2]), sys.argv[3])
for line in sys.stdin:
    now, peak = map(int, line.split())
    page.tell(0, "GPU-book", AllocatorReading(now, peak, now, peak, 0, 0))
    print("told", flush=True)
"""


UNSHARE = ("unshare", "--pid", "--fork", "--kill-child")
"""A pid namespace of its own, in which the member is 1."""


class Member:
    def __init__(self, book, owner, name="", before=()):
        self.process = subprocess.Popen(
            [*before, sys.executable, "-c", CHILD, str(book.path), str(owner), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, now, peak):
        self.process.stdin.write(f"{now} {peak}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "told\n"

    def end(self, number=None):
        if number is None:
            self.process.stdin.close()
        else:
            self.process.send_signal(number)
        self.process.wait()
        self.process.stdout.close()
        self.process.stdin.close()


@pytest.fixture
def book(tmp_path):
    book = Book.create(tmp_path / "families", 5)
    yield book
    book.remove()


@pytest.fixture
def member(book):
    found = []

    def start(owner, name="", before=()):
        found.append(Member(book, owner, name, before))
        return found[-1]

    yield start
    for each in found:
        each.end()


def figures(book):
    return {told.pid: (told.lives, *told.cards[key(CARD)][:6]) for told in book.read()}


def test_what_a_killed_child_told_stays_until_it_is_struck(book, member):
    one = member(7, "test_x")
    one.tell(10, 30)
    one.end(signal.SIGKILL)
    (told,) = book.read()
    assert (told.owner, told.name, told.lives) == (7, "test_x", False)
    assert told.pid == one.process.pid
    assert told.cards[key(CARD)][:4] == (10, 30, 10, 30)
    assert "python" in told.command
    book.strike(told.slot)
    assert book.read() == []
    assert not book.used


def test_the_highest_sum_of_one_owners_children_is_that_of_one_moment(book, member):
    first, second, other = member(1), member(1), member(2)
    first.tell(100, 100)
    first.tell(20, 100)
    other.tell(500, 500)
    second.tell(60, 70)  # 90 at one moment, and 100 before
    assert figures(book)[second.process.pid] == (True, 60, 70, 60, 70, 90, 70 + 20 + 2 * 5)
    assert figures(book)[other.process.pid][5] == 500
    first.end(signal.SIGKILL)
    second.tell(95, 95)  # alone by now
    assert figures(book)[second.process.pid][5] == 95


def test_a_living_child_is_not_struck(book, member):
    one = member(1)
    one.tell(1, 1)
    (told,) = book.read()
    book.strike(told.slot)
    assert [each.slot for each in book.read()] == [told.slot]


def test_names_of_any_length_and_script_are_told_as_far_as_there_is_room(book, member):
    one = member(1, "tést_" * 100)
    one.tell(1, 1)
    (told,) = book.read()
    assert ("tést_" * 100).startswith(told.name)
    assert len(told.name) > 150


def test_children_of_a_process_that_was_killed_are_found_and_its_book_goes_with_the_last(tmp_path):
    directory = tmp_path / "families"
    root = subprocess.Popen(
        [
            sys.executable,
            "-c",
            ROOT,
            str(directory),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with root:
        path = root.stdout.readline().strip()
        book = Book(type(tmp_path)(path))
        child = Member(book, 3, "test_of_killed")
        child.tell(4, 4)
        assert left_behind(directory) == []
        root.kill()
    assert [told.name for told in left_behind(directory)] == ["test_of_killed"]
    child.end()
    book.close()
    assert left_behind(directory) == []
    assert list(directory.iterdir()) == []


def test_a_file_of_another_form_is_refused(tmp_path):
    path = tmp_path / "book"
    path.write_bytes(bytes(4096))
    with pytest.raises(ValueError, match="form"):
        Book(path)
    assert left_behind(tmp_path) == []


def test_who_names_no_starter_is_his_who_runs_if_it_began_since(book, member):
    now = time.clock_gettime(family.CLOCK)
    for number, since in ((12, now), (13, now + 3600)):
        book.runs(number, since)
        member(NOBODY).tell(1, 1)
    assert [told.owner for told in book.read()] == [12, NOBODY]


@pytest.mark.skipif(
    not shutil.which("unshare") or bool(subprocess.run([*UNSHARE, "true"], check=False).returncode),
    reason="pid namespaces cannot be made here",
)
def test_a_child_in_a_pid_namespace_of_its_own_has_the_number_that_is_seen_from_here(book, member):
    one = member(1, before=UNSHARE)
    one.tell(1, 1)
    (told,) = book.read()
    assert family.lineage(told.pid)[1] == family.identity(one.process.pid)


def test_a_reading_of_a_ninth_card_is_left_out(book):
    page = book.join(1, "")
    page.tell(8, "GPU-ninth", AllocatorReading(1, 1, 1, 1, 0, 0))
    assert [told.cards for told in book.read() if told.pid == os.getpid()] == [{}]


FULL = """
import os, sys
from pathlib import Path
from pytest_gpumem.devices.book import Book

book = Book.create(Path(sys.argv[1], "books"), 5)
try:
    with open(Path(sys.argv[1], "full"), "wb", buffering=0) as file:
        while True: file.write(bytes(4096))
except OSError:
    pass

def join():
    said = "joined"
    try: Book(book.path).join(1, "test_a")
    except OSError as error: said = error.strerror
    os.write(1, f"{said}\\n".encode())
    sys.stdin.read()
    os._exit(0)

children = [os.fork() or join() for _ in range(8)]
print({os.waitpid(child, 0)[1] for child in children})
"""
OWN_MOUNTS = ("unshare", "--user", "--map-root-user", "--mount")


def can_mount() -> bool:
    tried = [*OWN_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return bool(shutil.which("unshare")) and not subprocess.run(tried, check=False).returncode


@pytest.mark.skipif(not can_mount(), reason="nothing can be mounted here")
def test_a_full_file_system_costs_a_child_its_page_and_not_its_life(tmp_path):
    # More than fit on the page of memory that the book has had from the first.
    mount = f"mount -t tmpfs -o size=256k tmpfs {tmp_path}"
    command = [*OWN_MOUNTS, "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable]
    done = subprocess.run(
        [*command, "-c", FULL, str(tmp_path)],
        input="",
        capture_output=True,
        text=True,
        check=True,
    )
    *said, statuses = done.stdout.splitlines()
    assert {*said} == {"joined", "No space left on device"}
    assert statuses == "{0}"
