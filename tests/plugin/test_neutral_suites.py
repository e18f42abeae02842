"""Suites that know nothing of the plugin end the same with it; `make soak` tries large ones."""

from __future__ import annotations

from harness import SIMULATE, run_pytest
from neutral import NEIGHBOURS, NO_AUTOLOAD, OURS, differences, write_habits

INSTALLED = ("rerunfailures", "timeout", "asyncio", "html")
"""Those of the other plugins that the tests install anyway."""


def test_every_outcome_is_the_same_beside_other_plugins(tmp_path):
    write_habits(tmp_path)
    plugins = [argument for name in INSTALLED for argument in NEIGHBOURS[name]]

    for difference in differences(tmp_path, ["-p", "xdist", *plugins], OURS, NO_AUTOLOAD):
        assert difference.compared > 30
        assert difference.tests == {}, (difference.way, difference.output)


def test_a_suite_that_ships_in_a_package_ends_the_same(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    suite = ["--pyargs", "numpy.lib.tests.test_twodim_base"]

    (difference,) = differences(tmp_path, suite, {"on": SIMULATE}, NO_AUTOLOAD)
    assert difference.compared > 30
    assert difference.tests == {}, difference.output


def test_an_argument_that_does_not_exist_is_told_as_xdist_tells_it(tmp_path):
    plugins = ["-n", "2", "nowhere.py"]
    write_habits(tmp_path)
    bare = run_pytest(tmp_path, "-p", "no:gpumem", *plugins)
    ours = run_pytest(tmp_path, *SIMULATE, *plugins)

    assert ours.status == bare.status, ours.output
    assert "INTERNALERROR" not in ours.output
