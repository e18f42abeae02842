"""The suite on other Pythons, and on the oldest of what pyproject.toml claims.

    nox --list
    nox -s newest-3.13
    nox -s oldest -- tests/unit/scheduling

Interpreters that are not found are skipped: those of pyenv are found with ``pyenv shell``, or with
their folders of ``bin`` on the PATH. What stands behind ``--`` goes to pytest.
"""

from __future__ import annotations

import nox

PROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PROJECT)
nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False
CORE = [
    *(f"tests/unit/{room}" for room in ("cli", "devices", "leases", "plugin", "reports")),
    *(f"tests/unit/{room}" for room in ("routing", "scheduling", "tracking", "test_house.py")),
    *(f"tests/plugin/test_{name}.py" for name in ("isolated", "scheduler", "sharing")),
]
"""What needs no plugins but those of ``BESIDE``."""
BESIDE = (
    "hypothesis",
    "markdown-it-py",
    "plotly",
    "pytest-rerunfailures",
    "pytest-timeout",
    "pyyaml",
)
# As `make` has it: nothing may import the source tree beside the installed wheel. Python 3.10 does
# not know the variable; pytest's own command, unlike `python -m pytest`, has no need of it.
ENVIRONMENT = {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}


def floor(requirement: str) -> str:
    """Return ``requirement`` for the oldest that it allows: ``a>=1.2`` as ``a~=1.2.0``."""
    name, oldest = requirement.split(">=")
    return f"{name}~={oldest}{'.0' * max(1, 2 - oldest.count('.'))}"


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    """Run the suite on the newest of everything."""
    group = nox.project.dependency_groups(PROJECT, "test")
    session.install(".", *(name.replace("torch==", "torch>=") for name in group))
    session.run(
        "pytest",
        *(session.posargs or ["-n", "2", "-m", "not slow"]),
        env=ENVIRONMENT,
    )


@nox.session(python=PYTHONS[0])
def oldest(session: nox.Session) -> None:
    """Run what needs few other plugins on the oldest of what the package claims to work with."""
    extras = PROJECT["project"]["optional-dependencies"]
    claimed = [*PROJECT["project"]["dependencies"], *extras["torch"], *extras["xdist"]]
    session.install(".", *map(floor, claimed), *BESIDE)
    # Our own settings are for the newest pytest and for plugins that need one.
    session.run(
        *("pytest", "-o", "addopts=-ra", "-m", "not newest and not slow"),
        *("-W", "ignore::pytest.PytestConfigWarning"),
        *(session.posargs or CORE),
        env=ENVIRONMENT,
    )
