"""A conversation as a prompt, in the server as in the terminal: what is left of one that exceeds the context."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from nanochat.common import UserError

ANSWER_SHARE = 4  # at most one part in so many of the context is kept free for the answer; an assumption, not studied


@dataclass
class Turn:
    """A question and its answer: the parts of a conversation, and its tokens where a model wrote it here.

    The text of an answer, encoded anew, may be other tokens than those that were written.
    """
    question: str
    parts:    list[dict] = field(default_factory=list)
    tokens:   list[int] | None = None  # without the end token; None: the parts are encoded


class NoRoom(UserError):
    """The prompt leaves no room for an answer."""


def build_prompt(tokenizer, system: str, turns: Sequence[Turn], context_tokens: int, max_tokens: int,
                 is_base: bool) -> tuple[list[int], int]:
    """The prompt for an answer to the last of `turns`, and how many of the oldest had to be dropped for it to fit.

    max_tokens: that the answer may have; turns are dropped until there is room for them or for a share of the context.
                The system message and the last question stay; NoRoom where they alone are too long
    is_base: the model knows no conversations, so the prompt is their texts, between blank lines
    """
    render = render_texts if is_base else render_turns
    limit = context_tokens - min(max_tokens, context_tokens // ANSWER_SHARE)
    tokens, num_dropped = render(tokenizer, system, turns), 0
    if len(tokens) > limit:  # more dropped is never longer
        num_dropped = bisect.bisect_left(range(len(turns) - 1), True, key=lambda number: len(
            render(tokenizer, system, turns[number:])) <= limit)
        tokens = render(tokenizer, system, turns[num_dropped:])
    check_context(tokens, context_tokens)
    return tokens, num_dropped


def render_turns(tokenizer, system: str, turns: Sequence[Turn]) -> list[int]:
    """A conversation as in training, up to the beginning of the last turn's answer."""
    tokens = []
    for turn in turns:
        messages = [{"role": "system", "content": system}] if system and not tokens else []
        messages.append({"role": "user", "content": turn.question})
        question = tokenizer.render_for_completion({"messages": messages})
        tokens += question[1:] if tokens else question  # bos begins a conversation, not each of its turns
        if turn is not turns[-1]:
            tokens += encode_answer(tokenizer, turn.parts) if turn.tokens is None else turn.tokens
            tokens.append(tokenizer.encode_special("<|assistant_end|>"))
    return tokens


def encode_answer(tokenizer, parts: list[dict]) -> list[int]:
    """The parts of an answer as in training, without its end token."""
    question = {"role": "user", "content": ""}
    begin = tokenizer.render_for_completion({"messages": [question]})
    answer = {"role": "assistant", "content": parts}
    return tokenizer.render_conversation({"messages": [question, answer]}, max_tokens=None)[0][len(begin):-1]


def render_texts(tokenizer, system: str, turns: Sequence[Turn]) -> list[int]:
    """The texts of a conversation as one document, for a model that only completes."""
    answers = ["".join(part["text"] for part in turn.parts) for turn in turns[:-1]]
    texts = [text for turn, answer in zip(turns, [*answers, None], strict=True) for text in (turn.question, answer)]
    return tokenizer.encode("\n\n".join(([system] if system else []) + texts[:-1]),
                            prepend=tokenizer.get_bos_token_id())


def check_context(tokens: Sequence[int], context_tokens: int) -> None:
    """Refuse a prompt that leaves no room for an answer."""
    if len(tokens) >= context_tokens:
        raise NoRoom(f"{len(tokens)} tokens leave no room for an answer in this model's context of {context_tokens}; "
                     "shorten the text")
