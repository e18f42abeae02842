"""``gpumem run`` and ``gpumem ps``, as a shell and a terminal use them."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

import pytest

from pytest_gpumem.cli import main as cli
from pytest_gpumem.devices import host
from pytest_gpumem.simulator import Simulation

MIB = 2**20
GPUMEM = [sys.executable, "-m", "pytest_gpumem.cli.main"]
TAKES = """
import os, sys, time
from pathlib import Path
from pytest_gpumem.simulator.card import SharedCard
card = SharedCard.open(Path(os.environ["GPUMEM_SIMULATE_CARD"]))
assert card.join() and card.reserve(int(sys.argv[1]) << 20), "out of memory"
sys.stdout.write("took\\n"); sys.stdout.flush()
end = time.monotonic() + 60
while time.monotonic() < end and not os.path.exists(sys.argv[2]):
    time.sleep(0.02)
"""
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--mount-proc"]


def takes(mib, until="/dev/null"):
    """Return a command that has so many MiB of the card, beside a context of 100, for a time."""
    return [sys.executable, "-c", TAKES, str(mib), str(until)]


@pytest.fixture
def card(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("GPUMEM", "PYTEST_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GPUMEM_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    simulation = Simulation.start([1000 * MIB], 100 * MIB)
    monkeypatch.setenv("GPUMEM_SIMULATE_CARD", simulation.path)
    yield simulation.cards[0]
    simulation.close()


def gpumem(*arguments, **more):
    return subprocess.run(
        [*GPUMEM, *map(str, arguments)], capture_output=True, text=True, check=False, **more
    )


def run(*arguments, vram="100MiB", **more):
    return gpumem("run", f"--vram={vram}", *arguments, **more)


@contextmanager
def running(*arguments, before=(), **more):
    """Start ``gpumem run`` and end whatever is left of its group."""

    def heed() -> None:
        """Heed what is ignored where these tests run in the background of a shell."""
        for each in (signal.SIGINT, signal.SIGQUIT):
            signal.signal(each, signal.SIG_DFL)

    process = subprocess.Popen(
        [*before, *GPUMEM, "run", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=heed, **more,  # noqa: PLW1509  # no thread here holds a lock
    )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def holders():
    """Return whom ``gpumem ps --json`` names."""
    told = io.StringIO()
    with redirect_stdout(told):
        assert cli.main(["ps", "--json"]) == 0
    return [holder for state in json.loads(told.getvalue()) for holder in state["holders"]]


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (["exit 7"], 7, "was not seen on Simulated CUDA card; asked for: 100.00 MiB; waited 0.0"),
        (["kill -9 $$"], 137, "ran 0."),
    ],
)
def test_the_status_is_the_commands(card, command, status, said):
    done = run("--", "sh", "-c", *command)
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("--vram=1MiB -- no-such-program", 127, "cannot run 'no-such-program': No such file"),
        ("--vram=1MiB -- /no/such", 127, "cannot run '/no/such': No such file"),
        ("--vram=1MiB -- /dev/null/x", 126, "cannot run '/dev/null/x': Not a directory"),
        ("--vram=1MiB -- /etc", 126, "cannot run '/etc': Permission denied"),
        ("--vram=1MiB", 2, "there is no command; it comes after --"),
        ("-- true", 2, "there is nothing to lease: --vram, --ram or both say how much"),
        ("--card=0 --ram=1MiB -- true", 2, "--card: nothing is leased of a card without --vram"),
        ("--ram=all -- true", 2, "'all' is not a size"),
        ("--ram=0 -- true", 2, "'0' is not a size"),
        ("--ram=9999TiB -- true", 125, "10238976.00 GiB asked for of main memory, which has "),
        ("--vram=-1 -- true", 2, "'-1' is not a size; allowed is"),
        ("--vram=1MiB --timeout=nan -- true", 2, "'nan' is no time; allowed are 0 or more"),
        ("--vram=1MiB --priority=high -- true", 2, "invalid choice: 'high'"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(capsys, words, status, said):
    try:
        found = cli.main(["run", *words.split()])
    except SystemExit as error:
        found = error.code
    text = capsys.readouterr().err
    assert found == status
    assert said in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--vram=2GiB"], "error: 2.00 GiB asked for of card GPU-"),
        (["--vram=1MiB", "--card=1"], "--card: '1' is no card that is visible; there are 0 (GPU-"),
    ],
)
def test_a_lease_that_cannot_be_had_is_one_sentence(card, options, said):
    done = gpumem("run", *options, "--", "true")
    assert done.returncode == 125
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_a_card_nothing_is_started(card, monkeypatch, tmp_path):
    monkeypatch.delenv("GPUMEM_SIMULATE_CARD")
    done = run("--", "touch", tmp_path / "x")
    assert (done.returncode, (tmp_path / "x").exists()) == (125, False)
    assert "error: there is no card to lease: " in done.stderr


def test_streams_arguments_and_files_are_the_commands_own(card, tmp_path):
    reading, writing = os.pipe()
    script = f'cat; printf "%s|" "$@"; echo err >&2; echo passed >/proc/self/fd/{writing}'
    done = run(
        "--json", tmp_path / "took.json", "--",
        "sh", "-c", script, "sh", "--", "-x", "a b", "", input="in\n", pass_fds=[writing],
    )  # fmt: skip
    os.close(writing)
    assert done.stdout == "in\n--|-x|a b||"
    assert done.stderr.startswith("err\n")
    assert os.read(reading, 100) == b"passed\n"
    os.close(reading)
    told = json.loads((tmp_path / "took.json").read_text())
    assert told["command"][3:] == ["sh", "--", "-x", "a b", ""]
    assert (told["status"], told["cards"][0]["asked"], told["cards"][0]["peak"]) == (
        0, 100 * MIB, 0,
    )  # fmt: skip


def test_a_family_is_measured_and_more_than_was_asked_for_said(card, tmp_path):
    script = f'"$@" & "{sys.executable}" -c "$3" 200 {tmp_path}/go; wait'
    words = ("--json", tmp_path / "took.json", "--vram=650MiB", "--", "sh", "-c", script, "sh")
    with running(*words, *takes(300, tmp_path / "go")) as process:
        assert [process.stdout.readline(), process.stdout.readline()] == ["took\n"] * 2
        time.sleep(0.5)  # until it has looked
        (tmp_path / "go").touch()
        assert process.wait() == 0
        said = process.stderr.read()
    (told,) = json.loads((tmp_path / "took.json").read_text())["cards"]
    assert told["peak"] == 700 * MIB
    more = "took 700.00 MiB of Simulated CUDA card, 50.00 MiB more than the 650.00 MiB it asked for"
    assert more in said


def test_commands_wait_their_turn_and_say_for_whom(card, tmp_path):
    go = tmp_path / "go"
    with running("--vram=700MiB", "--", *takes(500, go)) as first:
        assert first.stdout.readline() == "took\n"
        with running("--vram=700MiB", "--", *takes(500)) as second:
            waits = second.stderr.readline()
            late = run("--timeout=0.1", "--", "true", vram="700MiB")
            go.touch()
            assert (first.wait(), second.wait()) == (0, 0)
            assert second.stdout.read() == "took\n"
    assert waits.startswith("gpumem run: waits for 700.00 MiB of card GPU-")
    assert f"700.00 MiB held by pid {first.pid} ({sys.executable} -c" in waits
    assert late.returncode == 125
    assert "error: no lease within 0.1 s: 700.00 MiB of card GPU-" in late.stderr
    assert holders() == []


def test_what_runs_within_does_not_wait_for_itself(card, tmp_path):
    """Nor once the outer ``gpumem run`` is killed: its command's environment says whose it is."""
    inner = [*GPUMEM, "run", "--vram=600MiB", "--timeout=5", "--", *takes(400)]
    script = 'echo first; read line; exec "$@"'
    with running(
        "--vram=900MiB", "--", "sh", "-c", script, "sh", *inner, stdin=subprocess.PIPE
    ) as outer:
        assert outer.stdout.readline() == "first\n"
        os.kill(outer.pid, signal.SIGKILL)
        assert outer.wait() == -signal.SIGKILL
        (kept,) = holders()
        assert (kept["pid"], kept["vram"], kept["seen_here"]) == (outer.pid, 900 * MIB, False)
        late = run("--timeout=0", "--", "true", vram="200MiB")
        assert late.returncode == 125, late.stderr
        outer.stdin.write("\n")
        outer.stdin.flush()
        assert outer.stdout.readline() == "took\n"
        until(lambda: holders() == [])
    assert run("--timeout=0", "--", "true", vram="1000MiB").returncode == 0


