"""``gpumem marks``: which sizes in the source hold, and their correction."""

from __future__ import annotations

import ast
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.cli import main as cli
from pytest_gpumem.cli.marks import enough
from pytest_gpumem.plugin import marks as meaning
from pytest_gpumem.scheduling.history import History

GIB = 2**30
MIB = 2**20


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Write a file and what its tests took in so many runs; return the file."""
    monkeypatch.chdir(tmp_path)

    def write(text, runs=1, encoding="utf-8", **took):
        path = tmp_path / "test_it.py"
        path.write_bytes(text.encode(encoding))
        history = History()
        for name, size in took.items():
            for _ in range(runs):
                nodeid = "test_it.py::" + name.replace("__", "::")
                history.note(nodeid, size, 1.0, True)
        history.save(tmp_path / ".pytest_cache/d/gpumem/history.json")
        return path

    return write


def marks(capsys, *arguments):
    status = cli.main(["marks", *arguments])
    out, error = capsys.readouterr()
    return status, out + error


def test_a_mark_that_asks_for_too_much_is_said_and_corrected(suite, capsys):
    before = 'import pytest\n\n@pytest.mark.gpu(vram="18.7 GiB")\ndef test_a(): pass\n'
    path = suite(before, runs=8, test_a=int(7.4 * GIB))
    status, out = marks(capsys)

    assert status == 1
    assert out == (
        "test_it.py:3: asked 18.70 GiB, took 7.40 GiB in 8 runs (test_a); 8.2GiB would do\n"
    )
    assert path.read_text() == before

    status, out = marks(capsys, "--write")
    assert status == 0
    assert out.endswith("corrected: 1 mark in 1 file\n")
    assert path.read_text() == before.replace("18.7 GiB", "8.2GiB")
    assert marks(capsys) == (0, "1 mark holds\n")


NONE = "no mark gpu with a size was found on tests that took VRAM"
SIZES = {"test_a": 2 * GIB, "test_b[1]": GIB, "test_b[2]": 3 * GIB, "T__test_c": 4 * GIB}
HEAD = "import pytest\nimport pytest as pt\nfrom pytest import mark\nfrom pytest import mark as m\n"
REST = "def test_b(n): pass\n\nclass T:\n    def test_c(self): pass\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # A function's own, by keyword and by place, as a number, in quotes of either kind.
        ('@pytest.mark.gpu("9GiB")\ndef test_a(): pass\n', {'"9GiB"': '"2.2GiB"'}),
        ("@mark.gpu(vram='9GiB', count=1)\ndef test_a(): pass\n", {"'9GiB'": "'2.2GiB'"}),
        ("@mark.gpu(u'9GiB')\ndef test_a(): pass\n", {"u'9GiB'": '"2.2GiB"'}),
        ('pytestmark = []\npytestmark += [mark.gpu("90GiB")]\n' + REST, {'"90GiB"': '"4.4GiB"'}),
        ("@m.gpu(9_000_000_000)\ndef test_a(): pass\n", {"9_000_000_000": '"2.2GiB"'}),
        ('@pt.mark.gpu(\n    vram="9"  # nine\n    "GiB",\n)\nasync def test_a(): pass\n',
         {'"9"  # nine\n    "GiB"': '"2.2GiB"'}),
        # Too little.
        ('@pytest.mark.gpu("1GiB")\ndef test_a(): pass\n', {'"1GiB"': '"2.2GiB"'}),
        # Of all parameters, of a module, of a class.
        ('@pytest.mark.gpu("90GiB")\n' + REST, {'"90GiB"': '"3.3GiB"'}),
        ('pytestmark = pytest.mark.gpu("90GiB")\n' + REST, {'"90GiB"': '"4.4GiB"'}),
        ('pytestmark = [pytest.mark.slow, pytest.mark.gpu("90GiB")]\n' + REST,
         {'"90GiB"': '"4.4GiB"'}),
        ('pytestmark: list = [mark.gpu("90GiB")]\n' + REST, {'"90GiB"': '"4.4GiB"'}),
        (REST.replace("class", '@pytest.mark.gpu("90GiB")\nclass'), {'"90GiB"': '"4.4GiB"'}),
        (REST.replace("T:", 'T:\n    pytestmark = mark.gpu("90GiB")'), {'"90GiB"': '"4.4GiB"'}),
        # The closest holds.
        ('pytestmark = mark.gpu("90GiB")\n@mark.gpu("3.5GiB")\n' + REST, {'"90GiB"': '"4.4GiB"'}),
        ('@mark.gpu("90GiB")\n@mark.gpu("2.5GiB")\ndef test_a(): pass\n', {}),
        # Within a condition, and under a name of its own that has no size.
        ('if True:\n    @mark.gpu("9GiB")\n    def test_a(): pass\n', {'"9GiB"': '"2.2GiB"'}),
        ('gpu = pytest.mark.gpu\n\n@gpu("9GiB")\ndef test_a(): pass\n', {'"9GiB"': '"2.2GiB"'}),
        # Those that hold, are no marks of ours, or ask for no size.
        ('@mark.gpu("2.5GiB")\ndef test_a(): pass\n', {}),
        ('@mark.gpu("2GiB")\ndef test_a(): pass\n', {}),
        ("@mark.gpu\ndef test_a(): pass\n", {}),
        ("@mark.gpu()\ndef test_a(): pass\n", {}),
        ("@mark.gpu(None)\ndef test_a(): pass\n", {}),
        ('@other.gpu("9GiB")\ndef test_a(): pass\n', {}),
        ('@mark.vram_limit("9GiB")\ndef test_a(): pass\n', {}),
        ('@mark.gpu("much")\ndef test_a(): pass\n', {}),
        ('def outer():\n    @mark.gpu("9GiB")\n    def test_a(): pass\n', {}),
        ('@mark.gpu("9GiB")\ndef test_never_seen(): pass\n', {}),
    ],
)  # fmt: skip
def test_the_size_is_corrected_and_nothing_else(suite, capsys, before, after):
    path = suite(HEAD + before, **SIZES)
    status, out = marks(capsys, "--write")

    assert status == 0, out
    expected = HEAD + before
    for old, new in after.items():
        expected = expected.replace(old, new)
    assert path.read_text() == expected
    status, out = marks(capsys)
    assert status == 0
    held = len(re.findall(r'"(?:2|2\.5|3\.5)GiB"', before)) + len(after)
    assert out == {0: f"{NONE}\n", 1: "1 mark holds\n", 2: "2 marks hold\n"}[held]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('SIZE = "9GiB"\n@mark.gpu(SIZE)\ndef test_a(): pass\n', "6: mark.gpu(SIZE)"),
        ("@mark.gpu(vram=9 * 2**30)\ndef test_a(): pass\n", "5: mark.gpu(vram=9 * 2**30)"),
        ("@mark.gpu(**KEYS)\ndef test_a(): pass\n", "5: mark.gpu(**KEYS)"),
        ('big = mark.gpu("9GiB")\n@big\ndef test_a(): pass\n', '6: mark.gpu("9GiB")'),
        ('@mark.gpu("9GiB")\n@mark.parametrize("n", [pytest.param(1, marks=mark.gpu("5GiB"))])\n'
         + REST, '6: mark.gpu("5GiB"), on some parameters'),
    ],
)  # fmt: skip
def test_what_is_no_plain_size_is_left_alone_and_named(suite, capsys, text, shown):
    path = suite(HEAD + text, **SIZES)
    status, out = marks(capsys, "--write")

    assert status == 0
    assert f"left alone, for their sizes do not stand there in words\n  test_it.py:{shown}\n" in out
    assert " hold" not in out
    assert path.read_text() == HEAD + text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_every_other_byte_of_the_file_stays(suite, capsys, encoding, newline):
    cookie = "# coding: latin-1\n" if encoding == "latin-1" else ""
    text = f'{cookie}import pytest\n\x0c\nX = "é"; pytestmark = pytest.mark.gpu("9GiB")  # ü\n\n'
    text += "def test_a(): pass"
    path = suite(text.replace("\n", newline), encoding=encoding, test_a=GIB)
    path.chmod(0o751)
    before = path.read_bytes()
    status, out = marks(capsys, "--write")

    assert status == 0, out
    assert path.read_bytes() == before.replace(b"9GiB", b"1.1GiB")
    assert path.stat().st_mode & 0o777 == 0o751


@pytest.mark.parametrize(
    ("encoding", "x"),
    [
        ("iso2022_jp", b'\x1b$B\x1b$B$"\x1b(B\x1b(B'),  # shifts that a writer leaves out
        ("utf-7", b"+AOk-+AOk-"),
    ],
)
def test_a_file_that_cannot_be_written_as_it_was_is_left_alone(suite, capsys, encoding, x):
    text = b"# coding: " + encoding.encode() + b'\nimport pytest\nX = "' + x + b'"\n'
    path = suite("", test_a=GIB)
    path.write_bytes(text + b'pytestmark = pytest.mark.gpu("9GiB")\ndef test_a(): pass\n')
    before = path.read_bytes()
    status, out = marks(capsys, "--write")

    assert status == 1
    assert out.endswith("\n  'test_it.py' cannot be corrected without changing more in it\n")
    assert "asked 9.00 GiB" in out
    assert path.read_bytes() == before


def test_what_is_not_there_or_not_python_is_no_error(suite, capsys, tmp_path):
    path = suite("def broken(:\n", test_a=GIB)
    status, out = marks(capsys)
    assert status == 0
    assert "files left alone\n  test_it.py: " in out
    path.unlink()
    assert marks(capsys) == (0, f"{NONE}\n")
    (tmp_path / ".pytest_cache/d/gpumem/history.json").unlink()
    status, out = marks(capsys)
    assert status == 2
    assert out.startswith("gpumem marks: error: there is no history ")


@given(st.integers(1, 200 * GIB))
def test_what_would_do_holds(took):
    size = meaning.gpu(enough(took)).vram
    assert took <= size <= max(1.5 * took, took + 64 * MIB)


def test_a_link_is_followed(suite, capsys, tmp_path):
    path = suite(
        'import pytest\npytestmark = pytest.mark.gpu("9GiB")\ndef test_a(): pass\n', test_a=GIB
    )
    real = path.rename(tmp_path / "real.py")
    path.symlink_to(real)
    marks(capsys, "--write")

    assert path.is_symlink()
    assert '"1.1GiB"' in real.read_text()
    ast.parse(real.read_text())
