"""Playing in the browser: choose a world, then reply turn by turn. Without scripts: each reply is a form."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Form
from fastapi.responses import RedirectResponse, Response

from engrain.ui.games import Games, Seat, WebGame
from engrain.ui.site import TheSite, signed
from envs.errors import UsageError

#: The longest that a page waits for the world and the agent before it says that they are busy, in seconds.
PATIENCE = 15.0
#: The longest reply, in characters.
LONGEST = 4000

router = APIRouter()
_forms = APIRouter(dependencies=[Depends(signed)])


def _games(site: TheSite) -> Games:
    assert site.games is not None  # noqa: S101 - else these pages are not served
    return site.games


TheGames = Annotated[Games, Depends(_games)]


@router.get("/play")
def choose(site: TheSite, games: TheGames) -> Response:
    """What can be played, and the games that are under way."""
    return site.page("play.html", games=games)


@_forms.post("/play")
def begin(games: TheGames, place: Annotated[int, Form()], seat: Annotated[Seat, Form()] = Seat.HUMAN) -> Response:
    """Starts a game."""
    return _to(games.start(place, seat))


@router.get("/play/{number}")
def look(site: TheSite, games: TheGames, number: str) -> Response:
    """A game as it stands."""
    game = games.find(number)
    game.wait(1.0 if game.alone else PATIENCE)
    return site.page("game.html", game=game, longest=LONGEST, place=games.places.index(game.place))


@_forms.post("/play/{number}")
def reply(
    games: TheGames,
    number: str,
    turn: Annotated[int, Form()],
    do: Annotated[Literal["say", "take", "on", "leave"], Form()] = "say",
    text: Annotated[str, Form(max_length=LONGEST)] = "",
    action: Annotated[str | None, Form(max_length=LONGEST)] = None,
) -> Response:
    """Says something, takes the agent's suggestion, lets it play on, or leaves."""
    game = games.find(number)
    match do:
        case "leave":
            game.leave()
        case "say" if action is not None or text.strip():
            game.say(turn, text if action is None else action)
        case "say" if game.suggestion is None:
            raise UsageError("the reply is empty: go back and type one")
        case _:
            game.take(turn, on=do == "on")
    return _to(game)


def _to(game: WebGame) -> Response:
    return RedirectResponse(f"/play/{game.number}", 303)


router.include_router(_forms)
