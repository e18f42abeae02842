"""Runs the tests on each Python that is there, and on the ends of what pyproject.toml claims.

``nox --list`` shows the sessions. A Python that is not installed is skipped, and nox says so.
"""

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False

SAFE = {"PYTHONSAFEPATH": "1"}
"""The tests are about the installed package: nothing may import the source tree beside it."""
CORE = [f"tests/plugin/test_{name}.py" for name in ("kinds", "runs", "scheduler")]
"""What touches most of pytest, xdist and torch."""
CLAIMS = {
    "oldest": ["pytest==8.0.*", "pytest-xdist==3.7.*", "torch==2.4.*", "numpy<2.3"],
    "newest": ["pytest", "pytest-xdist", "torch"],
}


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """Run everything on one Python."""
    # torch goes first and alone: what comes later finds it and pulls no other build of it.
    session.install("torch==2.13.0")
    session.install(".", "--group", "test")
    session.run("pytest", "-n", "2", *session.posargs, env=SAFE)


@nox.session(python="3.11")
@nox.parametrize("end", list(CLAIMS))
def claims(session: nox.Session, end: str) -> None:
    """Run the core's tests on the oldest or newest versions that pyproject.toml claims."""
    pytest, xdist, torch, *more = CLAIMS[end]
    session.install(torch, *more)
    session.install(".", pytest, xdist, *more)
    session.run("pytest", "-p", "no:cacheprovider", *CORE, *session.posargs, env=SAFE)
