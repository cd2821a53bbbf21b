"""Flags that are fields of dataclasses: what typer makes of them, and what reaches the command."""

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from llama4_dist.cli.flag_groups import with_flag_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    where: Annotated[str, typer.Option("--server", "-s", help="Where it is.")]
    seconds: Annotated[float, typer.Option(parser=lambda given: float(str(given).rstrip("s")))] = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Loudness:
    loud: Annotated[bool, typer.Option("--loud/--quiet")] = True
    names: Annotated[list[str] | None, typer.Option("--name")] = None


def app_that_tells(seen: list[object]) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @with_flag_groups
    def command(word: Annotated[str, typer.Argument()], place: Place, *, count: int = 3, loudness: Loudness) -> None:
        """Say it."""
        seen.extend((word, place, count, loudness))

    return app


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("hello -s here", ("hello", Place(where="here"), 3, (True, []))),
        (
            "hello --server here --seconds 2s --count 4 --quiet --name a --name b",
            ("hello", Place(where="here", seconds=2.0), 4, (False, ["a", "b"])),
        ),
    ],
)
def test_every_flag_reaches_its_group(given: str, expected: tuple[object, ...]) -> None:
    seen: list[object] = []
    result = CliRunner().invoke(app_that_tells(seen), given.split())
    assert result.exit_code == 0, result.output
    *first, loudness = seen
    assert isinstance(loudness, Loudness)
    assert (*first, (loudness.loud, loudness.names or [])) == expected


def test_a_field_without_a_default_is_a_flag_that_must_be_given() -> None:
    seen: list[object] = []
    result = CliRunner().invoke(app_that_tells(seen), ["hello"])
    assert result.exit_code == 2
    assert "--server" in result.output
    assert seen == []


def test_help_is_the_commands_own_and_shows_flags_in_the_order_of_the_groups() -> None:
    shown = CliRunner().invoke(app_that_tells([]), ["--help"]).output
    assert "Say it." in shown
    places = [shown.index(text) for text in ("--server", "Where it is.", "--seconds", "--count", "--loud", "--name")]
    assert places == sorted(places)


def test_two_groups_with_a_field_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="duplicate parameter name: 'where'"):

        @with_flag_groups
        def command(place: Place, other: Place) -> None: ...
