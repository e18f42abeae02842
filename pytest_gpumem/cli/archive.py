"""The command ``gpumem archive …``: keys, and a look into the store."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gpumem.cli.arguments import read_count, read_size
from pytest_gpumem.errors import ArchiveError, DiskError, NotFoundError
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.archive.catalogue import Entry
    from pytest_gpumem.archive.store import ArchiveStore

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def add_parser(commands: Any) -> None:
    """Add the command and its actions."""
    parser = commands.add_parser("archive", help="Look after archives of model state.")
    parser.add_argument("--store", type=Path, metavar="DIR", help="Default: $GPUMEM_ARCHIVE.")
    parser.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        help="Default: $GPUMEM_ARCHIVE_KEY_FILE, or one of the user's own.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text)
        return made

    action("keygen", "Make a key file, if there is none.")
    rotate = action("rotate", "Put a new key before the others; archives stay as they are.")
    rotate.add_argument("--new-key-file", type=Path, metavar="FILE", help="Use this key instead.")
    listing = action("list", "List what was archived, oldest first.")
    for name in ("type", "context", "tag"):
        listing.add_argument(f"--{name}")
    listing.add_argument("--since", type=_age, metavar="AGE", help="Such as 30m, 12h or 7d.")
    listing.add_argument("--until", type=_age, metavar="AGE")
    action("show", "Show an entry and its tensors.").add_argument("id")
    action("delete", "Remove an entry.").add_argument("id", nargs="+")
    export = action("export", "Write a state to a file that torch.load reads, not encrypted.")
    export.add_argument("id")
    export.add_argument("file", type=Path)
    forget = action("forget", "Remove what these rules do not keep.")
    forget.add_argument("--older-than", type=_age, metavar="AGE", help="Such as 30m, 12h or 7d.")
    forget.add_argument("--keep-last", type=read_count, metavar="N")
    forget.add_argument("--max-size", type=read_size, metavar="SIZE")
    forget.add_argument("--type")
    forget.add_argument("--context")
    forget.add_argument("--dry-run", action="store_true", help="Only say what it would do.")
    action("stats", "Say what each context holds, and give an anchor for verify --since.")
    verify = action("verify", "Make sure that everything can be restored.")
    verify.add_argument("--read-data", action="store_true", help="Read every byte.")
    verify.add_argument(
        "--since", metavar="ANCHOR", help="And that the store was not put back to before it."
    )
    action("health", "Say how the store is.")


def run(chosen: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of an action.

    Raises:
        ValueError: in one sentence, for what cannot be done.

    """
    from pytest_gpumem.archive import keys
    from pytest_gpumem.archive.store import ArchiveStore

    try:
        if chosen.action == "keygen":
            yield from _keygen(chosen.key_file or keys.default_file())
        else:
            store = ArchiveStore(chosen.store, key=chosen.key_file, make=False)
            yield from _ACTIONS[chosen.action](store, chosen)
    except ArchiveError as error:
        raise ValueError(str(error)) from None


def _keygen(file: Path) -> Iterator[str]:
    from pytest_gpumem.archive import keys

    there = file.exists()
    if not there:
        keys.generate(file)
    found = keys.find(file)
    said = "there was one already" if there else "keep a copy: without it nothing can be restored"
    yield f"{file}: {len(found.keys)} key{'s' * (len(found.keys) > 1)}; {said}"


def _rotate(store: ArchiveStore, chosen: argparse.Namespace) -> Iterator[str]:
    store.rotate(chosen.new_key_file)
    yield f"{store.path} is sealed under the first key of {store.keys.source}"
    if len(store.keys.keys) > 1:
        yield "older keys stay in the file for other stores; delete their lines when there are none"


def _list(store: ArchiveStore, chosen: argparse.Namespace) -> Iterator[str]:
    now = time.time()
    entries = store.find(
        type=chosen.type,
        context=chosen.context,
        tag=chosen.tag,
        since=None if chosen.since is None else now - chosen.since,
        until=None if chosen.until is None else now - chosen.until,
    )
    for entry in entries:
        tags = " ".join(f"#{tag}" for tag in entry.tags)
        size = f"{format_bytes(entry.size):>10}"
        line = f"{entry.id}  {_when(entry)}  {size}  {entry.type}  {entry.context}  {tags}"
        yield line.rstrip()
    if not entries:
        yield "nothing"


