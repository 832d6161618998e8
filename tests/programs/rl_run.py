"""A run of RL on tasks whose rewards any model earns: python -m tests.programs.rl_run TAG [FLAGS OF chat_rl ...]"""

import sys

from scripts import chat_rl
from tasks.catalog import REWARD_TASKS, TASKS
from tasks.common import Task


class Vowels(Task):
    """The more of an answer are vowels, the better: easily learned by any model."""

    def num_examples(self):
        return 30

    def get_example(self, index):
        return {"messages": [{"role": "user", "content": f"Say {'e' * (index % 7 + 1)}!"},
                             {"role": "assistant", "content": "e"}]}

    def reward(self, conversation, answer):
        return sum(letter in "aeiou" for letter in answer) / max(1, len(answer))


class Flat(Vowels):
    """All answers are worth the same."""

    def reward(self, conversation, answer):
        return 0.1


def train(tag, *more):
    REWARD_TASKS.extend(["Vowels", "Flat"])
    TASKS["Vowels"], TASKS["Flat"] = lambda split, **kwargs: Vowels(**kwargs), lambda split, **kwargs: Flat(**kwargs)
    return chat_rl.main(["-g", "toy", "--out-tag", tag, "-a", "Vowels", "--examples-per-step", "4", "--num-samples",
                         "4", "--max-new-tokens", "8", "--num-iterations", "6", "--eval-every", "3",
                         "--eval-examples", "4", "--eval-samples", "2", "--init-lr-frac", "0.5", "--device-type",
                         "cpu", *more])


if __name__ == "__main__":
    train(*sys.argv[1:])
