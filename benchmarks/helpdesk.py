"""A world for distilling a written prompt: sort messages to a power company by labels that only the prompt tells.

Messages are made from templates with names, places and numbers; each split has templates of its own, so a test
message is of a kind that was never trained on. Without the prompt no model can know the labels, nor that one is
wanted. Importing this module registers the world `helpdesk` in this process.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from envs.base import Env, Observation, Split, Step, Task, World
from envs.errors import UsageError
from envs.registry import register_world

#: The written prompt. It is what is distilled; nothing else tells the labels.
PROMPT = """You sort the messages that customers send to a power company. Read the message and reply with one label \
and nothing else. Do not explain, do not greet, do not repeat the message.

The labels:
BILL is for money: a bill, a payment, a refund, a direct debit, a price.
OUTAGE is for supply: the power is off, the lights flicker, a fuse blows again and again.
MOVE is for moving: somebody moves in or out, or wants to begin or end a contract.
METER is for the meter: a reading, a broken display, a new meter, a visit to read it.
ONLINE is for the website and the app: a password, a login, a page that does not load.

How to choose:
- Choose by what the customer wants done, not by the words in which the message begins.
- If a message speaks of two things, the last one that is asked for decides.
- Politeness, anger and thanks do not matter.

Examples:
"The bill of May is wrong." -> BILL
"No light in the whole house." -> OUTAGE
"I will live somewhere else from May on." -> MOVE
"The counter stands at 40112." -> METER
"I cannot log in." -> ONLINE
"Please pay back what I paid too much." -> BILL
"The fuse goes out again and again." -> OUTAGE
"I would like to end the contract." -> MOVE
"A new meter, please." -> METER
"The app does not open." -> ONLINE