def test_who_outlives_the_command_on_the_card_keeps_the_lease(card, tmp_path):
    """The wrapper script ended by a signal, its program goes on."""
    script = '"$@" & read line'
    with running(
        "--vram=600MiB",
        "--",
        "sh",
        "-c",
        script,
        "sh",
        *takes(400, tmp_path / "go"),
        stdin=subprocess.PIPE,
    ) as first:
        assert first.stdout.readline() == "took\n"
        first.stdin.close()
        first.stdin = None
        assert first.wait() == 1
        assert "goes on, keeps the lease and uses 500.00 MiB" in first.stderr.readline()
        (kept,) = holders()
        assert (kept["vram"], kept["family"][0]["used"]) == (600 * MIB, 500 * MIB)
        with running("--vram=600MiB", "--", *takes(400)) as second:
            assert "waits for 600.00 MiB" in second.stderr.readline()
            (tmp_path / "go").touch()
            assert second.wait() == 0
    assert holders() == []


HAS = """
import os, sys, time
has = bytearray(100 << 20)
sys.stdout.write("has\\n"); sys.stdout.flush()
end = time.monotonic() + 60
while time.monotonic() < end and not os.path.exists(sys.argv[1]):
    time.sleep(0.02)
"""


def test_main_memory_is_leased_measured_and_shown(card, tmp_path, capsys):
    first_go, go = tmp_path / "first", tmp_path / "go"
    size = host.host().ram * 3 // 5  # not twice, whatever others use meanwhile
    asked, command = f"--ram={size}B", [sys.executable, "-c", HAS]
    with running(asked, "--vram=100MiB", "--", *command, first_go) as first:
        first.stdout.readline()
        with running(asked, "--json", tmp_path / "took", "--", *command, go) as second:
            assert re.match(r"gpumem run: waits for .+ of main memory: ", second.stderr.readline())
            rows = [row for row in holders() if "ram" in row]
            assert [(row["state"], row["ram"]) for row in rows] == [
                ("held", size), ("waiting", size),
            ]  # fmt: skip
            assert rows[0]["family"][0]["used"] > 100 * MIB
            assert cli.main(["ps"]) == 0
            shown = capsys.readouterr().out
            assert re.search(r"(?m)^main memory: .* used\n  held +\d+\.\d+ GiB  pid ", shown)
            first.kill()  # by which its command gets the lease
            time.sleep(0.3)
            assert second.poll() is None
            first_go.touch()
            second.stdout.readline()
            go.touch()
            assert second.wait() == 0
            told = second.stderr.read()
            assert re.search(r"took 1\d\d\.\d\d MiB of main memory, asked for: ", told)
    assert json.loads((tmp_path / "took").read_text())["ram"]["peak"] > 100 * MIB


