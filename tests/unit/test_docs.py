"""The documents' examples do what they show.

A block ```` ```python NAME.py ```` is a file; the ```` ```console ```` block after it that begins
with ``$ pytest``, ``$ gpumem run`` or ``$ gpumem blame`` is run beside the files of its section,
and must print the lines it shows, in that order. ``...`` stands for lines left out; times, and
parts of the time, may differ. Further commands of that block are run too.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
STORIES = {"tutorial.md"}
"""Documents whose sections go on where the last one ended; elsewhere each begins anew."""
COMMANDS = {
    "pytest": ["pytest", "-p", "xdist"],
    "gpumem": ["pytest_gpumem.cli.main"],
}
"""What the examples call, and the module that it runs."""
NO_OTHERS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
SHELLS = {"console", "text"}
"""Languages of blocks that show commands."""
BLOCK = re.compile(r"^```(?P<info>[^\n]+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)")


def sections():
    for document in DOCUMENTS:
        text = document.read_text()
        whole = document.name in STORIES
        for section in [text] if whole else re.split(r"^(?=#+ )", text, flags=re.MULTILINE):
            blocks = [(match["info"], match["body"]) for match in BLOCK.finditer(section)]
            if any(is_run(*block) for block in blocks):
                title = section.splitlines()[0].lstrip("# ")
                yield pytest.param(blocks, id=f"{document.name}: {title}")


def is_run(info, body):
    # The demo's output is compared by scripts/demo.py.
    begins = body.startswith(("$ pytest", "$ gpumem run", "$ gpumem blame"))
    return info == "console" and begins and "docs/demo" not in body


def examples(info, body):
    """Yield each command of a block, with what it shows below."""
    if is_run(info, body):
        for example in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
            command, *shown = example.splitlines()
            yield shlex.split(command), [line for line in shown if line != "..."]


def comparable(lines):
    # Neither times nor what depends on them is the same twice.
    took = r" in \d+\.\d+s(?: \(\d+:\d\d:\d\d\))?|, ran \d+\.\d s"
    varies = took + r"|\d+% (?=used on average|of the time)| +"
    return [re.sub(varies, " ", line).strip(" =") for line in lines]


@pytest.mark.parametrize("blocks", list(sections()))
def test_examples_print_what_the_documents_show(blocks, tmp_path):
    environment = {name: value for name, value in os.environ.items() if "PYTEST_" not in name}
    # Keys and archives of the examples are not the user's.
    environment |= {"COLUMNS": "100", "XDG_CONFIG_HOME": str(tmp_path / "config")}
    # What is run by ``gpumem run``.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    for info, body in blocks:
        language, _, name = info.partition(" ")
        if name and language in {"python", "ini"}:
            (tmp_path / name).write_text(body)
        for (program, *arguments), shown in examples(info, body):
            done = subprocess.run(
                [sys.executable, "-m", *COMMANDS[program], *arguments],
                cwd=tmp_path,
                # An example that asks for our plugin is shown without others: starting all that
                # are installed here would be most of the time, in each worker again.
                env=environment | (NO_OTHERS if "gpumem" in arguments else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            printed = iter(comparable(done.stdout.splitlines()))
            for line in comparable(shown):
                assert line in printed, f"not (or not here) in the output: {line}\n{done.stdout}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document):
    for target in LINK.findall(document.read_text()):
        assert not target or (document.parent / target).exists(), target


COMMAND = re.compile(r"^\$ gpumem ([^|>\n]*)", re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_documents_show_without_running_it_can_be_typed(document, capsys):
    from pytest_gpumem.cli import main
    from pytest_gpumem.plugin.settings import OPTIONS

    text = document.read_text()
    flags = {"--gpumem", *(option.flag for option in OPTIONS)}
    assert set(re.findall(r"--gpumem[\w-]*", text)) <= flags
    for match in BLOCK.finditer(text):
        if match["info"] == "python":
            compile(match["body"], document.name, "exec")
        for command in COMMAND.findall(match["body"]) if match["info"] in SHELLS else ():
            try:
                main.parser().parse_args(shlex.split(command, comments=True))
            except SystemExit:
                pytest.fail(f"gpumem {command}: {capsys.readouterr().err}")


def test_a_reader_finds_every_how_to():
    lists = [(ROOT / name).read_text() for name in ("README.md", "docs/index.md", "mkdocs.yml")]
    for page in (ROOT / "docs" / "how-to").glob("*.md"):
        assert all(f"how-to/{page.name}" in text for text in lists), page.name


def test_the_reference_has_every_option_as_it_is_declared():
    from pytest_gpumem.plugin.settings import OPTIONS

    reference = (ROOT / "docs" / "reference.md").read_text()
    options = reference.partition("\n## Marks")[0]
    rows = {
        name: (metavar, default.replace("`", ""))
        for name, metavar, default in re.findall(
            r"^\| `(--gpumem[\w-]*) ?(\w*)` \|.*\| (.*) \|$", options, re.MULTILINE
        )
    }
    declared = {
        each.flag: (each.metavar or "", each.default or ("none" if each.metavar else "off"))
        for each in OPTIONS
    }
    declared["--gpumem"] = ("MODE", "track; on with -p gpumem")
    assert rows == declared

    sentence = next(line for line in options.splitlines() if "do something only with `on`" in line)
    needy = [option.flag for option in OPTIONS if option.needs_on]
    assert sorted(re.findall(r"`(--[\w-]+)`", sentence)) == sorted(needy)


def test_every_field_of_the_records_is_in_the_json_document():
    from pytest_gpumem import records

    document = (ROOT / "docs" / "json.md").read_text()
    kinds = [kind for kind in vars(records).values() if hasattr(kind, "_fields")]
    fields = {field for kind in kinds for field in kind._fields}
    assert len(fields) > 40
    assert sorted(name for name in fields if f"`{name}`" not in document) == []


@pytest.mark.slow
@pytest.mark.model
def test_the_readme_shows_what_the_demo_prints():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "demo.py", "--readme"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
