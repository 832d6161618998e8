"""Generation with continuous batching: requests join and leave between steps, and the calculator is the model's tool.

    engine = Engine(model, tokenizer)
    request_id = engine.submit(Request(tokens, max_tokens=256, temperature=0.6, seed=1, stop=("\n\n",)))
    while engine.has_work():
        for event in engine.step():         # one event per new token of each request
            print(event.text, end="")       # event.finish_reason: None, 'stop' or 'length'
    engine.cancel(request_id)               # at any time; its row is free at once

The engine has no thread and no lock: each call of `step` advances all requests (continuous batching: Orca, Yu et al.
2022). A step first prefills a bounded number of prompt tokens, so that a long prompt doesn't stall the others (chunked
prefill: Sarathi-Serve, Agrawal et al. 2024), on CUDA those of similar length in one forward pass, then decodes one
token for every prefilled row:

    waiting --free row--> chunked prefill, all but the prompt's last token --> decoding --> row free, tokens kept
                 ^ starts after the prefix that a row already holds

Prefix sharing: the keys and values of a finished request stay in its row until the row is needed. A prompt that begins
with the tokens of any row copies that prefix (as SGLang does, Zheng et al. 2023, whose tree is a scan of few rows
here): the next turn of a conversation prefills only its new tokens, and the samples of one prompt prefill it once.

The tokens equal those of `GPT.generate`, which recomputes the whole sequence for each token, up to rounding. Two things
are added: <|assistant_end|> and <|bos|> end a row, and the calculator's output is inserted into it, with mask 0. A
sampled row depends on its own request alone, not on the batch (see sampling.py). B rows, V vocabulary.
"""

import codecs
import contextlib
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from nanochat.common import UserError
from nanochat.decoding import (
    CompiledStep,
    GraphedStep,
    copy_for_decoding,
    make_cache,
    make_step,
    refresh_copy,
    round_up_rows,
)
from nanochat.execution import calculate
from nanochat.gpt import GPT
from nanochat.kv_cache import NO_TOKEN, KVCache
from nanochat.sampling import Sampling, sample_rows

PREFILL_TOKENS = 512      # prompt tokens per step; bounds its memory (assumption, not studied, as is the next one)
SHARED_STEP_TOKENS = 128  # the same on a CPU while other rows decode; bounds the time between their tokens
# The same on CUDA, padding included: a pass that fills the GPU (assumptions, not measured)
CUDA_PREFILL_TOKENS, CUDA_SHARED_STEP_TOKENS = 8192, 2048
MIN_FILL_FRAC = 0.75      # least length of a pass's prompts, of the longest one's; the rest is padding
HEADROOM_TOKENS = 256     # room of a new cache beyond the first prompt, before the cache has to grow
MIN_SHARED_TOKENS = 16    # shortest prefix that is worth copying from another row
MAX_ROWS = 64             # default number of rows; further requests wait
KEPT_ROWS = 4             # default number of rows that may be allocated only to keep finished conversations
Rows = tuple[list[list[int]], list[list[int]]]  # tokens and masks of each row
Column = tuple[list[int], list[int]]            # token and mask of each row at one position


@dataclass(frozen=True)
class Request:
    """A prompt, its sampling parameters and its stopping criteria."""
    tokens:       Sequence[int]            # the prompt, at least bos
    max_tokens:   int | None = None        # tool output included; None: until the model's positions are used up
    temperature:  float = 1.0              # these five as in sampling.Sampling, in whose place sample_rows takes it
    top_k:        int | None = None
    top_p:        float | None = None
    seed:         int = 42
    sample:       int = 0
    stop:         tuple[str, ...] = ()     # stop strings: the text without tool calls ends before the first one
    num_logprobs: int | None = None        # 0: log-probability of the chosen token; n: of the n likeliest as well
    __post_init__ = Sampling.__post_init__


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
    """One new token of a request. A stop string's own tokens have no events."""
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
        self.special_tokens = frozenset(tokenizer.get_special_tokens().values())


