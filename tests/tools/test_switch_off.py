"""The table of mechanisms fits the code, and the tool tells tests that notice from tests that do not."""

import ast
from pathlib import Path

import pytest

from tools.switch_off import (
    BROKEN,
    GREEN,
    MISSING,
    RED,
    ROOT,
    TABLE,
    Mechanism,
    judge_untouched,
    read_table,
    switch_off,
)

MECHANISMS = read_table(TABLE)
NOTICES = "test_toy.py::test_the_answer_is_doubled"
DOES_NOT = "test_toy.py::test_there_is_an_answer"
FAILS = "test_toy.py::test_that_fails_anyway"
TOY_TEST = """
import pytest

from toy import doubled

@pytest.mark.parametrize("number", [0, 2])
def test_the_answer_is_doubled(number): assert doubled(number) == number + number
def test_there_is_an_answer(): assert doubled(2) is not None
def test_that_fails_anyway(): assert not doubled(2)
"""


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda one: one.name)
def test_a_mechanism_stands_once_in_its_file_and_its_tests_exist(mechanism: Mechanism) -> None:
    assert (ROOT / mechanism.file).read_text().count(mechanism.find) == 1
    assert mechanism.replace != mechanism.find
    assert mechanism.rows
    for test in mechanism.tests:
        path, _, name = test.partition("::")
        nodes = ast.walk(ast.parse((ROOT / path).read_text()))
        functions = [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        assert name.partition("[")[0] in functions, test
    assert mechanism.tests


def test_no_two_mechanisms_share_a_name() -> None:
    assert len({one.name for one in MECHANISMS}) == len(MECHANISMS)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A repository with one mechanism: doubling."""
    (tmp_path / "toy.py").write_text("def doubled(number):\n    number += number\n    return number\n")
    (tmp_path / "test_toy.py").write_text(TOY_TEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    return tmp_path


def doubling(*tests: str, find: str = "    number += number\n") -> Mechanism:
    return Mechanism(name="doubling", rows=("FX0",), file="toy.py", find=find, replace="", tests=tests)


def test_a_test_that_notices_is_red_and_the_text_is_put_back(toy: Path) -> None:
    before = (toy / "toy.py").read_text()
    assert switch_off(toy, doubling(NOTICES)).colour == RED
    assert (toy / "toy.py").read_text() == before


def test_one_test_that_does_not_notice_is_named(toy: Path) -> None:
    outcome = switch_off(toy, doubling(NOTICES, DOES_NOT))
    assert outcome.colour == GREEN
    assert DOES_NOT in outcome.details
    assert NOTICES not in outcome.details


def test_what_cannot_be_judged_is_said_before_anything_is_switched_off(toy: Path) -> None:
    assert judge_untouched(toy, [doubling(NOTICES)]) == {}
    assert judge_untouched(toy, [doubling(FAILS)])["doubling"].colour == BROKEN
    assert judge_untouched(toy, [doubling("test_toy.py::test_of_no_such_name")])["doubling"].colour == BROKEN
    assert judge_untouched(toy, [doubling(NOTICES, find="nowhere")])["doubling"].colour == MISSING
