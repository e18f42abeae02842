"""pytest finds a hook only where the plugin's package names it."""

from __future__ import annotations

import pytest_gpumem.plugin as package
from pytest_gpumem.plugin import hooks


def test_every_hook_is_one_of_the_package():
    wired = {name for name in vars(hooks) if name.startswith("pytest_") and name != "pytest_gpumem"}
    missing = {name for name in wired if callable(vars(hooks)[name])} - set(package.__all__)
    assert not missing
