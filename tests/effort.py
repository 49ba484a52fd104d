"""Limits on the time of tests: the markers ``exhaustive`` and ``slow``, and the order of the test files.

``@pytest.mark.exhaustive(reason=...)``: runs with ``--all`` only. The summary says how many tests were left out.

``@pytest.mark.slow(reason=...)``: may take longer than ``--slow-limit`` seconds (ini: ``slow_limit``). Without the
marker, such a test fails the suite. The limit applies to the set-up and to the call of a test separately. The set-up of
a shared fixture counts for the first test that uses it. On a slow or loaded machine, raise the limit; 0 disables it.
With ``--all`` there is no limit by default, because the compiler optimizes and fuzz tests draw many examples.

Without torch, the comparisons with it skip themselves; the summary says how many, and how to run them.

Files with slow tests run first, so that with xdist's ``--dist=loadfile`` no worker starts one at the end.
"""

import importlib.util
import re
from pathlib import Path

import pytest

_TORCH = re.compile(r"torch|sentence.transformers|mteb|pytrec_eval")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("effort", "what a test may cost")
    group.addoption("--all", action="store_true", dest="all_tests", help="run exhaustive tests too")
    group.addoption(
        "--slow-limit",
        type=float,
        metavar="SECONDS",
        help="a test that takes longer fails the suite unless it is marked slow; 0: no limit (ini: slow_limit)",
    )
    parser.addini("slow_limit", "default of --slow-limit", default="20")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "exhaustive(reason): runs with --all only")
    config.addinivalue_line("markers", "slow(reason): may take longer than --slow-limit seconds")
    config.pluginmanager.register(Effort(config))
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # xdist would undo the order of pytest_collection_modifyitems


class Effort:
    """``left_out``: the number of exhaustive tests that do not run; ``too_slow``: phase of a test -> seconds."""

    def __init__(self, config: pytest.Config):
        limit = config.option.slow_limit
        default = 0.0 if config.option.all_tests else float(config.getini("slow_limit"))
        self.limit = default if limit is None else limit
        self.left_out = 0
        self.too_slow: dict[str, float] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in (*item.iter_markers("exhaustive"), *item.iter_markers("slow")):
                if mark.args or not mark.kwargs.get("reason"):
                    raise pytest.UsageError(f"{item.nodeid}: @pytest.mark.{mark.name} needs reason=...")
        if not config.option.all_tests:
            left_out = [item for item in items if item.get_closest_marker("exhaustive")]
            self.left_out = len(left_out)
            if left_out:
                items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
                config.hook.pytest_deselected(items=left_out)
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "teardown" and "slow" not in report.keywords and 0 < self.limit < report.duration:
            self.too_slow[f"{report.nodeid} ({report.when})"] = report.duration

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error) -> None:
        """Takes the count from an xdist worker. Every worker collects all tests, so the counts are equal."""
        self.left_out = max(self.left_out, getattr(node, "workeroutput", {}).get("exhaustive", 0))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["exhaustive"] = self.left_out
        elif self.too_slow and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.too_slow:
            terminalreporter.section(f"longer than {self.limit:g} s and not marked slow", red=True)
            for name, seconds in sorted(self.too_slow.items(), key=lambda pair: -pair[1]):
                terminalreporter.line(f"{seconds:.1f} s  {name}")
            terminalreporter.line("make them faster, or mark them @pytest.mark.slow(reason=...), or raise --slow-limit")
        if self.left_out:
            terminalreporter.line(f"{self.left_out} exhaustive tests not run; --all runs them")
        skipped = [report for report in terminalreporter.stats.get("skipped", ()) if _needs_torch(report)]
        if skipped and importlib.util.find_spec("torch") is None:
            terminalreporter.line(
                f"{sum(map(_tests_of, skipped))} comparisons with torch, sentence-transformers or mteb not run. To run "
                "them: install a build of torch without CUDA into this environment, then pip install -e '.[dev-torch]'"
            )


def _needs_torch(report: pytest.TestReport) -> bool:
    return isinstance(report.longrepr, tuple) and _TORCH.search(report.longrepr[2]) is not None


def _tests_of(report: pytest.TestReport) -> int:
    """The number of test functions that a skip leaves out: those of a whole file, if it is not imported."""
    if "::" in report.nodeid:
        return 1
    return len(re.findall(r"^def test_", Path(report.longrepr[0]).read_text(encoding="utf-8"), re.MULTILINE))
