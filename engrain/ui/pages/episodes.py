"""Episodes: listings, and one replayed turn by turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from fastapi.responses import Response

from engrain.ui.site import LIMIT, TheSite
from memory.tallies import Tally

router = APIRouter()

Text = Annotated[str, Query(max_length=200)]


@router.get("/episodes")
def list_episodes(
    site: TheSite,
    world: Text = "",
    outcome: Literal["", "solved", "failed"] = "",
    round_: Annotated[str, Query(alias="round", max_length=200)] = "",
    stage: Text = "",
    checkpoint: Text = "",
    knowledge: Text = "",
    before: Text = "",
) -> Response:
    """Episodes that pass the filters, newest first. `world` is an env and a split, as in `math/train`."""
    store, env, split = site.store, *_parts(world)
    success = {"solved": True, "failed": False}.get(outcome)
    tallies = store.tallies()
    rows = []
    if _any(tallies, env, split, success):  # or all episodes would be read to find none
        rows = store.episode_rows(
            env=env,
            split=split,
            success=success,
            round_id=site.round(round_).id if round_ else None,
            stage=stage or None,
            checkpoint=store.full_id("checkpoint", checkpoint) if checkpoint else None,
            knowledge=site.knowledge(knowledge).id if knowledge else None,
            before=store.full_id("episode", before) if before else None,
            newest_first=True,
            limit=LIMIT,
        )
    chosen = {
        "world": world, "outcome": outcome, "round": round_, "stage": stage, "checkpoint": checkpoint,
        "knowledge": knowledge,
    }  # fmt: skip
    worlds = {f"{tally.env}/{tally.split}": f"{tally.env} {tally.split}" for tally in tallies}
    return site.page(
        "episodes.html",
        rows=rows,
        versions=site.versions(row.knowledge for row in rows),
        worlds=worlds,
        chosen=chosen,
        before=before,
        limit=LIMIT,
    )


@router.get("/episodes/{given}")
def show_episode(site: TheSite, given: str, turn: Annotated[int, Query(ge=1, le=2**31 - 1)] = 1) -> Response:
    """One episode, `LIMIT` turns a page from `turn` on."""
    episode = site.store.episode(site.store.full_id("episode", given))
    return site.page(
        "episode.html",
        episode=episode,
        versions=site.versions([episode.knowledge]),
        first=turn,
        turns=episode.turns[turn - 1 : turn - 1 + LIMIT],
        limit=LIMIT,
        system=next((m.content for m in episode.messages if m.role == "system"), ""),
        extractions=site.store.extractions(episode_id=episode.id),
    )


def _parts(world: str) -> tuple[str | None, str | None]:
    """Env and split of `env/split`; a name without a split is an env."""
    env, slash, split = world.rpartition("/")
    return (env or None, split or None) if slash else (world or None, None)


def _any(tallies: list[Tally], env: str | None, split: str | None, success: bool | None) -> bool:
    """Whether there is an episode of this world with this outcome."""
    counts: dict[bool | None, Callable[[Tally], int]] = {
        None: lambda t: t.episodes,
        True: lambda t: t.solved,
        False: lambda t: t.episodes - t.solved,
    }
    return any(counts[success](t) for t in tallies if env in (None, t.env) and split in (None, t.split))