def test_who_outlives_the_command_with_much_main_memory_keeps_the_lease(card, tmp_path):
    go, told = tmp_path / "go", tmp_path / "told"
    script = f"""exec >{told} 2>&1
    sleep 1 &
    "$0" -c "$1" {go} &
    until grep -q has {told}; do sleep 0.05; done"""
    done = gpumem("run", "--ram=1GiB", "--", "sh", "-c", script, sys.executable, HAS)
    said = re.findall(r"pid (\d+) \((.*)\) goes on, keeps the lease and has 1\d\d\.", done.stderr)
    assert len(said) == 1, done.stderr
    assert said[0][1].startswith(sys.executable)
    assert [row["ram"] for row in holders() if "ram" in row] == [1024 * MIB]
    go.touch()
    until(lambda: not [row for row in holders() if "ram" in row])


def test_one_of_low_priority_lets_later_ones_go_first(card, tmp_path):
    def finished(name):
        return ["sh", "-c", f"echo {name} >> {tmp_path}/order"]

    with running("--vram=700MiB", "--", *takes(500, "never")) as first:
        first.stdout.readline()
        with running("--vram=700MiB", "--priority=low", "--", *finished("low")) as low:
            until(lambda: sum(each["state"] == "waiting" for each in holders()) == 1)
            with running("--vram=700MiB", "--", *finished("normal")) as normal:
                until(lambda: sum(each["state"] == "waiting" for each in holders()) == 2)
                os.killpg(first.pid, signal.SIGKILL)
                assert (normal.wait(), low.wait()) == (0, 0)
    assert (tmp_path / "order").read_text() == "normal\nlow\n"


TRAPS = """
import os, signal, sys, time
def hear(number, _):
    print(signal.Signals(number).name, flush=True)
for each in ("HUP", "INT", "TERM", "USR1", "USR2"):
    signal.signal(getattr(signal, "SIG" + each), hear)
print("ready", flush=True)
while True:
    time.sleep(0.01)
"""


def test_signals_are_passed_on_once(card):
    with running("--vram=100MiB", "--", sys.executable, "-c", TRAPS) as process:
        assert process.stdout.readline() == "ready\n"
        for name in ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
            process.send_signal(getattr(signal, name))
            assert process.stdout.readline() == f"{name}\n"
        assert process.poll() is None
        process.send_signal(signal.SIGQUIT)
        assert process.wait() == 128 + signal.SIGQUIT
        assert process.stdout.read() == ""


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split(maxsplit=1)[0]


