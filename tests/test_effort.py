"""The hooks of tests/effort.py, tested in separate runs of pytest."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = """
import time
import pytest

def test_fast(): pass

@pytest.mark.exhaustive(reason="all of them")
def test_whole(): pass

@pytest.mark.parametrize("case", [1, pytest.param(2, marks=pytest.mark.exhaustive(reason="one shows it"))])
def test_cases(case): pass

@pytest.fixture
def prepared(): time.sleep({setup})

{mark}
def test_timed(prepared): time.sleep({call})
"""


@pytest.fixture
def run(pytester):
    pytester.makeini("[pytest]\naddopts = -p tests.effort -p no:cacheprovider --strict-markers")

    def run(*options: str, mark: str = "", setup: float = 0, call: float = 0) -> pytest.RunResult:
        pytester.makepyfile(TESTS.format(mark=mark, setup=setup, call=call))
        return pytester.runpytest_inprocess(*options)

    return run


def test_exhaustive_tests_are_left_out_and_counted(run):
    result = run()
    result.assert_outcomes(passed=3, deselected=2)
    result.stdout.fnmatch_lines(["2 exhaustive tests not run; --all runs them"])


def test_all_runs_them(run):
    result = run("--all", "-o", "slow_limit=0.1", call=0.2)
    result.assert_outcomes(passed=5)
    assert result.ret == pytest.ExitCode.OK, "with --all there is no limit"
    result.stdout.no_fnmatch_line("*not run*")


@pytest.mark.parametrize("phase", ["setup", "call"])
def test_a_slow_test_without_the_mark_fails_the_suite(run, phase):
    result = run("--slow-limit=0.1", **{phase: 0.2})
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=3, deselected=2)
    result.stdout.fnmatch_lines(["*longer than 0.1 s and not marked slow*", f"0.* s *::test_timed ({phase})"])


@pytest.mark.parametrize(
    ("options", "mark"),
    [
        (["--slow-limit=0.1"], "@pytest.mark.slow(reason='sleeps')"),
        (["--slow-limit=5"], ""),
        (["--slow-limit=0"], ""),
        ([], ""),
    ],
    ids=["marked", "limit raised", "no limit", "default limit"],
)
def test_a_slow_test_may_pass(run, options, mark):
    assert run(*options, mark=mark, call=0.2).ret == pytest.ExitCode.OK


@pytest.mark.parametrize("mark", ["slow", "exhaustive", "slow('sleeps')", "slow(reason='')"])
def test_a_mark_needs_its_reason(run, mark):
    result = run(mark=f"@pytest.mark.{mark}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*test_timed: @pytest.mark.{mark.partition('(')[0]} needs reason=...*"])


def test_workers_report_the_same_and_start_with_slow_files(pytester, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # the other plugins take seconds to import
    pytester.makeini("[pytest]\naddopts = -p tests.effort -p xdist -p no:cacheprovider")
    body = """
import time
import pytest

@pytest.mark.parametrize("number", range(3))
def test_sleeps(number):
    time.sleep(0.05)

@pytest.mark.exhaustive(reason="all of them")
def test_whole(): pass
"""
    slow = "\n@pytest.mark.slow(reason='sleeps')\ndef test_slow(): time.sleep(0.2)\n"
    pytester.makepyfile(test_a=body, test_b=body, test_c=body + slow)
    result = pytester.runpytest_subprocess("-n", "1", "--dist=loadfile", "--slow-limit=0.02", "-v")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=10)
    result.stdout.fnmatch_lines(["*not marked slow*", "3 exhaustive tests not run; --all runs them"])
    result.stdout.no_fnmatch_line("* s *::test_slow*")
    passed = [line for line in result.outlines if "PASSED" in line]
    assert ["test_c.py" in line for line in passed] == [True] * 4 + [False] * 6


def test_comparisons_without_torch_are_counted(pytester, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    pytester.makeini("[pytest]\naddopts = -p tests.effort -p no:cacheprovider")
    pytester.makepyfile(
        test_whole="import pytest\npytest.importorskip('no_torch')\ndef test_a(): pass\ndef test_b(): pass",
        test_one="""
            import pytest
            def test_a(): pytest.importorskip("no_sentence_transformers")
            def test_b(): pytest.skip("needs a GPU")
            def test_c(): pass
        """,
    )
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(passed=1, skipped=3)
    result.stdout.fnmatch_lines(["3 comparisons with torch, sentence-transformers or mteb not run. To run them: *"])
