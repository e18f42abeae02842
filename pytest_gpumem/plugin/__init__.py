"""Everything that knows pytest: its hooks, options and marks; the rooms below know none of it."""

from pytest_gpumem.on_import import collecting_later, find_own_modules

find_own_modules()

with collecting_later():
    from pytest_gpumem.plugin.consolidate import (
        consolidate_gpu_memory,
        gpu_consolidator,
    )
    from pytest_gpumem.plugin.hooks import (
        gpumem,
        pytest_addoption,
        pytest_collection_finish,
        pytest_collection_modifyitems,
        pytest_configure,
        pytest_load_initial_conftests,
        pytest_report_header,
        pytest_runtest_teardown,
        pytest_sessionfinish,
        pytest_unconfigure,
        pytest_xdist_auto_num_workers,
        pytest_xdist_setupnodes,
    )
    from pytest_gpumem.plugin.route import (
        embedding_model,
        gpu_device,
        model_pool,
    )

__all__ = [
    "consolidate_gpu_memory",
    "embedding_model",
    "gpu_consolidator",
    "gpu_device",
    "gpumem",
    "model_pool",
    "pytest_addoption",
    "pytest_collection_finish",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_load_initial_conftests",
    "pytest_report_header",
    "pytest_runtest_teardown",
    "pytest_sessionfinish",
    "pytest_unconfigure",
    "pytest_xdist_auto_num_workers",
    "pytest_xdist_setupnodes",
]
