"""Generation with continuous batching: requests join and leave between steps, and the calculator is the model's tool.

    engine = Engine(model, tokenizer)
    request_id = engine.submit(Request(tokens, max_tokens=256, temperature=0.6, seed=1, stop=("\n\n",)))
    while engine.has_work():
        for event in engine.step():         # one event per new token of each request
            print(event.text, end="")       # event.finish_reason: None, 'stop' or 'length'
    engine.cancel(request_id)               # at any time; its row is free at once

The engine has no thread and no lock: each call of `step` advances all requests (continuous batching: Orca, Yu et al.
2022). A step first prefills a bounded number of prompt tokens, so that a long prompt doesn't stall the others (chunked
prefill: Sarathi-Serve, Agrawal et al. 2024), then decodes one token for every prefilled row:

    waiting --free row--> chunked prefill, all but the prompt's last token --> decoding --> row free, tokens kept
                 ^ starts after the prefix that a row already holds

Prefix sharing: the keys and values of a finished request stay in its row until the row is needed. A prompt that begins
with the tokens of any row copies that prefix (as SGLang does, Zheng et al. 2023, whose tree is a scan of few rows
here): the next turn of a conversation prefills only its new tokens, and the samples of one prompt prefill it once.

`generate`, `generate_batch` and `generate_many` run the same engine until their own requests are finished.

The tokens equal those of `GPT.generate`, which recomputes the whole sequence for each token, up to rounding (in bf16
two tokens may be equally likely). Two things are added: <|assistant_end|> and <|bos|> end a row, and the calculator's
output is inserted into it. A sampled row depends on its own request alone, not on the batch (see sampling.py).

B rows, V vocabulary.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.decoding import CompiledStep, copy_for_decoding, make_cache, make_step
from nanochat.engine_request import ChatTokens, Event, Generation, Logprobs, Request, stream_text
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache
from nanochat.sampling import sample_rows

__all__ = ["Engine", "Event", "KVCache", "Request", "stream_text"]

PREFILL_TOKENS = 512      # prompt tokens per step; bounds its memory (assumption, not studied, as is the next one)
SHARED_STEP_TOKENS = 128  # the same on a CPU while other rows decode; bounds the time between their tokens
HEADROOM_TOKENS = 256     # room of a new cache beyond the first prompt, before the cache has to grow
MIN_SHARED_TOKENS = 16    # shortest prefix that is worth copying from another row
MAX_ROWS = 64             # default number of rows; further requests wait
KEPT_ROWS = 4             # default number of rows that may be allocated only to keep finished conversations


@dataclass
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
                 compile: bool = False):
        """The weights are copied as they are now: a model that is trained further needs a new engine.

        max_rows:  sequences in the batch; the cache grows with the requests, further requests wait
        kept_rows: rows that are allocated before the least recently used free row is overwritten
        compile:   compile the decoding step, on a CPU; takes seconds to half a minute now, and holds the blocks'
                   matrices twice
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
        self._events: list[Event] = []        # not yet returned by step
        self._unfinished: set[int] = set()    # request ids
        self._ids = itertools.count()
        self._num_steps = 0

    # -----------------------------------------------------------------------------------------------------------------
    # Requests

    def submit(self, request: Request, request_id: int | None = None) -> int:
        """Queue a request; returns its id, which its events carry. UserError where it can't be answered.

        request_id: an id that no other request of this engine has; None: the next number
        """
        return self._submit(request, request_id).id

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

    def _submit(self, request: Request, request_id: int | None = None, has_events: bool = True) -> Generation:
        """has_events: whether `step` returns the request's tokens; its generation has them anyway"""
        self.check(request)
        room = self.num_positions - len(request.tokens)
        max_length = len(request.tokens) + (room if request.max_tokens is None else min(request.max_tokens, room))
        generation = Generation(next(self._ids) if request_id is None else request_id, request, max_length,
                                self.tokenizer, self.chat_tokens)
        generation.has_events = has_events
        self._unfinished.add(generation.id)
        self.waiting.append(generation)
        return generation

    # -----------------------------------------------------------------------------------------------------------------
    # A step

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
                self.cache.start_row(i, 0, 0.0)
            raise

    def _admit(self) -> None:
        """Give the free rows to the waiting requests, first come, first served; a failed one stays in the queue."""
        still_waiting = []
        try:
            while self.waiting and (len(self.rows) < self.max_rows or not all(row.generation for row in self.rows)):
                generation = self.waiting[0]
                source, num_shared, is_coming = self._find_prefix(generation.tokens)
                if is_coming:  # another row is prefilling the same prefix: copy it when it is complete
                    still_waiting.append(generation)
                else:
                    target = self._find_free_row(generation, source, num_shared)
                    self._start_row(target, generation, source, num_shared)
                self.waiting.popleft()
        finally:
            self.waiting.extendleft(reversed(still_waiting))

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

    def _find_free_row(self, generation: Generation, source: int | None, num_shared: int) -> int:
        """The row that is an exact prefix of the request, else an empty or a new one, else the least recently used."""
        if source is not None and not self.rows[source].generation and len(self.rows[source].tokens) == num_shared:
            return source
        free = [i for i, row in enumerate(self.rows) if not row.generation]
        oldest = min(free, key=lambda i: self.rows[i].last_used, default=None)
        if oldest is None or (len(self.rows[oldest].tokens) >= MIN_SHARED_TOKENS and len(self.rows) < self.kept_rows):
            self._add_rows(generation)
            return len(self.rows) - 1
        return oldest

    def _add_rows(self, generation: Generation) -> None:
        """Grow the cache by the number of waiting requests, and by half at least."""
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
                last_embed = self.model.embed_tokens(token)
            self.cache.start_row(target, num_shared, last_embed)
        row.tokens, row.generation = generation.tokens[:num_shared], generation
        generation.num_reused = num_shared

    def _prefill(self) -> None:
        """Read pending tokens in chunks, the oldest request first, all but the last token of each prompt.

        The decoding step reads that one, so the samples of a prompt that share its prefix differ from their first
        token on, and the head is never computed for a whole prompt.
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
            self.cache.num_tokens = 0
            self.cache.reserve(start + len(chunk))
            self.model.forward_trunk(torch.tensor([chunk], device=self.device), self.cache.view_rows(i, i + 1, start))
            row.tokens.extend(chunk)
            row.last_used = self._num_steps
            budget -= len(chunk)

    def _decode(self) -> None:
        """Sample one token for each row that has read its whole prompt."""
        num_ready = self._gather_ready_rows()
        if not num_ready:
            return
        rows = self.rows[:num_ready]
        generations = [row.generation for row in rows]
        longest = max(len(row.tokens) for row in rows)
        self.cache.num_tokens = 0
        self.cache.reserve(longest + 1)
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
            events = generation.append(token, logprobs=logprobs)
            if generation.has_events:
                self._events += events
            if generation.finish_reason:
                row.generation = None
                self._unfinished.remove(generation.id)

    def _gather_ready_rows(self) -> int:
        """Move the decoding rows to the front, where they are one slice of the cache; returns their number."""
        ready = [i for i, row in enumerate(self.rows) if row.count_pending() == 1]
        gaps = [i for i in range(len(ready)) if self.rows[i].count_pending() != 1]
        for gap, i in zip(gaps, reversed(ready), strict=False):
            self.cache.swap_rows(gap, i, max(len(self.rows[gap].tokens), len(self.rows[i].tokens)))
            self.rows[gap], self.rows[i] = self.rows[i], self.rows[gap]
        return len(ready)

    # -----------------------------------------------------------------------------------------------------------------
    # Whole answers

    @property
    def end_tokens(self) -> frozenset[int | None]:
        """The tokens that end a row."""
        return self.chat_tokens.end_tokens

    def generate(self, tokens: list[int], num_samples: int = 1, max_tokens: int | None = None,
                 temperature: float = 1.0, top_k: int | None = None,
                 seed: int = 42) -> Iterator[tuple[list[int], list[int]]]:
        """Continue a prompt `num_samples` times; yields (next token of each row, mask of each row) per position.

        A mask is 1 for a sampled token and 0 for any other: tool output, or the end token that pads a finished row
        until all rows are finished.

        tokens:     the prompt, at least bos
        max_tokens: per row, tool output included; None: until the model's positions are used up
        seed:       row i of a seed is the same text for any num_samples
        """
        requests = self._make_requests(tokens, num_samples, max_tokens, temperature, top_k, seed)
        return self._generate_columns(requests, len(tokens))

    def generate_batch(self, tokens: list[int], num_samples: int = 1, max_tokens: int | None = None,
                       temperature: float = 1.0, top_k: int | None = None,
                       seed: int = 42) -> tuple[list[list[int]], list[list[int]]]:
        """As `generate`, but whole: (rows with their prompt, their masks), without end tokens."""
        ((rows, masks),) = self.generate_many([tokens], num_samples, max_tokens, temperature, top_k, seed)
        for row, mask in zip(rows, masks, strict=True):
            if len(row) > len(tokens) and row[-1] in self.end_tokens:
                del row[-1], mask[-1]
        return rows, masks

    def generate_many(self, prompts: Sequence[list[int]], num_samples: int = 1, max_tokens: int | None = None,
                      temperature: float = 1.0, top_k: int | None = None,
                      seed: int = 42) -> list[tuple[list[list[int]], list[list[int]]]]:
        """`generate_batch` of many prompts in one batch, with end tokens; prompt i has the seed `seed` + i."""
        requests = [self._make_requests(tokens, num_samples, max_tokens, temperature, top_k, seed + i)
                    for i, tokens in enumerate(prompts)]
        groups = [[self._submit(request, has_events=False) for request in group] for group in requests]
        ids = {generation.id for group in groups for generation in group}
        try:
            while not ids.isdisjoint(self._unfinished):
                self._advance()
        finally:
            for request_id in ids:
                self.cancel(request_id)
        return [([generation.tokens for generation in group] or [list(tokens) for _ in range(num_samples)],
                 [generation.masks for generation in group] or [[0] * len(tokens) for _ in range(num_samples)])
                for tokens, group in zip(prompts, groups, strict=True)]

    def _make_requests(self, tokens: list[int], num_samples: int, max_tokens: int | None, temperature: float,
                       top_k: int | None, seed: int) -> list[Request]:
        """One request per sample; none for max_tokens 0."""
        if num_samples < 1 or (max_tokens or 0) < 0:
            raise UserError(f"num_samples must be 1 or more and max_tokens 0 or more, not {num_samples} "
                            f"and {max_tokens}")
        requests = [Request(tokens, max_tokens or None, temperature, top_k, seed=seed, sample=i)
                    for i in range(num_samples)]
        self.check(requests[0])  # now, not at the first token
        return [] if max_tokens == 0 else requests

    def _generate_columns(self, requests: list[Request], num_prompt: int) -> Iterator[tuple[list[int], list[int]]]:
        generations = [self._submit(request, has_events=False) for request in requests]
        try:
            for position in itertools.count(num_prompt):
                while any(len(generation.tokens) <= position and not generation.finish_reason
                          for generation in generations):
                    self._advance()
                if all(len(generation.tokens) <= position for generation in generations):
                    return
                yield ([generation.tokens[min(position, len(generation.tokens) - 1)] for generation in generations],
                       [generation.masks[position] if position < len(generation.masks) else 0
                        for generation in generations])
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


def compute_logprobs(logits: Tensor, token: int, num_likeliest: int) -> Logprobs:
    """Log-probabilities of the chosen token and of the likeliest, from one row of logits (V,)."""
    logprobs = logits.log_softmax(dim=-1)
    values, tokens = logprobs.topk(min(num_likeliest, len(logprobs)))
    return Logprobs(float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
