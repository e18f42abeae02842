"""Everything that knows pytest: its hooks, options and marks; the rooms below know none of it."""

from pytest_gpumem.on_import import find_own_modules

find_own_modules()

from pytest_gpumem.plugin.hooks import (  # noqa: E402  # found by then by Python alone
    gpumem,
    pytest_addoption,
    pytest_collection_finish,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_load_initial_conftests,
    pytest_report_header,
    pytest_runtest_teardown,
    pytest_unconfigure,
    pytest_xdist_auto_num_workers,
    pytest_xdist_setupnodes,
)

__all__ = [
    "gpumem",
    "pytest_addoption",
    "pytest_collection_finish",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_load_initial_conftests",
    "pytest_report_header",
    "pytest_runtest_teardown",
    "pytest_unconfigure",
    "pytest_xdist_auto_num_workers",
    "pytest_xdist_setupnodes",
]
