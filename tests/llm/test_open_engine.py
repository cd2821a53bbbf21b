"""Progress is the caller's function, a bar on a terminal, or nothing."""

import sys

import pytest

from llama4_dist.llm.open_engine import shown


def test_the_callers_own_function_is_used_as_it_is() -> None:
    def own(done: int, total: int) -> None:
        pass

    with shown(own) as progress:
        assert progress is own


@pytest.mark.parametrize("wanted", [True, False])
def test_without_a_terminal_nothing_is_shown(
    wanted: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with shown(wanted) as progress:
        assert progress is None
    assert capfd.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_on_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with shown(True) as progress:
        assert progress is not None
        progress(3, 4)
    captured = capsys.readouterr()
    assert "Loading" in captured.err
    assert "75%" in captured.err
    assert captured.out == ""
