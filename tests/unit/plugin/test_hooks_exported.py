"""pytest finds a hook only where the plugin's package names it."""

from __future__ import annotations

import pytest_gpumem.plugin as package
from pytest_gpumem.plugin import hooks


def test_every_hook_is_one_of_the_package():
    wired = {name for name, hook in vars(hooks).items() if name[:7] == "pytest_" and callable(hook)}
    assert wired
    assert wired <= set(package.__all__)
