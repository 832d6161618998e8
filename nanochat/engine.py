"""Generation: many requests at once, which join and leave between steps, with the calculator as the model's tool.

    engine = Engine(model, tokenizer)
    request_id = engine.submit(Request(tokens, max_tokens=256, temperature=0.6, seed=1, stop=("\n\n",)))
    while engine.has_work():
        for event in engine.step():         # an event for each new token of each request
            print(event.text, end="")       # event.finish_reason: None, 'stop' or 'length'
    engine.cancel(request_id)               # at any time; its row is free at once

There is no thread and no lock: whoever calls `step` drives all requests. A step first reads a bounded piece of the
prompts, so that a long one doesn't stall the others, then gives each row whose prompt has been read its next token:

    waiting --a free row--> prompt in chunks --all but its last token--> sampled token by token --> row free, kept
                 ^ continues where the prompt begins with what a row still holds

A finished request's tokens stay in its row until another needs it, and a prompt that begins with the same tokens as any
row holds isn't computed again: a conversation's next turn costs its new tokens only, samples of one prompt share it.

`generate`, `generate_batch` and `generate_many` drive the same engine to the end of their own requests.

The tokens are those of `GPT.generate`, which computes the whole sequence anew for each, up to the rounding of sums (in
bf16 two tokens may be equally likely); but <|assistant_end|> and <|bos|> end a row, and the calculator's answers are
put into it. A sampled row depends on its own request alone, not on what else runs (see sampling.py).
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.decoding import CompiledStep, copy_for_decoding, make_cache, make_step
from nanochat.gpt import GPT, norm
from nanochat.kv_cache import KVCache
from nanochat.request import ChatTokens, Event, Generation, Logprobs, Request
from nanochat.sampling import sample_rows
from nanochat.text_stream import stream_text

__all__ = ["Engine", "Event", "KVCache", "Request", "stream_text"]

PREFILL_TOKENS = 512      # of prompts in one step; bounds its memory (this and the next: assumptions, not studied)
SHARED_STEP_TOKENS = 128  # the same on a CPU where others wait for their next token; bounds the step's time
HEADROOM_TOKENS = 256     # that a new cache has room for beyond the first prompt before it has to grow
MIN_SHARED_TOKENS = 16    # of a prompt that must agree with a row before it is worth taking from there
MAX_ROWS = 64             # sequences at once unless told otherwise; the others wait
KEPT_ROWS = 4             # that there may be, unless told otherwise, for finished conversations to be kept


@dataclass
class Row:
    """A row of the cache: which tokens it holds, and for whom."""
    tokens:     list[int] = field(default_factory=list)  # whose keys are there
    generation: Generation | None = None                 # None: free, the tokens are kept for whoever begins with them
    last_used:  int = -1                                 # step

    def count_pending(self) -> int:
        """Tokens that the model has still to read."""
        return len(self.generation.tokens) - len(self.tokens) if self.generation else 0


class Engine:
    def __init__(self, model: GPT, tokenizer, max_rows: int = MAX_ROWS, kept_rows: int = KEPT_ROWS,
                 compile: bool = False):
        """Takes the weights as they are now: make a new engine after training on.

        max_rows:  sequences at once; the cache grows as they come, and those beyond wait
        kept_rows: rows that there may be before the one that has been idle the longest is used again
        compile:   the decoding step, on a CPU, for engines that live long; takes seconds to half a minute now, and
                   keeps the blocks' matrices twice
        """
        self.model = copy_for_decoding(model, keep_weights=compile)
        self.tokenizer = tokenizer
        self.chat_tokens = ChatTokens(tokenizer)
        self.device = model.get_device()
        self.num_positions = len(model.cos)  # of the longest sequence, prompt and answer
        self.max_rows, self.kept_rows = max_rows, min(kept_rows, max_rows)
        self.waiting: deque[Generation] = deque()
        self.rows: list[Row] = []
        self.cache: KVCache | None = None
        self._run_step = make_step(self.model, compile)
        self._events: deque[Event] = deque()  # not yet returned by step
        self._sinks: dict[int, deque[Event]] = {}  # request id -> where its events go
        self._ids = itertools.count()
        self._num_steps = 0

    # -----------------------------------------------------------------------------------------------------------------
    # Requests

    def submit(self, request: Request) -> int:
        """Queue a request; returns its id, which its events carry. UserError where it can't be answered."""
        return self._submit(request).id

    def cancel(self, request_id: int) -> bool:
        """Drop a request, at once and without an event; False if there is none, as when it has finished."""
        if self._sinks.pop(request_id, None) is None:
            return False
        for row in self.rows:
            if row.generation and row.generation.id == request_id:
                row.generation = None
        self.waiting = deque(generation for generation in self.waiting if generation.id != request_id)
        return True

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._events or self._sinks)

    def step(self) -> list[Event]:
        """Read a piece of the prompts that are new, give every other request its next token; returns the new tokens."""
        self._advance()
        events = list(self._events)
        self._events.clear()
        return events

    def check(self, request: Request) -> None:
        """UserError with the reason where a request can't be answered."""
        num_tokens, vocab_size = len(request.tokens), self.model.config.vocab_size
        request.get_sampling()
        if not num_tokens:
            raise UserError("the prompt is empty; it must hold one token at least, as a rule <|bos|>")
        if num_tokens >= self.num_positions:
            raise UserError(f"the prompt of {num_tokens} tokens leaves no room in the {self.num_positions} positions "
                            "of this model; shorten it")
        if not 0 <= min(request.tokens) <= max(request.tokens) < vocab_size:
            raise UserError(f"the prompt has token ids outside the model's vocabulary, 0 to {vocab_size - 1}; "
                            "was it encoded by another tokenizer?")
        if request.max_tokens is not None and request.max_tokens < 1:
            raise UserError(f"max_tokens {request.max_tokens} must be 1 or more")
        if request.num_logprobs is not None and not 0 <= request.num_logprobs <= vocab_size:
            raise UserError(f"num_logprobs {request.num_logprobs} must be from 0 to {vocab_size}")
        if not all(request.stop):
            raise UserError("a stop string is empty; it would end every answer before its first character")

    def _submit(self, request: Request, sink: deque[Event] | None = None) -> Generation:
        """sink: where its events go, instead of to whoever calls step"""
        self.check(request)
        room = self.num_positions - len(request.tokens)
        max_length = len(request.tokens) + (room if request.max_tokens is None else min(request.max_tokens, room))
        generation = Generation(next(self._ids), request, max_length, self.tokenizer, self.chat_tokens)
        self._sinks[generation.id] = self._events if sink is None else sink
        self.waiting.append(generation)
        return generation

    # -----------------------------------------------------------------------------------------------------------------
    # A step

    # A generator that is left between two steps must not leave its mode behind, so each step has its own
    @torch.inference_mode()
    def _advance(self) -> None:
        self._num_steps += 1
        try:
            self._admit()
            self._prefill()
            self._decode()
        except BaseException:  # Ctrl-C, no memory: what the cache holds is uncertain, so it will all be read again
            for i, row in enumerate(self.rows):
                row.tokens = []
                self.cache.start_row(i, 0, 0.0)
            raise

    def _admit(self) -> None:
        """Give the waiting requests the free rows, in the order they came; one that fails to get its row waits on."""
        still_waiting = []
        try:
            while self.waiting and (len(self.rows) < self.max_rows or not all(row.generation for row in self.rows)):
                generation = self.waiting[0]
                source, num_shared, is_coming = self._find_prefix(generation.tokens)
                if is_coming:  # another row is reading just that: copy it when it is there
                    still_waiting.append(generation)
                else:
                    target = self._find_free_row(generation, source, num_shared)
                    self._start_row(target, generation, source, num_shared)
                self.waiting.popleft()
        finally:
            self.waiting.extendleft(reversed(still_waiting))

    def _find_prefix(self, prompt: list[int]) -> tuple[int | None, int, bool]:
        """The row that holds most of a prompt's beginning, how many tokens, and whether another will soon hold more."""
        prompt = prompt[:-1]  # the last token is read when decoding
        source, num_shared, num_coming = None, 0, 0
        for i, row in enumerate(self.rows):
            num = count_common(row.tokens, prompt)
            if num >= MIN_SHARED_TOKENS and num > num_shared:
                source, num_shared = i, num
            if row.count_pending() > 1:
                num_coming = max(num_coming, count_common(row.generation.tokens[:-1], prompt))
        return source, num_shared, num_coming >= MIN_SHARED_TOKENS and num_coming > num_shared

    def _find_free_row(self, generation: Generation, source: int | None, num_shared: int) -> int:
        """The row that a request gets: one that it continues to the end, else an empty or new one, else the oldest."""
        if source is not None and not self.rows[source].generation and len(self.rows[source].tokens) == num_shared:
            return source
        free = [i for i, row in enumerate(self.rows) if not row.generation]
        oldest = min(free, key=lambda i: self.rows[i].last_used, default=None)
        if oldest is None or (len(self.rows[oldest].tokens) >= MIN_SHARED_TOKENS and len(self.rows) < self.kept_rows):
            self._add_rows(generation)
            return len(self.rows) - 1
        return oldest

    def _add_rows(self, generation: Generation) -> None:
        """Make the cache larger by as many rows as wait, but at least by half."""
        num_new = min(max(len(self.waiting), len(self.rows) // 2), self.max_rows - len(self.rows))
        if self.cache is None:
            num_tokens = min(len(generation.tokens) + HEADROOM_TOKENS, generation.max_length)
            self.cache = make_cache(self.model, num_new, num_tokens, isinstance(self._run_step, CompiledStep))
        else:
            self.cache.add_rows(num_new)
        self.rows.extend(Row() for _ in range(num_new))

    def _start_row(self, target: int, generation: Generation, source: int | None, num_shared: int) -> None:
        row = self.rows[target]
        if source is not None and source != target:
            self.cache.copy_row(source, target, num_shared)
        if num_shared == 0 or source != target or len(row.tokens) != num_shared:  # else the row's own embedding is it
            last_embed = 0.0
            if num_shared:
                token = torch.tensor(generation.tokens[num_shared - 1], device=self.device)
                last_embed = norm(self.model.transformer.wte(token).to(self.model.compute_dtype))
            self.cache.start_row(target, num_shared, last_embed)
        row.tokens, row.generation = generation.tokens[:num_shared], generation
        generation.num_reused = num_shared

    def _prefill(self) -> None:
        """Read pending tokens, the oldest request's first, all but the last one: that one is read when decoding.

        So each sample of a prompt gets its own first token, and the head is never computed for a whole prompt.
        """
        others_wait = self.device.type == "cpu" and any(row.count_pending() == 1 for row in self.rows)
        budget = SHARED_STEP_TOKENS if others_wait else PREFILL_TOKENS
        reading = [i for i, row in enumerate(self.rows) if row.count_pending() > 1]
        for i in sorted(reading, key=lambda i: self.rows[i].generation.id):
            row = self.rows[i]
            start = len(row.tokens)
            chunk = row.generation.tokens[start:min(start + budget, len(row.generation.tokens) - 1)]
            if not chunk:
                break
            self._reserve(start + len(chunk))
            self.model.forward_trunk(torch.tensor([chunk], device=self.device), self.cache.view_rows(i, i + 1, start))
            row.tokens.extend(chunk)
            row.last_used = self._num_steps
            budget -= len(chunk)

    def _reserve(self, num_tokens: int) -> None:
        """Make room for so many tokens in every row."""
        self.cache.num_tokens = 0
        self.cache.reserve(num_tokens)

    def _decode(self) -> None:
        """One token for each row that has one pending."""
        num_ready = self._gather_ready_rows()
        if not num_ready:
            return
        rows = self.rows[:num_ready]
        generations = [row.generation for row in rows]
        longest = max(len(row.tokens) for row in rows)
        self._reserve(longest + 1)
        inputs = [generation.tokens[-1] for generation in generations]
        logits = self._run_step(torch.tensor(inputs, device=self.device)[:, None],  # (B, 1)
                                self.cache.view_rows(0, num_ready, longest))        # (B, V)
        sampled = sample_rows(logits, [generation.sampling for generation in generations],
                              [len(generation.tokens) - generation.num_prompt for generation in generations]).tolist()
        for i, (row, token) in enumerate(zip(rows, sampled, strict=True)):
            generation = row.generation
            row.tokens.append(inputs[i])
            row.last_used = self._num_steps
            num_logprobs = generation.request.num_logprobs
            logprobs = None if num_logprobs is None else compute_logprobs(logits[i], token, num_logprobs)
            self._sinks[generation.id].extend(generation.append(token, logprobs=logprobs))
            if generation.finish_reason:
                row.generation = None
                del self._sinks[generation.id]

    def _gather_ready_rows(self) -> int:
        """Move the rows that can decode to the front, where they are one slice of the cache; returns their number."""
        ready = [i for i, row in enumerate(self.rows) if row.count_pending() == 1]
        gaps = [i for i in range(len(ready)) if self.rows[i].count_pending() != 1]
        for gap, i in zip(gaps, reversed(ready), strict=False):
            self.cache.swap_rows(gap, i, max(len(self.rows[gap].tokens), len(self.rows[i].tokens)))
            self.rows[gap], self.rows[i] = self.rows[i], self.rows[gap]
        return len(ready)

    # -----------------------------------------------------------------------------------------------------------------
    # To the end of one's own requests

    @property
    def end_tokens(self) -> frozenset[int | None]:
        """The tokens that end a row."""
        return self.chat_tokens.end_tokens

    def generate(self, tokens: list[int], num_samples: int = 1, max_tokens: int | None = None,
                 temperature: float = 1.0, top_k: int | None = None, seed: int = 42,
                 top_p: float | None = None) -> Iterator[tuple[list[int], list[int]]]:
        """Continue a prompt `num_samples` times; yields (the next token of each row, the mask of each row) per step.

        A mask is 1 for a token that was sampled and 0 for one that wasn't: a tool's output, or the filling of a row
        that has ended, which repeats its end token until all rows have.

        tokens:     the prompt, at least bos
        max_tokens: per row, tool output included; None, and any number beyond it, ends where the model's positions end
        seed:       row i of a seed is the same text, whatever num_samples is
        """
        return self._generate_columns(self._make_requests(tokens, num_samples, max_tokens, temperature, top_k, top_p,
                                                          seed))

    def generate_batch(self, tokens: list[int], num_samples: int = 1, max_tokens: int | None = None,
                       temperature: float = 1.0, top_k: int | None = None, seed: int = 42,
                       top_p: float | None = None, keep_end: bool = False) -> tuple[list[list[int]], list[list[int]]]:
        """As generate, all at once: the rows with their prompt, and their masks.

        keep_end: with the end token, of rows that came to it
        """
        return self.generate_many([tokens], num_samples, max_tokens, temperature, top_k, seed, top_p, keep_end)[0]

    def generate_many(self, prompts: Sequence[list[int]], num_samples: int = 1, max_tokens: int | None = None,
                      temperature: float = 1.0, top_k: int | None = None, seed: int = 42, top_p: float | None = None,
                      keep_end: bool = False) -> list[tuple[list[list[int]], list[list[int]]]]:
        """generate_batch of many prompts at once, in their order; as rows end, the next prompts take their place.

        seed: prompt i has seed + i, so it gets what generate_batch gives it with that seed
        """
        requests = [self._make_requests(tokens, num_samples, max_tokens, temperature, top_k, top_p, seed + i)
                    for i, tokens in enumerate(prompts)]
        sink: deque[Event] = deque(maxlen=0)  # nobody looks at the events
        groups = [[self._submit(request, sink) for request in group] for group in requests]
        try:
            ids = {generation.id for group in groups for generation in group}
            while not ids.isdisjoint(self._sinks):
                self._advance()
        finally:
            for group in groups:
                for generation in group:
                    self.cancel(generation.id)
        results = []
        for tokens, group in zip(prompts, groups, strict=True):
            rows = [generation.tokens for generation in group] or [list(tokens) for _ in range(num_samples)]
            rows = [row[:-1] if row[-1] in self.end_tokens and len(row) > len(tokens) and not keep_end else row
                    for row in rows]
            masks = [generation.masks for generation in group] or [[0] * len(tokens) for _ in range(num_samples)]
            results.append((rows, [mask[:len(row)] for mask, row in zip(masks, rows, strict=True)]))
        return results

    def _make_requests(self, tokens: list[int], num_samples: int, max_tokens: int | None, temperature: float,
                       top_k: int | None, top_p: float | None, seed: int) -> list[Request]:
        """A request for each sample; none where no token is wanted."""
        if num_samples < 1 or (max_tokens or 0) < 0:
            raise UserError(f"num_samples must be 1 or more and max_tokens 0 or more, not {num_samples} "
                            f"and {max_tokens}")
        requests = [Request(tokens, max_tokens or None, temperature, top_k, top_p, seed, i)
                    for i in range(num_samples)]
        self.check(requests[0])  # now, not when the first token is asked for
        return [] if max_tokens == 0 else requests

    def _generate_columns(self, requests: list[Request]) -> Iterator[tuple[list[int], list[int]]]:
        sinks: list[deque[Event]] = [deque() for _ in requests]
        generations = [self._submit(request, sink) for request, sink in zip(requests, sinks, strict=True)]
        last_tokens = [0] * len(requests)
        try:
            while True:
                while any(not sink and generation.finish_reason is None
                          for sink, generation in zip(sinks, generations, strict=True)):
                    self._advance()
                if not any(sinks):
                    return
                masks = [0] * len(requests)
                for i, sink in enumerate(sinks):
                    if sink:
                        event = sink.popleft()
                        last_tokens[i], masks[i] = event.token, event.mask
                yield list(last_tokens), masks
        finally:
            for generation in generations:
                self.cancel(generation.id)


def count_common(a: list[int], b: list[int]) -> int:
    """With how many equal tokens two sequences begin."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # they differ within the first `high`, but not within the first `low`
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low


def compute_logprobs(logits: Tensor, token: int, num_likeliest: int) -> Logprobs:
    """Log-probabilities of the chosen token and of the likeliest, from one row of logits (V,)."""
    logprobs = logits.log_softmax(dim=-1)
    values, tokens = logprobs.topk(min(num_likeliest, len(logprobs)))
    return Logprobs(float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
