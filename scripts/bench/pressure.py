"""A store that fills up, beside a plain directory of torch.save files.

Records of one embedding each (384 numbers and a few plain values) are put in batches into both;
the plain files are synced too. After each batch: bytes on the disk, resident memory for each
record, the latency of a put and of a get, and the store's health. The store has a quota of
``--fill`` of what all records would take: whenever it refuses, the oldest states are forgotten
until a fifth is free, which is a maintenance event, and the record is put again.

Prints a table in Markdown; ``--plot FILE.svg`` draws it.
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pytest_gpumem.archive.store import ArchiveStore
from pytest_gpumem.errors import QuotaError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

READ = 100
"""Records that are read after each batch."""
SPARE = 0.8
"""Part of the quota that is kept when it is full."""


class Event(NamedTuple):
    """What happened when the quota was reached."""

    records: int
    forgotten: int
    freed: int
    seconds: float
    health_before: float
    health_after: float


class Batch(NamedTuple):
    """What was measured after a batch; times in seconds, sizes in bytes."""

    records: int
    kept: int
    stored: float
    """For each record that is kept."""
    disk: float
    """The same in blocks of the file system, with everything around it."""
    plain_disk: float
    memory: float
    """Resident memory that was added since the beginning, for each record that is kept."""
    put: float
    put_99: float
    plain_put: float
    get: float
    plain_get: float
    find: float
    health: float


def record(number: int) -> dict[str, Any]:
    """Return a record."""
    generator = torch.Generator().manual_seed(number)
    vector = torch.nn.functional.normalize(torch.randn(384, generator=generator), dim=0)
    return {"embedding": vector, "number": number, "text": f"the sentence of number {number}"}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that ``work`` took, and what it returned."""
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def plain_write(path: Path, data: Any) -> None:
    """Write a file with torch.save, synced."""
    with path.open("wb") as opened:
        torch.save(data, opened)
        opened.flush()
        os.fsync(opened.fileno())


def on_disk(folder: Path) -> int:
    """Return the bytes of the blocks that the files of ``folder`` take."""
    return sum(each.stat().st_blocks * 512 for each in folder.rglob("*") if each.is_file())


