"""Playing in the browser: choose a world, then reply turn by turn. Each reply is a form, so scripts are not needed."""

from __future__ import annotations

import secrets
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Form
from fastapi.responses import RedirectResponse, Response

from engrain.ui.games import Games, Seat, WebGame
from engrain.ui.site import TheSite, signed

#: Seconds that a page waits for the world and the agent before it says that they are busy, and that it then waits on.
SOON, PATIENCE = 2.0, 15.0
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
    known = [(game, game.view()) for game in games.all()]
    return site.page("play.html", games=games, known=known, form=secrets.token_hex(8))


@_forms.post("/play")
def begin(
    games: TheGames,
    place: Annotated[int, Form()],
    seat: Annotated[Seat, Form()] = Seat.HUMAN,
    form: Annotated[str, Form(max_length=100)] = "",
) -> Response:
    """Starts a game."""
    return _to(games.start(place, seat, form))


@router.get("/play/{number}")
def look(site: TheSite, games: TheGames, number: str) -> Response:
    """A game as it stands, or as it stands after a moment."""
    return _shown(site, games, number, "game.html", None)


@router.get("/play/{number}/now")
def follow(site: TheSite, games: TheGames, number: str, seen: int) -> Response:
    """The part of that page that changes, when it has changed."""
    return _shown(site, games, number, "game_now.html", seen)


@_forms.post("/play/{number}")
def reply(
    games: TheGames,
    number: str,
    turn: Annotated[int, Form()],
    do: Annotated[Literal["say", "take", "on", "leave"], Form()] = "say",
    text: Annotated[str, Form(max_length=LONGEST)] = "",
    pick: Annotated[int | None, Form()] = None,
) -> Response:
    """Says something, takes the agent's suggestion, lets it play on, or leaves."""
    game = games.find(number)
    if do == "leave":
        game.leave()
    elif pick is not None:
        game.pick(turn, pick)
    elif do == "say" and text.strip():
        game.say(turn, text)
    else:
        game.take(turn, on=do == "on")
    return _to(game)


def _shown(site: TheSite, games: Games, number: str, template: str, seen: int | None) -> Response:
    game = games.find(number)
    game.wait(PATIENCE if seen is not None else SOON, seen)
    place = games.places.index(game.place)
    return site.page(template, game=game, view=game.view(), longest=LONGEST, place=place, form=secrets.token_hex(8))


def _to(game: WebGame) -> Response:
    return RedirectResponse(f"/play/{game.number}", 303)


router.include_router(_forms)
