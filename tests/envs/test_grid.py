import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from envs import layouts, registry
from envs.base import Split, Task
from envs.errors import BadTaskError, EnvFailedError, UsageError

NAMES = ("up", "down", "left", "right")
RULES = ("safe", "Hole", "Goal", "win", "push all", "targets", "Objective", "Walls", "represented")


def task(world, board, turns=5):
    return Task.create(world, Split.TRAIN, 0, {"board": board, "max_turns": turns})


def play(made, replies):
    env = registry.make(made)
    transcript = [env.reset().text]
    for reply in replies:
        step = env.step(reply)
        transcript.append((step.observation.text, step.reward, step.done, step.feedback))
        if step.done:
            break
    return env, transcript


def test_lakes_are_the_boards_that_textarena_makes_of_the_seed():
    from textarena.envs.FrozenLake.env import FrozenLakeEnv

    kept = random.getstate()
    for corners in (False, True):
        for seed in range(40):
            theirs = FrozenLakeEnv(size=4, num_holes=4, randomize_start_goal=corners)
            theirs.reset(num_players=1, seed=seed)
            rows = [list(row) for row in theirs.state.game_state["grid"]]
            row, column = theirs.state.game_state["player_pos"]
            rows[row][column] = "P"
            assert layouts.lake(seed, 4, 4, random_corners=corners) == tuple(map("".join, rows))
    random.setstate(kept)


def test_sokoban_rooms_are_the_rooms_that_textarena_makes_of_the_seed():
    from textarena.envs.Sokoban.env import SokobanEnv

    for seed in range(10):
        theirs = SokobanEnv(dim_room=(6, 6), num_boxes=1)
        theirs.reset(num_players=1, seed=seed)
        room = theirs.create_board_str(theirs.room_state).split("\n")[:6]
        assert [row.replace("S", "P") for row in layouts.sokoban(seed, 6, 1)] == [row.replace(" ", "") for row in room]


def test_boards_ignore_and_leave_the_global_generator():
    random.seed(1)
    before = random.getstate()
    for name in ("frozenlake", "sokoban"):
        first = registry.world(name).tasks(Split.TRAIN, 3)
        play(first[0], ["[down]", "[right]"])
        assert random.getstate() == before
        random.seed(2)
        assert registry.world(name).tasks(Split.TRAIN, 3) == first
        random.seed(1)


@pytest.mark.parametrize("name", ["frozenlake", "sokoban"])
def test_many_at_once_play_as_alone(name):
    tasks = registry.world(name).tasks(Split.TRAIN, 12)
    replies = [[f"[{random.Random(i * 9 + j).choice(NAMES)}]" for j in range(5)] for i in range(12)]
    alone = [play(made, moves)[1] for made, moves in zip(tasks, replies, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        assert [transcript for _, transcript in pool.map(play, tasks, replies)] == alone
        assert all(made == tasks for made in pool.map(lambda _: registry.world(name).tasks(Split.TRAIN, 12), range(4)))


@pytest.mark.parametrize(("name", "size", "turns"), [("frozenlake", 3, 5), ("sokoban", 6, 5)])
def test_the_papers_sizes_and_no_rules_in_the_prompt(name, size, turns):
    for made in registry.world(name).tasks(Split.TRAIN, 5):
        env = registry.make(made)
        text = env.reset().text
        assert env.system == ""
        assert len(env.board) == size
        assert env.max_turns == turns
        assert sum(row.count("H") for row in env.board) == (2 if name == "frozenlake" else 0)
        assert text.startswith("Current Board:")
        assert not [rule for rule in RULES if rule in text]


def test_reaching_the_goal():
    env, transcript = play(task("frozenlake", ["P H", "  H", "  G"]), ["[down]", "I go [s]", "[right]", "[RIGHT]"])
    assert transcript[-1][1:] == (1.0, True, "Congratulations! You reached the goal!")
    assert env.score == 1
    assert env.success


def test_falling_into_a_hole():
    env, transcript = play(task("frozenlake", ["PH ", "  H", "  G"]), ["[right]"])
    assert transcript[-1][1:3] == (0.0, True)
    assert transcript[-1][3].startswith("You fell into a hole! Game over.")
    assert not env.success
    with pytest.raises(EnvFailedError, match="not being played"):
        env.step("[down]")


def test_running_out_of_turns_counts_every_reply():
    lake = task("frozenlake", ["P H", "  H", "  G"])
    _, transcript = play(lake, ["up", "[down]", "[up]", "[down]", "[up]", "[down]"])
    assert len(transcript) == 6
    assert "Invalid action format" in transcript[1][0]
    assert transcript[-1][3].startswith("You reached the turn limit!")
    _, transcript = play(lake, ["[up]", "[left]"])
    assert transcript[-1][1:] == (0.0, True, "Invalid Move: You tried to move left but hit a wall!")


def test_solving_a_room_and_not():
    room = task("sokoban", ["######", "#_S__#", "#_X__#", "#____#", "#____#", "######"])
    env, transcript = play(room, ["[down]"])
    assert not env.success
    assert transcript[1][0].count("O") == 1 + "Current Board".count("O")
    room = task("sokoban", ["######", "#_P__#", "#_X__#", "#_O__#", "#____#", "######"])
    env, transcript = play(room, ["[s]"])
    assert env.success
    assert transcript[-1][3] == "Congratulations! You have solved the Sokoban puzzle!"
    _, transcript = play(room, ["[left]", "[right]", "[left]", "[right]", "[left]"])
    assert transcript[-1][3] == "The turn limit has been reached. You did not solve the puzzle."


@pytest.mark.parametrize("name", ["frozenlake", "sokoban"])
@pytest.mark.parametrize("split", [Split.TEST, Split.OOD])
def test_every_task_can_be_solved_in_its_turns(name, split):
    moves = layouts.lake_moves if name == "frozenlake" else layouts.sokoban_moves
    for made in registry.world(name).tasks(split, 3):
        solution = _solution(registry.make(made))
        assert len(solution) == moves(tuple(made.parameters["board"])) <= registry.make(made).max_turns
        assert play(made, solution)[0].success


def _solution(env):
    """A shortest list of moves that wins, found by playing."""
    paths = [[]]
    while paths:
        path = paths.pop(0)
        played, transcript = play(env.task, path)
        if played.success:
            return path
        if not path or not (transcript[-1][2] or "invalid" in transcript[-1][0]):
            paths += [[*path, f"[{name}]"] for name in NAMES]
    raise AssertionError("unsolvable")


def test_a_small_board_has_few_layouts_and_says_how_many():
    known = {split: registry.world("frozenlake")._known(split) for split in Split}
    assert sum(known[split] for split in (Split.TRAIN, Split.VALIDATION, Split.TEST)) == len(
        list(layouts.all_lakes(3, 2))
    )
    assert len(registry.world("frozenlake").tasks(Split.TEST, known[Split.TEST])) == known[Split.TEST]
    with pytest.raises(UsageError, match=rf"has {known[Split.TEST]} boards in split 'test', 64 were asked"):
        registry.world("frozenlake").tasks(Split.TEST, 64)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [("frozenlake", {"size": "3", "holes": "7"}, "holes=7"), ("sokoban", {"size": "two"}, "size='two'")],
)
def test_bad_options(name, options, words):
    with pytest.raises(UsageError, match=words):
        registry.world(name, options)


@pytest.mark.parametrize("board", [["P", "G"], ["  ", "  "], []])
def test_bad_boards(board):
    with pytest.raises(BadTaskError):
        registry.make(task("frozenlake", board)).reset()
