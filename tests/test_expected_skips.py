"""Where changes are checked a skip that nobody expects fails the run; elsewhere it is a skip."""

import pytest
from expected_skips import VARIABLES

pytest_plugins = ["pytester"]

CONFTEST = """
import sys
sys.path.insert(0, {tests!r})
from expected_skips import ExpectedSkips, asked_for

def pytest_configure(config):
    if asked_for():
        config.pluginmanager.register(ExpectedSkips(), "expected-skips")
"""
SKIPS = """
import pytest

def test_that_runs():
    pass

@pytest.mark.skip(reason="{reason}")
def test_that_skips():
    pass

@pytest.mark.xfail(reason="known")
def test_that_is_known_to_fail():
    assert False
"""
AT_IMPORT = """
import pytest
pytest.importorskip("a_package_that_nobody_has")
"""


@pytest.fixture
def session(pytester, monkeypatch, request):
    """A session of pytest with these files, in a process of its own."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    tests = str(request.path.parent)
    pytester.makeconftest(CONFTEST.format(tests=tests))
    return pytester


@pytest.mark.parametrize("workers", [[], ["--numprocesses", "2"]])
@pytest.mark.parametrize("variable", VARIABLES)
def test_a_skip_for_an_unknown_reason_is_an_error_where_changes_are_checked(
    session, monkeypatch, variable, workers
):
    session.makepyfile(test_it=SKIPS.format(reason="too lazy"), test_import=AT_IMPORT)
    monkeypatch.setenv(variable, "true")
    result = session.runpytest_subprocess(*workers)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=1, skipped=2, xfailed=1)
    result.stdout.fnmatch_lines(["*skips that are not expected*"])
    result.stdout.fnmatch_lines_random(["*test_that_skips: *too lazy", "*a_package_that_nobody*"])


def test_an_expected_skip_is_none(session, monkeypatch):
    session.makepyfile(SKIPS.format(reason="needs a GPU"))
    monkeypatch.setenv("CI", "true")
    result = session.runpytest_subprocess()
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=1, skipped=1, xfailed=1)


@pytest.mark.parametrize("value", [None, "", "0", "false"])
def test_elsewhere_every_skip_is_a_skip(session, monkeypatch, value):
    session.makepyfile(SKIPS.format(reason="too lazy"))
    if value is not None:
        monkeypatch.setenv("CI", value)
    assert session.runpytest_subprocess().ret == pytest.ExitCode.OK
