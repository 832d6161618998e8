"""A request and its answer, token by token: text, tool calls, when it ends. No tensors; engine.py finds the tokens.

A completed tool call is answered here: `Generation.append` inserts the calculator's output after it, with mask 0.
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nanochat.calculator import calculate
from nanochat.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """A prompt, its sampling parameters and its stopping criteria."""
    tokens:       Sequence[int]            # the prompt, at least bos
    max_tokens:   int | None = None        # tool output included; None: until the model's positions are used up
    temperature:  float = 1.0              # these five as in sampling.Sampling
    top_k:        int | None = None
    top_p:        float | None = None
    seed:         int = 42
    sample:       int = 0
    stop:         tuple[str, ...] = ()     # stop strings: the text ends before the first one
    num_logprobs: int | None = None        # 0: log-probability of the chosen token; n: of the n likeliest as well

    def get_sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed, self.sample)


@dataclass(frozen=True)
class Usage:
    """Token counts of a finished request."""
    prompt_tokens:     int
    cached_tokens:     int  # of the prompt, copied from a row instead of prefilled
    completion_tokens: int  # end token and tool output included


@dataclass(frozen=True)
class Logprobs:
    """Natural log-probabilities of the model itself: temperature 1, no top-k, no top-p."""
    chosen:    float
    likeliest: tuple[tuple[int, float], ...]  # (token, log-probability), the likeliest first


@dataclass(frozen=True)
class Event:
    """One new token of a request."""
    request_id:    int
    token:         int
    mask:          int                    # 1: sampled, 0: inserted by the calculator
    part:          str                    # 'text', 'python' or 'python_output', as in a conversation's parts
    text:          str = ""               # text to show now: whole characters, no special tokens, no stop strings
    logprobs:      Logprobs | None = None
    finish_reason: str | None = None      # last token only: 'stop' (end token or stop string), 'length' (no room)
    usage:         Usage | None = None    # last token only


class ChatTokens:
    """The special tokens that the engine acts on; None where a published vocabulary lacks one, so it never matches."""

    def __init__(self, tokenizer):
        find = tokenizer.get_special_tokens().get
        self.python_start, self.python_end = find("<|python_start|>"), find("<|python_end|>")
        self.output_start, self.output_end = find("<|output_start|>"), find("<|output_end|>")
        self.end_tokens = frozenset((find("<|assistant_end|>"), tokenizer.get_bos_token_id()))


class TextStream:
    """Incremental detokenizer: emits whole UTF-8 characters only, and no part of a stop string."""

    def __init__(self, tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False  # a stop string is complete
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""        # end of the text that may still become a stop string

    def feed(self, token: int) -> str:
        """The text that can be shown now."""
        return self._release(self.decoder.decode(self.tokenizer.decode_bytes([token])))

    def flush(self) -> str:
        """The text held back, when no more follows; incomplete UTF-8 becomes U+FFFD."""
        text = self._release(self.decoder.decode(b"", final=True)) + self.held
        self.held = ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        if not self.stop:
            return text
        text = self.held + text
        found = [start for stop in self.stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[:min(found)]
        longest = max(map(len, self.stop)) - 1
        num_held = next((n for n in range(min(longest, len(text)), 0, -1)
                         if any(stop.startswith(text[-n:]) for stop in self.stop)), 0)
        self.held = text[len(text) - num_held:]
        return text[:len(text) - num_held]


def stream_text(tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of a stream of tokens, in whole characters; bytes that aren't UTF-8 become U+FFFD."""
    stream = TextStream(tokenizer)
    for token in tokens:
        if text := stream.feed(token):
            yield text
    if text := stream.flush():
        yield text


class Generation:
    """A request in progress: its tokens so far, its tool call, its text stream."""

    def __init__(self, request_id: int, request: Request, max_length: int, tokenizer, chat_tokens: ChatTokens):
        """max_length: tokens of prompt and answer together"""
        self.id, self.request, self.max_length = request_id, request, max_length
        self.sampling = request.get_sampling()
        self.tokenizer, self.chat_tokens = tokenizer, chat_tokens
        self.tokens = list(request.tokens)     # prompt and answer
        self.masks = [0] * len(self.tokens)
        self.num_prompt = len(self.tokens)
        self.num_reused = 0                    # prompt tokens copied from a row
        self.part = "text"
        self.call: list[int] = []              # tokens of the unfinished tool call
        self.stream = TextStream(tokenizer, request.stop)
        self.finish_reason: str | None = None
        self.has_events = True                 # whether Engine.step returns its tokens

    def append(self, token: int, mask: int = 1, logprobs: Logprobs | None = None) -> list[Event]:
        """Add a token; one that completes a tool call is followed by the calculator's output, with mask 0."""
        self.tokens.append(token)
        self.masks.append(mask)
        part, text, result = self._parse(token)
        if token in self.chat_tokens.end_tokens or self.stream.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_length:
            self.finish_reason = "length"
        usage = None
        if self.finish_reason:
            text += self.stream.flush()
            usage = Usage(self.num_prompt, self.num_reused, len(self.tokens) - self.num_prompt)
        events = [Event(self.id, token, mask, part, text, logprobs, self.finish_reason, usage)]
        if result is not None:  # a failed evaluation inserts nothing
            for forced in (self.chat_tokens.output_start, *self.tokenizer.encode(result), self.chat_tokens.output_end):
                if not self.finish_reason:
                    events += self.append(forced, mask=0)
        return events

    def _parse(self, token: int) -> tuple[str, str, str | None]:
        """(part of the token, text to show, result of the tool call that the token completes)."""
        chat, part = self.chat_tokens, self.part
        if token in chat.end_tokens:
            return part, "", None
        if token in (chat.python_start, chat.output_start):
            self.part = "python" if token == chat.python_start else "python_output"
            self.call = []
            return self.part, self.stream.flush(), None
        if (part, token) in (("python", chat.python_end), ("python_output", chat.output_end)):
            self.part = "text"
            result = calculate(self.tokenizer.decode(self.call)) if part == "python" else None
            return part, self.stream.flush(), result
        if part == "python":
            self.call.append(token)
        return part, self.stream.feed(token), None