def test_it_stops_and_goes_on_with_its_command_and_hears_a_terminal_once(card):
    """In a shell's job: Ctrl-Z and Ctrl-C come from the terminal, to all of its group."""
    pid, terminal = pty.fork()
    if not pid:
        os.execv(  # noqa: S606  # no shell is wanted
            sys.executable,
            [*GPUMEM, "run", "--vram=100MiB", "--", sys.executable, "-c",
             f"import os; print(os.getpid(), flush=True)\n{TRAPS}"],
        )  # fmt: skip
    shown = ""

    def read(word):
        nonlocal shown
        while word not in shown:
            shown += os.read(terminal, 1000).decode()

    read("ready")
    child = int(shown.split(maxsplit=1)[0])
    os.write(terminal, b"\x03")
    read("SIGINT")
    # Who has no shell around it is in an orphaned group, which a terminal does not stop.
    os.kill(pid, signal.SIGTSTP)
    if state_of(child) != "T":
        os.kill(child, signal.SIGSTOP)
    until(lambda: (state_of(pid), state_of(child)) == ("T", "T"))
    os.kill(pid, signal.SIGCONT)
    until(lambda: "T" not in (state_of(pid), state_of(child)))
    os.kill(pid, signal.SIGUSR1)
    read("SIGUSR1")
    assert shown.count("SIGINT") == 1
    os.kill(pid, signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(terminal)


def test_a_request_that_is_ended_while_it_waits_leaves_nothing(card):
    with running("--vram=700MiB", "--", *takes(500, "never")) as first:
        first.stdout.readline()
        for number in (signal.SIGINT, signal.SIGTERM):
            with running("--vram=700MiB", "--", "true") as waiting:
                assert "waits for" in waiting.stderr.readline()
                waiting.send_signal(number)
                assert waiting.wait() == 128 + number
                assert waiting.stderr.read() == ""
            assert [each["state"] for each in holders()] == ["held"]


SUITE = """
import pytest
from pytest_gpumem import gpu_lease

@pytest.mark.gpu(vram="300MiB")
def test_a(gpumem):
    open("go", "w").close()
    import time
    for _ in range(1000):
        if __import__("os").path.exists("seen"):
            break
        time.sleep(0.02)
"""


def test_ps_tells_tests_commands_and_their_families(card, tmp_path, capsys):
    (tmp_path / "test_it.py").write_text(SUITE)
    assert cli.main(["ps"]) == 0
    assert capsys.readouterr().out == "nobody holds or waits for a card or main memory\n"
    tests = [
        sys.executable, "-m", "pytest", "-q", "-p", "gpumem", "-p", "xdist", "-n1",
        "-p", "no:cacheprovider", "test_it.py",
    ]  # fmt: skip
    quiet = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    suite = subprocess.Popen(tests, cwd=tmp_path, env=quiet, stdout=subprocess.PIPE)
    until((tmp_path / "go").exists)
    with running(
        "--vram=400MiB", "--", "sh", "-c", '"$@"; :', "sh", *takes(200, "never")
    ) as command:
        assert command.stdout.readline() == "took\n"
        with running("--vram=900MiB", "--", "true") as waiting:
            until(lambda: len(holders()) == 3)
            test, held, request = holders()
            cli.main(["ps"])
            text = capsys.readouterr().out
            (tmp_path / "seen").touch()
            command.kill()
            suite.communicate()
    assert suite.returncode == 0
    assert (test["kind"], test["what"], test["worker"]) == ("test", "test_it.py::test_a", "gw0")
    assert test["run"] == suite.pid
    assert (held["kind"], held["state"], held["pid"]) == ("program", "held", command.pid)
    assert [each["used"] for each in held["family"]] == [300 * MIB]
    assert held["family"][0]["command"].startswith(f"{sys.executable} -c")
    assert (request["state"], request["pid"], request["vram"]) == (
        "waiting", waiting.pid, 900 * MIB,
    )  # fmt: skip
    assert f"gw0 of run {suite.pid}: test_it.py::test_a" in text
    assert f"    pid {held['family'][0]['pid']}, uses 300.00 MiB: {sys.executable}" in text
    assert "  waiting   900.00 MiB  pid" in text


@pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode,
    reason="namespaces cannot be made here",
)
def test_two_containers_wait_for_one_another(card, tmp_path):
    go = tmp_path / "go"
    with running("--vram=700MiB", "--", *takes(500, go), before=UNSHARE) as first:
        assert first.stdout.readline() == "took\n"
        (seen,) = holders()
        assert (seen["vram"], seen["seen_here"]) == (700 * MIB, False)
        assert [each["used"] for each in seen["family"]] == [600 * MIB]  # its context included
        with running("--vram=700MiB", "--", *takes(500), before=UNSHARE) as second:
            waits = second.stderr.readline()
            go.touch()
            assert (first.wait(), second.wait()) == (0, 0)
        told = first.stderr.read()
    assert waits.startswith("gpumem run: waits for 700.00 MiB of card")
    assert "700.00 MiB held by pid" in waits
    assert "took 600.00 MiB of Simulated CUDA card" in told