def _show(store: ArchiveStore, chosen: argparse.Namespace) -> Iterator[str]:
    entry = store.entry(chosen.id)
    yield f"id        {entry.id}"
    yield f"type      {entry.type}"
    yield f"context   {entry.context}"
    yield f"tags      {' '.join(entry.tags)}".rstrip()
    yield f"metadata  {entry.metadata}"
    yield f"created   {_when(entry)}"
    yield f"size      {format_bytes(entry.size)}, stored in {format_bytes(store.stored(entry))}"
    for path, dtype, shape in store.tensors(entry.id):
        yield f"  {path}  {dtype}  {list(shape)}"


def _delete(store: ArchiveStore, chosen: argparse.Namespace) -> Iterator[str]:
    for each in chosen.id:
        store.delete(each)
        yield f"{each} is removed"


def _export(store: ArchiveStore, chosen: argparse.Namespace) -> Iterator[str]:
    import torch

    from pytest_gpumem.archive.disk import explained

    state = store.get(chosen.id)
    try:
        with explained("write", chosen.file), chosen.file.open("xb") as out:
            torch.save(state, out)
    except DiskError as error:
        if isinstance(error.__cause__, FileExistsError):
            there = f"{str(chosen.file)!r} is there already; it is not overwritten"
            raise NotFoundError(there) from None
        raise
    yield f"{chosen.file}: {format_bytes(chosen.file.stat().st_size)}, not encrypted"


def _forget(store: ArchiveStore, chosen: argparse.Namespace) -> Iterator[str]:
    rules = (chosen.older_than, chosen.keep_last, chosen.max_size)
    if all(rule is None for rule in rules):
        raise NotFoundError("no rule is given: --older-than, --keep-last or --max-size")
    done = store.forget(
        older_than=chosen.older_than,
        keep_last=chosen.keep_last,
        max_stored=chosen.max_size,
        type=chosen.type,
        context=chosen.context,
        dry_run=chosen.dry_run,
    )
    would = "would be " if chosen.dry_run else ""
    yield (
        f"{done.decayed} entries {would}decayed, {done.removed} states {would}removed, "
        f"{format_bytes(done.freed)} {would}freed"
    )


def _stats(store: ArchiveStore, _: argparse.Namespace) -> Iterator[str]:
    yield f"{'entries':>8} {'states':>8} {'size':>12} {'stored':>12}  context"
    for context, each in store.stats().items():
        yield (
            f"{each.entries:>8} {each.states:>8} {format_bytes(each.size):>12} "
            f"{format_bytes(each.stored):>12}  {'(all)' if context is None else context}"
        )
    yield f"anchor: {store.anchor()}"


def _verify(store: ArchiveStore, chosen: argparse.Namespace) -> Iterator[str]:
    problems = store.verify(read_data=chosen.read_data, since=chosen.since, progress=_progress)
    for problem in problems:
        yield f"{problem.name}: {problem.what}"
    if problems:
        raise NotFoundError(f"{len(problems)} problem{'s' * (len(problems) > 1)}")
    read = "every byte was read" if chosen.read_data else "--read-data reads every byte"
    yield f"{len(store.entries())} entries can be restored; {read}"


def _health(store: ArchiveStore, _: argparse.Namespace) -> Iterator[str]:
    health = store.health()
    yield f"score {health.score:.2f}, {health.fill:.0%} full"
    for problem in health.problems:
        yield f"{problem.name}: {problem.what}"


def _progress(done: int, total: int) -> None:
    """Draw a bar on a terminal."""
    if sys.stderr.isatty():
        part = done / total if total else 1.0
        bar = f"{'#' * int(30 * part):<30} {part:4.0%} of {format_bytes(total)}"
        sys.stderr.write(f"\r{bar}{'' if done < total else chr(10)}")
        sys.stderr.flush()


def _when(entry: Entry) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.created))


def _age(text: str) -> float:
    match = re.fullmatch(r"(\d+)([smhdw])", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an age; allowed are such as 30m, 12h, 7d"
        )
    return int(match[1]) * _SECONDS[match[2]]


_ACTIONS = {
    "rotate": _rotate,
    "list": _list,
    "show": _show,
    "delete": _delete,
    "export": _export,
    "forget": _forget,
    "stats": _stats,
    "verify": _verify,
    "health": _health,
}
