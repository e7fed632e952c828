"""Which tests may skip where every skip has to be expected: on the machines that check a change.

Elsewhere a skip only says what is missing. There it would hide that a claim is no longer tested.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest

# Set by hosted machines that run checks, and by `.ci/run`.
VARIABLES = ("CI", "IMPRINT_PL_CI")

# What a machine may lack. A reason that is not here has to be added on purpose.
REASONS = (
    r"needs a GPU",
    r"no chromium on this machine",
    r"pillow-heif is installed here",
    r"could not import 'pillow_heif'",
    r"could not import 'openvino'",
    # Data that is not in the repository; tests/contracts/test_evidence.py takes a part that is.
    r"\.\./shared/",
    # Other systems than Linux.
    r"reads /proc|peaks are read from /proc",
    r"kills forked processes",
    r"names are text there",
)
EXPECTED = re.compile("|".join(REASONS))


class ExpectedSkips:
    """A plugin of pytest: fails the run, with status 1, if a test was skipped for another reason.

    With pytest-xdist each worker sends its reports to the controller, whose plugin counts them.
    """

    def __init__(self) -> None:
        self.unexpected: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._look_at(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._look_at(report)

    def _look_at(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        # A test that is known to fail is reported as skipped, too.
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else "")
            if not EXPECTED.search(reason):
                self.unexpected[report.nodeid] = reason

    @pytest.hookimpl(wrapper=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
        yield
        if self.unexpected:
            terminalreporter.section("skips that are not expected", red=True)
            for test, reason in self.unexpected.items():
                terminalreporter.line(f"{test}: {reason}")
            terminalreporter.line("Make it run, or add its reason to tests/expected_skips.py.")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unexpected and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def asked_for() -> bool:
    """Whether every skip has to be expected here."""
    return any(os.environ.get(name, "") not in ("", "0", "false") for name in VARIABLES)
