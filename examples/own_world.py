"""A world of your own: words that count only when they are shouted. Run it: python examples/own_world.py [MODEL]"""

import sys

import engrain
from agent.rollout import play
from engrain import Env, Observation, Split, Step, Task, World


class ShoutEnv(Env):
    def reset(self) -> Observation:
        self.heard = False
        return Observation(f"Announce guest number {self.task.parameters['guest']}.")

    def step(self, text: str) -> Step:
        self.heard = text.isupper() and str(self.task.parameters["guest"]) in text
        feedback = "Heard." if self.heard else "Nobody heard you. Only words IN CAPITAL LETTERS are heard."
        return Step(Observation(""), reward=float(self.heard), done=True, feedback=feedback)

    @property
    def score(self) -> float:
        return float(self.heard)


@engrain.register_world  # for this script; the entry point in pyproject.toml does the same for every process
class ShoutWorld(World):
    name = "shout"
    isolated = False  # its episodes can neither crash nor hang, so they need no process of their own

    @classmethod
    def configure(cls, options):
        return cls()

    def tasks(self, split, count, seed=0):
        guests = (4 * (1000 * seed + i) + list(Split).index(split) for i in range(count))  # no two splits share one
        return [Task.create(self.name, split, seed, {"guest": guest}) for guest in guests]

    @classmethod
    def make(cls, task):
        return ShoutEnv(task)


def main(model: str = "smollm2-135m") -> None:
    engine = engrain.TransformersEngine(engrain.resolve(model), name=model)
    greedy = engrain.SamplingParams(temperature=0.0, max_tokens=16)
    tasks = ShoutWorld.configure({}).tasks(Split.TEST, 4)
    for knowledge in (None, "Write every word in capital letters, like this: GUEST NUMBER 12 IS HERE"):
        episodes = play(tasks, engine, sampling=greedy, namespace=f"shout/{knowledge}", knowledge=knowledge)
        solved = sum(episode.success for episode in episodes)
        print(f"{'with' if knowledge else 'without'} knowledge: {solved} of {len(episodes)} heard")
        print(f"  {episodes[0].turns[0].action!r}: {episodes[0].feedback}")


if __name__ == "__main__":
    main(*sys.argv[1:])
