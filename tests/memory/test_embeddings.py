"""What words leave open: paraphrases that share few of them, and near misses that share most."""

import pytest

from envs.errors import UsageError
from memory.embeddings import PACKAGE, Embedder, load
from memory.normalise import NEAR, similarity

SAME = """\
Always write the answer in this form: <answer>12</answer> | The final answer must look like this: <answer>12</answer>
Always write the answer in this form: <answer>12</answer> | Put your answer between tags, such as <answer>12</answer>
Look at the map of the house when you are lost | When lost, look at the house map
Pick up the coin as soon as you see it | Take the coin at once when it is in the room
Explore rooms that are new to you | Visit unexplored rooms
Open the fridge to find ingredients | The fridge must be opened to get at the ingredients
Push the box onto the target square | The box has to be pushed onto the goal square
Read the recipe in the cookbook | The cookbook holds the recipe: read it
Give the answer as a JSON object: {"answer": 12} | Answer with a JSON object like this: {"answer": 12}
Reply with a single command on a line | Every reply must be one command on a line
Check the sum digit by digit | Verify the addition one digit at a time
Use the knife to slice vegetables | Vegetables are sliced with the knife
Reach the goal in as few moves as possible | Take the shortest path to the goal
Examine the cookbook in the kitchen to see what to cook | To see what to cook, examine the cookbook in the kitchen
Write the final result inside \\boxed{} | The result must be placed inside \\boxed{}
Keep the reply short and give just the number | Reply briefly with just the number
Look at your inventory to know what you carry | Check the inventory to see what you are carrying
Type the action in lower case | Actions must be written in lowercase letters"""
DIFFERENT = """\
Take the red key to the cellar | Take the blue key to the attic
Cook the carrot in the oven | Cook the carrot on the stove
Use the knife to slice vegetables | Use the knife to dice vegetables
Use the knife to slice vegetables | Use the knife to threaten the guard
Push the box onto the target square | Pull the box off the target square
Look at the map when you are lost | Look at the clock when you are late
Read the recipe in the cookbook | Eat the meal in the cookbook
Give the answer as a JSON object | Give the answer as a JSON list
Reply with a single command | Reply with a single number
Open the fridge to find ingredients | Open the chest to find coins
Check the inventory to see what you carry | Check the room to see what lies there
Go through the wooden door to the garden | Go through the iron gate to the garden
Fry the apple | Grill the apple
Sort the words by length | Sort the words by their last letter
Add the digits from the right | Add the numbers from the list
Type the action in lower case | Type the action in full sentences
Explore rooms that are new to you | Rest in rooms that are new to you
Write the result in metres | Write the result in feet
Take the shortest path to the goal | Take the safest path to the goal
Ask the guard about the password | Ask the guard about the weather
Open the door before you enter | Close the door before you enter
Go north first | Go south first
Push the box to the left | Push the box to the right
Take the coin at once | Drop the coin at once
Always write the answer in tags | Always write the answer in capital letters
Read the recipe before cooking | Eat the meal after cooking
Open the fridge before you cook anything | Close the fridge after you cook anything
Check the arithmetic before answering | Answer the arithmetic before checking
Explore every room that you have not seen yet | Do the tasks in the room that you see
Wait three turns at the gate | Wait five turns at the gate"""


def pairs(text):
    return [tuple(line.split(" | ")) for line in text.split("\n")]


def test_meaning_merges_eight_of_eighteen_paraphrases_and_no_near_miss():
    pytest.importorskip(PACKAGE)
    embedder = load()
    assert sum(embedder.likeness(a, b) >= NEAR for a, b in pairs(SAME)) == 8
    assert [pair for pair in pairs(DIFFERENT) if embedder.likeness(*pair) >= NEAR] == []


def test_words_alone_merge_one_and_no_near_miss():
    assert sum(similarity(a, b) >= NEAR for a, b in pairs(SAME)) == 1
    assert [pair for pair in pairs(DIFFERENT) if similarity(*pair) >= NEAR] == []


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no folder with a config\.json"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="cannot be loaded"):
        Embedder(tmp_path)(["a"])
    assert load("none") is None


def test_without_the_extra_there_is_no_embedder(monkeypatch):
    load.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    try:
        assert load("auto") is None
    finally:
        load.cache_clear()