Reply with one of these five words in capital letters: BILL, OUTAGE, MOVE, METER, ONLINE."""

LABELS = ("BILL", "OUTAGE", "MOVE", "METER", "ONLINE")
#: By label: six templates for training, four for validation, twelve for tests.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "BILL": (
        "My bill for {month} is {amount} euros, and I do not understand why it is so high.",
        "I paid {amount} euros on the {day}th of {month} and you still send me reminders.",
        "When do I get back the {amount} euros that I paid twice in {month}?",
        "{name} here. Please change my direct debit to the {day}th of each month.",
        "Could I pay the {amount} euros in three parts?",
        "What does a unit of power cost from {month} on?",
        "There is a charge of {amount} euros in {month} that I never agreed to.",
        "{name} speaking, please send me the invoice of {month} once more.",
        "You took {amount} euros from my account, but the bill says less.",
        "I would like my refund of {amount} euros before the end of {month}.",
        "{name} here, is there a cheaper price for people who use little?",
        "Why has my monthly payment gone up to {amount} euros since {month}?",
        "Your reminder says I owe {amount} euros. I paid them on the {day}th, look again.",
        "{name} here. I want to pay {amount} euros a month from {month} on, not what I pay now.",
        "Two payments of {amount} euros left my account in {month}. One of them is yours by mistake.",
        "Do I pay less at night? What would a unit be after {hour} o'clock?",
        "I cannot pay the {amount} euros before {month}. May I have more time?",
        "Why do I pay a basic fee when I was away in {month}?",
        "Please split the invoice between {name} and me.",
        "The tax on my statement of {month} is wrong, I think.",
        "{name}: from which account did the {amount} euros come that you sent me?",
        "Send the next statement to {street} {day}, where my accountant {name} sits.",
    ),
    "OUTAGE": (
        "We have had no power in {street} since {hour} o'clock.",
        "The lights in my kitchen flicker every evening around {hour}.",
        "{name}, {street} {day}. The main fuse goes out whenever I cook.",
        "Half of my house is dark, the other half is fine. It began at {hour}.",
        "Is there an outage in {street}? Nothing works here.",
        "The supply fails for a few seconds each night, at {hour} or so.",
        "All sockets on the upper floor are dead since this morning at {hour}.",
        "Our street, {street}, is without electricity again.",
        "The power went off at {hour} and has not come back yet, says {name}.",
        "My lamps grow dim and bright again all the time in {street} {day}.",
        "Since the storm there is no electricity at {street} {day}, please send somebody.",
        "The fuse box trips three times a day, today at {hour} again.",
        "It is dark in all of {street}, and my phone is at {day} percent.",
        "A tree has fallen on the line near {street} {day} and we have no current.",
        "When will we have light again? It has been {hour} hours now.",
        "{name} here, the oven and the heater died at the same moment, at {hour}.",
        "There was a bang outside at {hour} and then everything stopped.",
        "My freezer is thawing, nothing has worked in {street} since {hour}.",
        "Each time I switch on the kettle the whole flat goes black.",
        "The lift in {street} {day} stands still, there is no current in the house.",
        "Sparks come out of the box on the pole in front of {street} {day}.",
        "Only one of three phases works in our workshop in {street}, says the electrician.",
    ),
    "MOVE": (
        "I am moving out of {street} {day} on the first of {month}.",
        "{name} here, I have bought a flat in {street} and need a contract from {month}.",
        "Please end my contract at the end of {month}.",
        "My mother {name} has moved to a home. How do I cancel her contract?",
        "From {month} on I live in {street} {day}. Please take the contract along.",
        "We are the new tenants of {street} {day} and want to sign up.",
        "I want to give notice for {month}, because I go abroad.",
        "{name} and I move in together in {month}; we need one contract instead of two.",
        "I leave my flat in {street} in {month}, what must I do?",
        "How do I become your customer? I get the keys to {street} {day} in {month}.",
        "Please close the account of {name}, who moved away in {month}.",
        "My shop moves to {street} {day}. Can the contract move with it?",
        "{name} has died, and I have to end what he had with you in {month}.",
        "We sold our house in {street} in {month}. Who tells you, we or the buyers?",
        "My lease in {street} {day} runs out in {month}, so I need you no longer.",
        "I will get the keys in {street} on the {day}th of {month}; how do I sign up with you?",
        "Our company gives up its office in {street} {day} in {month}.",
        "My son {name} takes over my flat, and shall become your customer in my place.",
        "I have found another supplier, and want to leave you in {month}.",
        "Can I take you with me when I go to {street} {day} in {month}?",
        "{name} moves in with me in {street}. Does the contract have to be changed?",
        "A new tenant comes into {street} {day} on the {day}th of {month}. Here is the name: {name}.",
    ),
    "METER": (
        "My meter shows {reading} today, the {day}th of {month}.",
        "The display of the meter in {street} {day} is black.",
        "Your man came to read the meter and nobody was at home. When does he come again?",
        "{name}: the reading is {reading}, please write it down.",
        "I would like one of the new digital meters.",
        "The meter runs although everything is switched off. Please test it.",
        "I forgot to tell you the reading for {month}: it is {reading}.",
        "The digits on my meter cannot be read any more, {name} in {street}.",
        "Here is the number on the counter in the cellar: {reading}. Regards, {name}.",
        "Somebody should look at the meter in {street} {day}, it makes a noise.",
        "When will the old meter in my house be replaced? You said {month}.",
        "Last month I wrote {reading} by mistake. What is on the meter is less, please correct the reading.",
        "The little wheel in the cellar of {street} {day} does not turn any more.",
        "I read {reading} this morning, but last month it was more. Something is broken.",
        "A card in my letter box asks me for the number. It is {reading}.",
        "Your reader could not get into the cellar in {street}. {name} has the key.",
        "Which of the two counters in {street} {day} is mine?",
        "The seal on my counter is open, I did not do that. {name}.",
        "The new device in the hall blinks red since {hour}.",
        "I shall send you the figure on the {day}th of {month}, where do I find it?",
        "{name} here: {reading}, read on the {day}th of {month}, for {street} {day}.",
        "My neighbour has a smart one. When do I get mine in {street}?",
    ),
    "ONLINE": (
        "I have forgotten my password, user name {name}.",
        "The app closes as soon as I open it, since {month}.",
        "Your page says error {reading} when I want to log in.",
        "{name} here. I do not get the mail with the link to set a new password.",
        "The website has been loading for {day} minutes and nothing happens.",
        "How do I change the mail address in my online account?",
        "The app does not know my customer number any more.",
        "I cannot sign in on your website since the {day}th, says {name}.",
        "My account on the internet is locked after three attempts.",
        "The button to download documents on your site does nothing, I tried on the {day}th.",
        "{name} speaking, the app on my phone asks for a code that never comes.",
        "I get a white page when I open the customer portal at {hour}.",
        "I get no code on my phone when I sign in, {name}.",
        "Your page wants me to confirm I am no robot, over and over, since {hour}.",
        "The graph of my consumption on the website stays empty in {month}.",
        "Please delete my web account {name}{reading}, I write letters from now on.",
        "After the update of {month} the app is in another language.",
        "The link in your mail of the {day}th leads to nothing.",
        "I have two user accounts, {name} and {name}{day}. Can you make one of them?",
        "My browser says that your certificate ran out in {month}.",
        "The portal throws me out after {day} seconds.",
        "I typed the wrong password {hour} times and now it says wait.",
    ),
}
_PLACES = {Split.TRAIN: range(6), Split.VALIDATION: range(6, 10), Split.TEST: range(10, 22)}
_NAMES = ("Anna Berg", "Tom Hale", "Mira Costa", "Jan Novak", "Lea Stone", "Omar Aziz", "Eva Lind", "Paul Reed")
_STREETS = ("Mill Lane", "Station Road", "Oak Street", "High Street", "Church Way", "River Walk", "Park Road")
_MONTHS = ("January", "March", "April", "June", "July", "September", "October", "December")


class HelpdeskEnv(Env):
    """One message, one reply: 1 where the reply is the right label, whatever stands after it."""

    max_turns = 1

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._right = False

    def reset(self) -> Observation:
        return Observation(str(self.task.parameters["message"]))

    def step(self, text: str) -> Step:
        self._right = re.findall(r"\w+", text)[:1] == [self.task.parameters["label"]]
        return Step(Observation(""), float(self._right), done=True)

    @property
    def score(self) -> float:
        return float(self._right)


@register_world
class HelpdeskWorld(World):
    """Messages to a power company."""

    name: ClassVar[str] = "helpdesk"
    isolated: ClassVar[bool] = False

    @classmethod
    def configure(cls, options: Mapping[str, Any]) -> HelpdeskWorld:
        if options:
            raise UsageError(f"env 'helpdesk' has no options, and was given {', '.join(options)}")
        return cls()

    def tasks(self, split: Split, count: int, seed: int = 0) -> list[Task]:
        if split not in _PLACES:
            raise UsageError(f"env 'helpdesk' has no split {split.value!r}")
        made: dict[str, Task] = {}
        for draw, (label, place, message) in enumerate(self._messages(split, seed)):
            parameters = {"message": message, "label": label, "template": f"{label} {place}"}
            task = Task.create(self.name, split, seed, parameters)
            made.setdefault(message, task)
            if len(made) == count:
                return list(made.values())
            if draw > 100 * count + 10_000:
                break
        raise UsageError(f"env 'helpdesk' has {len(made)} tasks in split {split.value!r}, {count} were asked for")

    @staticmethod
    def _messages(split: Split, seed: int) -> Iterator[tuple[str, int, str]]:
        draw = random.Random(f"{split.value}/{seed}")
        while True:
            for label in draw.sample(LABELS, len(LABELS)):
                place = draw.choice(_PLACES[split])
                yield label, place, TEMPLATES[label][place].format(
                    name=draw.choice(_NAMES), street=draw.choice(_STREETS), month=draw.choice(_MONTHS),
                    day=draw.randint(2, 28), hour=draw.randint(1, 12), amount=draw.randint(20, 900),
                    reading=draw.randint(10_000, 99_999),
                )  # fmt: skip

    @classmethod
    def make(cls, task: Task) -> HelpdeskEnv:
        return HelpdeskEnv(task)