class TextStream:
    """Incremental detokenizer: emits whole UTF-8 characters only."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The characters that a token completes."""
        return self.decoder.decode(self.tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """The end, when no more follows: incomplete UTF-8 becomes U+FFFD."""
        return self.decoder.decode(b"", final=True)


class StopStrings:
    """Searches a request's events for stop strings, and holds those back whose text may be the beginning of one.

    Only the text that a client sees counts, so a stop string may begin before a tool call and end after it. An answer
    ends before its first stop string: the held events after that place are never shown.
    """

    def __init__(self, stop: tuple[str, ...]):
        self.stop = stop
        self.held: list[Event] = []
        self.complete = False  # a stop string was found

    def feed(self, event: Event) -> list[Event]:
        """The events that can be shown now; the last one is this event where a stop string is complete."""
        if not self.stop:
            return [event]
        self.held.append(event)
        text = "".join(held.text for held in self.held if held.part == "text")
        starts = [start for stop in self.stop if (start := text.find(stop)) >= 0]
        if not starts:
            num_chars = len(text) if event.finish_reason else next(
                (i for i in range(len(text)) if any(stop.startswith(text[i:]) for stop in self.stop)), len(text))
            return self._release(num_chars)[0]
        self.complete = True
        shown, num_chars = self._release(min(starts))
        if self.held[0] is not event:
            if num_chars:
                shown.append(replace(self.held[0], text=self.held[0].text[:num_chars]))
            num_chars = 0
        return [*shown, replace(event, text=event.text[:num_chars], logprobs=event.logprobs if num_chars else None)]

    def _release(self, num_chars: int) -> tuple[list[Event], int]:
        """The events whose text lies within the next `num_chars` characters, and how many of these are left."""
        shown = []
        while self.held:
            event_chars = len(self.held[0].text) if self.held[0].part == "text" else 0
            if event_chars > num_chars:
                break
            num_chars -= event_chars
            shown.append(self.held.pop(0))
        return shown, num_chars


class Generation:
    """A request in progress: its tokens so far, its tool call, its text stream."""

    def __init__(self, request_id: int, request: Request, max_length: int, tokenizer, chat_tokens: ChatTokens,
                 has_events: bool = True):
        """max_length: tokens of prompt and answer together; has_events: whether Engine.step returns the tokens"""
        self.id, self.request, self.max_length, self.has_events = request_id, request, max_length, has_events
        self.tokenizer, self.chat_tokens = tokenizer, chat_tokens
        self.tokens = list(request.tokens)     # prompt and answer
        self.masks = [0] * len(self.tokens)
        self.num_prompt = len(self.tokens)
        self.num_reused = 0                    # prompt tokens copied from a row
        self.part = "text"
        self.call_start = 0                    # index of the first token of the unfinished tool call
        self.text_stream = self.tool_stream = TextStream(tokenizer)
        self.stop_strings = StopStrings(request.stop)
        self.finish_reason: str | None = "length" if self.num_prompt == max_length else None

    def append(self, token: int, mask: int = 1, logprobs: Logprobs | None = None) -> list[Event]:
        """Add a token; one that completes a tool call is followed by the calculator's output, with mask 0."""
        self.tokens.append(token)
        self.masks.append(mask)
        chat, text, result = self.chat_tokens, "", None
        starts = {chat.python_start: "python", chat.output_start: "python_output"}.get(token)
        if starts:
            self.part, self.call_start, self.tool_stream = starts, len(self.tokens), TextStream(self.tokenizer)
        part = self.part
        stream = self.text_stream if part == "text" else self.tool_stream
        ends = (part, token) in (("python", chat.python_end), ("python_output", chat.output_end))
        if ends:
            self.part, text = "text", stream.flush()
            if part == "python":
                result = calculate(self.tokenizer.decode(self.tokens[self.call_start:-1]))
        elif token not in chat.special_tokens:    # no text, even where the engine doesn't act on it
            text = stream.feed(token)
        if token in chat.end_tokens:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_length:
            self.finish_reason = "length"
        if self.finish_reason:
            text += stream.flush()
        events = self.stop_strings.feed(Event(self.id, token, mask, part, text, logprobs, self.finish_reason))
        if self.stop_strings.complete:
            self.finish_reason = "stop"
        if self.finish_reason:
            usage = Usage(self.num_prompt, self.num_reused, len(self.tokens) - self.num_prompt)
            events[-1] = replace(events[-1], finish_reason=self.finish_reason, usage=usage)
        if result is not None:  # a failed evaluation inserts nothing
            for forced in (chat.output_start, *self.tokenizer.encode(result), chat.output_end):
                if not self.finish_reason:
                    events += self.append(forced, mask=0)
        return events


@dataclass(eq=False)
class Row:
    """A row of the cache: the tokens whose keys and values it holds, and the request that it belongs to."""
    tokens:     list[int] = field(default_factory=list)
    generation: Generation | None = None  # None: the row is free, its tokens are a prefix that new prompts may share
    last_used:  int = -1                  # step

    def count_pending(self) -> int:
        """Tokens of the request that the model hasn't read yet; 1: the row decodes."""
        return len(self.generation.tokens) - len(self.tokens) if self.generation else 0


class Engine:
    def __init__(self, model: GPT, tokenizer, max_rows: int = MAX_ROWS, kept_rows: int = KEPT_ROWS,
                 compile: bool | None = False, cache_tokens: int | None = None):
        """The weights are copied as they are now: a model that is trained further needs `refresh`, or a new engine.

        max_rows:     sequences in the batch; the cache grows with the requests, further requests wait
        kept_rows:    rows that are allocated before the least recently used free row is overwritten
        compile:      compile the decoding step, on a CPU; takes seconds to a minute now, and holds the blocks'
                      matrices twice. None: nor are CUDA graphs captured, for a few tokens
        cache_tokens: room of each row from the start, for callers that know their longest sequence; the cache grows
                      beyond it, by default from the first prompt's need on
        """
        self.model = copy_for_decoding(model, keep_weights=bool(compile))
        self.tokenizer = tokenizer
        self.chat_tokens = ChatTokens(tokenizer)
        self.device = model.get_device()
        self.num_positions = len(model.cos)  # of the longest sequence, prompt and answer
        self.max_rows, self.kept_rows, self.cache_tokens = max_rows, min(kept_rows, max_rows), cache_tokens
        self.prefills_together = self.device.type == "cuda"  # a CPU is busy with one prompt
        self.waiting: deque[Generation] = deque()
        self.rows: list[Row] = []
        self.cache: KVCache | None = None
        self._run_step = make_step(self.model, compile, max_rows)
        self._events: list[Event] = []        # not yet returned by step
        self._unfinished: set[int] = set()    # request ids
        self._ids = itertools.count()
        self._num_steps = 0

    def submit(self, request: Request, request_id: int | None = None) -> int:
        """Queue a request; returns its id, by default the next number, which its events carry; UserError if refused."""
        self._check(request)
        return self._queue(request, next(self._ids) if request_id is None else request_id).id

    def cancel(self, request_id: int) -> bool:
        """Drop a request, at once and without an event; False for an id that is unknown or finished."""
        if request_id not in self._unfinished:
            return False
        self._unfinished.remove(request_id)
        for row in self.rows:
            if row.generation and row.generation.id == request_id:
                row.generation = None
        self.waiting = deque(generation for generation in self.waiting if generation.id != request_id)
        return True

    def has_work(self) -> bool:
        """Whether there are requests to advance or events to return."""
        return bool(self._events or self._unfinished)

    def step(self) -> list[Event]:
        """Prefill a piece of the new prompts, decode one token of every other request; returns the new tokens."""
        self._advance()
        events, self._events = self._events, []
        return events

    @torch.inference_mode()
    def forget(self) -> None:
        """Forget the conversations and free the cache, unless CUDA graphs know its address; there must be no work.

        A cache that has outgrown `cache_tokens` is freed, too: the next answers don't depend on how long the last were.
        """
        if self.has_work():
            raise ValueError("an engine with unfinished requests can't forget their tokens; cancel them first")
        self.rows = []
        if self.cache is not None and self._is_graphed() and self.cache.get_capacity() == self.cache_tokens:
            self.cache.cache_seqlens.zero_()
            self.cache.last_ids.fill_(NO_TOKEN)
        else:
            self.cache = None

    def refresh(self, model: GPT) -> None:
        """Take the weights that the engine's model has now; it then answers as a new engine does."""
        self.forget()
        refresh_copy(self.model, model)

    def _is_graphed(self) -> bool:
        return isinstance(self._run_step, GraphedStep) and self._run_step.works

    def _check(self, request: Request, min_new_tokens: int = 1) -> None:
        """UserError with the reason where a request can't be answered."""
        num_tokens, vocab_size = len(request.tokens), self.model.config.vocab_size
        if not num_tokens:
            raise UserError("the prompt is empty; it must hold one token at least, as a rule <|bos|>")
        if num_tokens >= self.num_positions:
            raise UserError(f"the prompt of {num_tokens} tokens leaves no room in the {self.num_positions} positions "
                            "of this model; shorten it")
        if not 0 <= min(request.tokens) <= max(request.tokens) < vocab_size:
            raise UserError(f"the prompt has token ids outside the model's vocabulary, 0 to {vocab_size - 1}; "
                            "was it encoded by another tokenizer?")
        if request.max_tokens is not None and request.max_tokens < min_new_tokens:
            raise UserError(f"max_tokens {request.max_tokens} must be {min_new_tokens} or more")
        if request.num_logprobs is not None and not 0 <= request.num_logprobs <= vocab_size:
            raise UserError(f"num_logprobs {request.num_logprobs} must be from 0 to {vocab_size}")
        if not all(request.stop):
            raise UserError("a stop string is empty; it would end every answer before its first character")

    def _queue(self, request: Request, request_id: int, has_events: bool = True) -> Generation:
        """has_events: whether `step` returns the request's tokens; its generation has them anyway"""
        room = self.num_positions - len(request.tokens)
        max_length = len(request.tokens) + min(room, room if request.max_tokens is None else request.max_tokens)
        generation = Generation(request_id, request, max_length, self.tokenizer, self.chat_tokens, has_events)
        if not generation.finish_reason:
            self._unfinished.add(request_id)
            self.waiting.append(generation)
        return generation

    # Inference mode per step: a generator that is abandoned between two steps must not leave the mode behind
    @torch.inference_mode()
    def _advance(self) -> None:
        self._num_steps += 1
        try:
            self._admit()
            self._prefill()
            self._decode()
        except BaseException:  # Ctrl-C, out of memory: the cache is in an unknown state, so every row is read again
            for i, row in enumerate(self.rows):
                row.tokens = []
                self.cache.start_row(i, 0, NO_TOKEN)
            raise

    def _admit(self) -> None:
        """Give the free rows to the waiting requests, first come, first served; a failed one stays in the queue."""
        queue = list(self.waiting)
        for i, generation in enumerate(queue):
            if len(self.rows) >= self.max_rows and all(row.generation for row in self.rows):
                break
            source, num_shared, is_coming = self._find_prefix(generation.tokens)
            if not is_coming:  # else another row is prefilling the same prefix: copy it when it is complete
                target = self._take_row(generation, source, num_shared, num_waiting=len(queue) - i)
                self._start_row(target, generation, source, num_shared)
                self.waiting.remove(generation)

    def _find_prefix(self, prompt: list[int]) -> tuple[int | None, int, bool]:
        """(row with the longest prefix of a prompt, its length, whether a row in prefill will hold a longer one)."""
        prompt = prompt[:-1]  # the last token is read by the decoding step
        source, num_shared, num_coming = None, 0, 0
        for i, row in enumerate(self.rows):
            num = count_common(row.tokens, prompt)
            if num >= MIN_SHARED_TOKENS and num > num_shared:
                source, num_shared = i, num
            if row.count_pending() > 1:
                num_coming = max(num_coming, count_common(row.generation.tokens[:-1], prompt))
        return source, num_shared, num_coming >= MIN_SHARED_TOKENS and num_coming > num_shared

    def _take_row(self, generation: Generation, source: int | None, num_shared: int, num_waiting: int) -> int:
        """The row that is an exact prefix of the request, else an empty or a new one, else the least recently used."""
        if source is not None and not self.rows[source].generation and len(self.rows[source].tokens) == num_shared:
            return source
        free = [i for i, row in enumerate(self.rows) if not row.generation]
        oldest = min(free, key=lambda i: self.rows[i].last_used, default=None)
        if oldest is not None and (len(self.rows[oldest].tokens) < MIN_SHARED_TOKENS
                                   or len(self.rows) >= self.kept_rows):
            return oldest
        # The cache grows by the number of waiting requests, and by half at least
        num_new = min(max(num_waiting, len(self.rows) // 2), self.max_rows - len(self.rows))
        num_rows = len(self.rows) + num_new
        if self._is_graphed():
            num_rows = round_up_rows(num_rows)
        if self.cache is None:
            num_tokens = self.cache_tokens or min(len(generation.tokens) + HEADROOM_TOKENS, generation.max_length)
            self.cache = make_cache(self.model, num_rows, num_tokens, isinstance(self._run_step, CompiledStep))
        elif num_rows > self.cache.count_rows():
            self.cache.add_rows(num_rows - self.cache.count_rows())
        self.rows.extend(Row() for _ in range(num_new))
        return len(self.rows) - 1

    def _start_row(self, target: int, generation: Generation, source: int | None, num_shared: int) -> None:
        row = self.rows[target]
        if source is not None and source != target:
            self.cache.copy_row(source, target, num_shared)
        self.cache.start_row(target, num_shared, generation.tokens[num_shared - 1] if num_shared else NO_TOKEN)
        row.tokens, row.generation = generation.tokens[:num_shared], generation
        generation.num_reused = num_shared

    def _prefill(self) -> None:
        """Read pending tokens in chunks, the oldest request first, all but the last token of each prompt.

        The decoding step reads that one, so the samples of a prompt that share its prefix differ from their first
        token on, and the head is never computed for a whole prompt.
        """
        budget = self._get_prefill_budget()
        reading = [row for row in self.rows if row.count_pending() > 1]
        reading.sort(key=lambda row: row.generation.id)
        while reading and budget > 0:
            rows, num_tokens = self._choose_together(reading, budget)
            self._read(rows, num_tokens)
            budget -= len(rows) * num_tokens
            reading = [row for row in reading if row not in rows]

    def _get_prefill_budget(self) -> int:
        """Prompt tokens of this step."""
        others_wait = any(row.count_pending() == 1 for row in self.rows)
        if self.prefills_together:
            return CUDA_SHARED_STEP_TOKENS if others_wait else CUDA_PREFILL_TOKENS
        return SHARED_STEP_TOKENS if others_wait and self.device.type == "cpu" else PREFILL_TOKENS

    def _choose_together(self, reading: list[Row], budget: int) -> tuple[list[Row], int]:
        """The first row and those that are read in one pass with it, and the tokens that the longest of them reads."""
        rows, shortest, longest, room = [], budget, 0, self.num_positions
        for row in reading if self.prefills_together else reading[:1]:
            num_tokens = min(row.count_pending() - 1, budget)
            low, high = min(shortest, num_tokens), max(longest, num_tokens)
            least_room = min(room, self.num_positions - len(row.tokens))  # the padding has positions, too
            if not rows or (len(rows) + 1) * high <= budget and low >= MIN_FILL_FRAC * high and high <= least_room:
                rows.append(row)
                shortest, longest, room = low, high, least_room
        return rows, longest

    def _read(self, rows: list[Row], num_tokens: int) -> None:
        """One forward pass over up to `num_tokens` pending tokens of each row, the shorter ones padded at their end.

        The padding's keys and values are overwritten by the next tokens; all else is as if there had been none.
        """
        idxs = [i for i, row in enumerate(self.rows) if row in rows]
        first = min(idxs[0], len(self.rows) - len(idxs))
        self._move_together(idxs, first)
        rows = self.rows[first:first + len(idxs)]
        chunks = [row.generation.tokens[len(row.tokens):-1][:num_tokens] for row in rows]
        longest = max(len(row.tokens) for row in rows)
        self.cache.num_tokens = longest
        self.cache.reserve(num_tokens)
        inputs = torch.tensor([chunk + [0] * (num_tokens - len(chunk)) for chunk in chunks], device=self.device)
        cache = self.cache.view_rows(first, first + len(rows), longest)
        self.model.forward_trunk(inputs, cache)  # (B, T)
        for row, chunk in zip(rows, chunks, strict=True):
            row.tokens.extend(chunk)
            row.last_used = self._num_steps
        if any(len(chunk) < num_tokens for chunk in chunks):
            cache.cache_seqlens.copy_(torch.tensor([len(row.tokens) for row in rows]))
            cache.last_ids.copy_(torch.tensor([[chunk[-1]] for chunk in chunks]))

    def _decode(self) -> None:
        """Sample one token for each row that has read its whole prompt."""
        rows = self._gather_ready_rows()
        if not rows:
            return
        generations = [row.generation for row in rows]
        self.cache.num_tokens = max(len(row.tokens) for row in rows)
        self.cache.reserve(1)
        inputs = torch.tensor([[generation.tokens[-1]] for generation in generations], device=self.device)  # (B, 1)
        logits = self._run_step(inputs, self.cache)                                                         # (B, V)
        sampled = sample_rows(logits, [generation.request for generation in generations],
                              [len(generation.tokens) - generation.num_prompt for generation in generations]).tolist()
        for i, (row, generation, token) in enumerate(zip(rows, generations, sampled, strict=True)):
            row.tokens.append(generation.tokens[-1])
            row.last_used = self._num_steps
            num_logprobs, logprobs = generation.request.num_logprobs, None
            if num_logprobs is not None:
                row_logprobs = logits[i].log_softmax(dim=-1)  # (V,)
                values, tokens = row_logprobs.topk(min(num_logprobs, len(row_logprobs)))
                logprobs = Logprobs(float(row_logprobs[token]),
                                    tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
            events = generation.append(token, logprobs=logprobs)
            if generation.has_events:
                self._events += events
            if generation.finish_reason:
                row.generation = None
                self._unfinished.remove(generation.id)

    def _gather_ready_rows(self) -> list[Row]:
        """Move the decoding rows to the front, where they are one slice of the cache; returns them."""
        ready = [i for i, row in enumerate(self.rows) if row.count_pending() == 1]
        self._move_together(ready, 0)
        return self.rows[:len(ready)]

    def _move_together(self, idxs: list[int], first: int) -> None:
        """Swap rows so that those of these indices, in ascending order, are the neighbours from `first` on."""
        block = range(first, first + len(idxs))
        gaps = [i for i in block if i not in idxs]
        for gap, i in zip(gaps, reversed([i for i in idxs if i not in block]), strict=True):
            self.cache.swap_rows(gap, i, max(len(self.rows[gap].tokens), len(self.rows[i].tokens)))
            self.rows[gap], self.rows[i] = self.rows[i], self.rows[gap]

    @property
    def end_tokens(self) -> frozenset[int | None]:
        """The tokens that end a row."""
        return self.chat_tokens.end_tokens

    def generate(self, tokens: list[int], num_samples: int = 1, max_tokens: int | None = None,
                 temperature: float = 1.0, top_k: int | None = None, seed: int = 42) -> Iterator[Column]:
        """Continue a prompt `num_samples` times; yields (next token of each row, mask of each row) per position.

        A mask is 1 for a sampled token and 0 for any other: tool output, or the end token that pads a finished row
        until all rows are finished. Row i of a seed is the same text for any num_samples.
        """
        requests = self._make_requests(tokens, num_samples, max_tokens, temperature, top_k, seed)

        def yield_columns() -> Iterator[Column]:
            with self._running(requests) as samples:
                for position in itertools.count(len(tokens)):
                    while any(len(sample.tokens) <= position and not sample.finish_reason for sample in samples):
                        self._advance()
                    if all(len(sample.tokens) <= position for sample in samples):
                        return
                    yield ([sample.tokens[min(position, len(sample.tokens) - 1)] for sample in samples],
                           [sample.masks[position] if position < len(sample.masks) else 0 for sample in samples])
        return yield_columns()

    def generate_batch(self, tokens: list[int], num_samples: int = 1, max_tokens: int | None = None,
                       temperature: float = 1.0, top_k: int | None = None, seed: int = 42) -> Rows:
        """As `generate`, but whole: (rows with their prompt, their masks), without end tokens."""
        ((rows, masks),) = self.generate_many([tokens], num_samples, max_tokens, temperature, top_k, seed)
        for row, mask in zip(rows, masks, strict=True):
            if len(row) > len(tokens) and row[-1] in self.end_tokens:
                del row[-1], mask[-1]
        return rows, masks

    def generate_many(self, prompts: Sequence[list[int]], num_samples: int = 1, max_tokens: int | None = None,
                      temperature: float = 1.0, top_k: int | None = None, seed: int = 42) -> list[Rows]:
        """`generate_batch` of many prompts in one batch, with end tokens; prompt i has the seed `seed` + i."""
        requests = [request for i, tokens in enumerate(prompts) for request in self._make_requests(
            tokens, num_samples, max_tokens, temperature, top_k, seed + i)]
        with self._running(requests) as generations:
            while not all(generation.finish_reason for generation in generations):
                self._advance()
        rows, masks = ([getattr(generation, name) for generation in generations] for name in ("tokens", "masks"))
        return [(rows[i:i + num_samples], masks[i:i + num_samples]) for i in range(0, len(rows), num_samples)]

    def _make_requests(self, tokens: list[int], num_samples: int, max_tokens: int | None, temperature: float,
                       top_k: int | None, seed: int) -> list[Request]:
        if num_samples < 1:
            raise UserError(f"num_samples {num_samples} must be 1 or more")
        requests = [Request(tokens, max_tokens, temperature, top_k, seed=seed, sample=i) for i in range(num_samples)]
        self._check(requests[0], min_new_tokens=0)  # now, not at the first token
        return requests

    @contextlib.contextmanager
    def _running(self, requests: Sequence[Request]) -> Iterator[list[Generation]]:
        """The requests as generations whose tokens `step` doesn't return; they are cancelled at the end."""
        generations = [self._queue(request, next(self._ids), has_events=False) for request in requests]
        try:
            yield generations
        finally:
            for generation in generations:
                self.cancel(generation.id)


def count_common(a: list[int], b: list[int]) -> int:
    """Length of the common prefix of two sequences; slices are compared at C speed, so it bisects over them."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # they differ within the first `high`, but not within the first `low`
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
