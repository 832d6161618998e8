"""Spelling, which tokens hide from a language model: SimpleSpelling spells a word, SpellingBee counts a letter in it.

A word is in train or in test, whatever the list.
"""

import re
import string
from collections.abc import Sequence
from random import Random

from nanochat.common import UserError
from nanochat.execution import calculate
from tasks.common import GeneratedTask, extract_answer, get_reference, is_test, make_rng
from tasks.words import load_words

SPELL_QUESTIONS = (
    "Spell the word {word}.",
    "Spell {word}.",
    "How do you spell {word}?",
    "How is {word} spelled?",
    "Please spell {word} letter by letter.",
    "Can you spell {word} for me?",
    "What are the letters of {word}?",
    "Write {word} one letter at a time.",
)
COUNT_QUESTIONS = (
    "How many {letter} are in {word}?",
    "How many {letter} are there in {word}?",
    "How many {letter}s are in {word}?",
    "How many times does {letter} appear in {word}?",
    "How many times does the letter {letter} occur in the word {word}?",
    "How often does {word} contain the letter {letter}?",
    "Count the letter {letter} in {word}.",
    "Count how many times {letter} is in {word}.",
    "What is the number of {letter} in {word}?",
    "In the word {word}, how many {letter} are there?",
    "Can you count the {letter}'s in {word}?",
    "{word}: how many {letter}?",
)
QUOTES = ("", "", "'", '"')     # around a word or letter of a question; most people write none
ABSENT_LETTER_FRAC = 0.1        # of the counts ask for a letter that needn't be in the word


class SimpleSpelling(GeneratedTask):
    """Spell a word. Blanks between the letters make each letter a token, the same in every word."""

    questions = SPELL_QUESTIONS

    def __init__(self, split: str, size: int = 1000, seed: int = 0, words: Sequence[str] | None = None,
                 **kwargs) -> None:
        """words: what to spell, by default `load_words()`; size: how many conversations"""
        super().__init__(split, size, seed, **kwargs)
        self.words = [word for word in words or load_words() if is_test(word) == (split == "test")]
        if not self.words:
            raise UserError(f"{type(self).__name__} has no word for its split {split}; give it more words")

    def get_example(self, index: int) -> dict:
        rng = make_rng(self.seed, type(self).__name__, self.split, index)
        word = rng.choice(self.words)
        question, answer = self.make_turns(word, rng)
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
                "word": word}

    def make_turns(self, word: str, rng: Random) -> tuple[str, str | list[dict]]:
        """A question about `word`, and the answer."""
        return write_question(self.questions, rng, word=word), " ".join(word)

    def evaluate(self, conversation: dict, answer: str) -> bool:
        """The letters that stand alone in the answer must be the word's."""
        return "".join(re.findall(r"\b[a-z]\b", answer.lower())) == conversation["word"]

    def reward(self, conversation: dict, answer: str) -> float:
        return float(self.evaluate(conversation, answer))


class SpellingBee(SimpleSpelling):
    """Count a letter in a word: spell it, count by hand, check with Python."""

    questions = COUNT_QUESTIONS

    def make_turns(self, word: str, rng: Random) -> tuple[str, list[dict]]:
        letter = rng.choice(string.ascii_lowercase if rng.random() < ABSENT_LETTER_FRAC else word)
        call = f"'{word}'.count('{letter}')"
        value = calculate(call)
        answer = [{"type": "text", "text": count_by_hand(word, letter) + "Python: "},
                  {"type": "python", "text": call},
                  {"type": "python_output", "text": value},
                  {"type": "text", "text": f"\n\n#### {value}"}]
        return write_question(self.questions, rng, word=word, letter=letter), answer

    def evaluate(self, conversation: dict, answer: str) -> bool:
        """The number after #### must be right."""
        return extract_answer(answer) == extract_answer(get_reference(conversation))


def write_question(questions: Sequence[str], rng: Random, **fields: str) -> str:
    """One of `questions` as different people type it: with or without quotes, capitals, and the mark at its end."""
    quoted = {}
    for name, text in fields.items():
        quote = rng.choice(QUOTES)
        quoted[name] = f"{quote}{text}{quote}"
    question = rng.choice(questions).format(**quoted)
    if rng.random() < 0.2:
        question = question[0].lower() + question[1:]
    return question.rstrip("?.") if rng.random() < 0.2 else question


def count_by_hand(word: str, letter: str) -> str:
    """A word spelled, then one letter per line with the count so far beside each one that counts."""
    lines, count = [" ".join(word), ""], 0
    for character in word:
        count += character == letter
        lines.append(f"{character} {count}" if character == letter else character)
    return "\n".join([*lines, "", f"By hand: {count}", ""])