def resident() -> int:
    """Return the bytes of resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Pressure:
    """One run."""

    def __init__(self, folder: Path, records: int, fill: float) -> None:
        self.plain = folder / "plain"
        self.plain.mkdir()
        self.store = ArchiveStore(folder / "store", key=b"k" * 32)
        probe = self.store.put(record(-1))
        each = self.store.stored(self.store.entry(probe))
        self.store.delete(probe)
        self.store.quota = int(each * records * fill)
        self.ids: dict[str, int] = {}
        self.events: list[Event] = []
        self.before = resident()

    def batch(self, first: int, size: int) -> Batch:
        """Put ``size`` records from the number ``first`` on."""
        puts, plain = [], []
        for number in range(first, first + size):
            data = record(number)
            seconds, name = timed(functools.partial(self.put, data))
            puts.append(seconds)
            self.ids[name] = number
            path = self.plain / f"{number}.pt"
            plain.append(timed(functools.partial(plain_write, path, data))[0])
        memory = resident() - self.before
        find, entries = timed(lambda: self.store.find(type="state"))
        kept = {entry.id for entry in entries}
        self.ids = {name: number for name, number in self.ids.items() if name in kept}
        gets, plain_gets = [], []
        for name in random.Random(first).sample(sorted(self.ids), READ):  # noqa: S311  # a sample
            number = self.ids[name]
            seconds, found = timed(functools.partial(self.store.get, name))
            gets.append(seconds)
            seconds, other = timed(functools.partial(torch.load, self.plain / f"{number}.pt"))
            plain_gets.append(seconds)
            assert torch.equal(found["embedding"], other["embedding"])  # noqa: S101  # worthless else
        return Batch(
            records=first + size,
            kept=len(kept),
            stored=self.store.stats()[None].stored / len(kept),
            disk=on_disk(self.store.path) / len(kept),
            plain_disk=on_disk(self.plain) / (first + size),
            memory=memory / len(kept),
            put=statistics.median(puts),
            put_99=statistics.quantiles(puts, n=100)[98],
            plain_put=statistics.median(plain),
            get=statistics.median(gets),
            plain_get=statistics.median(plain_gets),
            find=find,
            health=self.store.health().score,
        )

    def put(self, data: Any) -> str:
        """Put a record, and make room for it if there is none."""
        try:
            return self.store.put(data)
        except QuotaError:
            before = self.store.health().score
            keep = int((self.store.quota or 0) * SPARE)
            seconds, done = timed(lambda: self.store.forget(max_stored=keep))
            after = self.store.health().score
            event = Event(data["number"], done.decayed, done.freed, seconds, before, after)
            self.events.append(event)
            return self.store.put(data)


def plot(batches: Sequence[Batch], path: Path) -> None:
    """Draw the batches as an SVG: a panel for each measure."""
    panels = [
        ("on the disk, bytes for each record", {"store": "disk", "plain": "plain_disk"}, 1.0),
        ("memory, bytes for each record", {"store": "memory"}, 1.0),
        ("put, ms (median)", {"store": "put", "plain": "plain_put"}, 1e3),
        ("get, ms (median)", {"store": "get", "plain": "plain_get"}, 1e3),
        ("find, ms", {"store": "find"}, 1e3),
        ("health", {"store": "health"}, 1.0),
    ]
    wide, high, last = 360, 120, batches[-1].records
    parts = []
    for at, (title, lines, scale) in enumerate(panels):
        x, y = at % 2 * (wide + 40) + 20, at // 2 * (high + 50) + 30
        values = {
            name: [getattr(batch, field) * scale for batch in batches]
            for name, field in lines.items()
        }
        top = max(max(each) for each in values.values()) or 1.0
        parts.append(f'<text x="{x}" y="{y - 8}">{title}; top: {top:.4g}</text>')
        parts.append(f'<rect x="{x}" y="{y}" width="{wide}" height="{high}" class="frame"/>')
        for name, each in values.items():
            points = " ".join(
                f"{x + wide * batch.records / last:.1f},{y + high * (1 - max(v, 0) / top):.1f}"
                for batch, v in zip(batches, each, strict=True)
            )
            parts.append(f'<polyline points="{points}" class="{name}"/>')
    style = (
        "text{font:12px sans-serif}.frame{fill:none;stroke:#999}"
        "polyline{fill:none;stroke-width:2}.store{stroke:#06c}.plain{stroke:#c60}"
    )
    size = f'width="{2 * wide + 80}" height="{3 * (high + 50) + 20}"'
    text = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>'
    path.write_text(text + "".join(parts) + "</svg>\n")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-records", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=1000)
    parser.add_argument("--fill", type=float, default=0.6)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    options = parser.parse_args()
    print(
        f"{dt.date.today()}, {os.cpu_count()} CPUs, Linux {platform.release()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}; {options.max_records} records "
        f"in batches of {options.batch_size}, quota for {options.fill:.0%} of them\n"
    )
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        pressure = Pressure(Path(directory), options.max_records, options.fill)
        print(
            "| records | kept | file | on disk | plain | memory/record | put ms (99 %) | plain "
            "| get ms | plain | find ms | health |"
        )
        print("|---" * 12 + "|")
        batches = []
        for first in range(0, options.max_records, options.batch_size):
            each = pressure.batch(first, min(options.batch_size, options.max_records - first))
            batches.append(each)
            print(
                f"| {each.records} | {each.kept} | {each.stored:.0f} B | {each.disk:.0f} B "
                f"| {each.plain_disk:.0f} B | {each.memory:.0f} B | {each.put * 1e3:.2f} "
                f"({each.put_99 * 1e3:.1f}) | {each.plain_put * 1e3:.2f} | {each.get * 1e3:.2f} "
                f"| {each.plain_get * 1e3:.2f} | {each.find * 1e3:.1f} | {each.health:.2f} |",
                flush=True,
            )
        print(f"\nMaintenance events: {len(pressure.events)}")
        for event in pressure.events:
            print(
                f"- at record {event.records}: {event.forgotten} forgotten, {event.freed} B freed "
                f"in {event.seconds:.2f} s, health {event.health_before:.2f} to "
                f"{event.health_after:.2f}; the refused record was put then"
            )
        seconds, problems = timed(lambda: pressure.store.verify(read_data=True))
        print(f"\nverify --read-data at the end: {len(problems)} problems, {seconds:.1f} s")
    if options.plot is not None:
        plot(batches, options.plot)


if __name__ == "__main__":
    main()
