"""Conversations -> groups of packed rows: what midtraining and SFT learn from, and how long an epoch of it is.

Conversations come in groups of 1,024 that are rendered and packed on their own. Whether a token is learned stands in
the rows (nanochat.packing); a conversation with nothing to learn is left out and counted.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass

import numpy as np
import torch

from nanochat.common import Ranks, UserError, count_cpus, print0, sum_over_ranks, timed
from nanochat.dataloader import ValidationBatches, take_first_rows
from nanochat.packing import PackStats, hide, pack_documents, pack_whole

GROUP_SIZE = 1024
MAX_HASHED = 1024   # conversations, spread evenly, by which data is known again; all of it would take minutes


@dataclass(frozen=True)
class Mixture:
    """Conversations to train on, and held-out ones of the same kinds to validate on."""
    train: Sequence[dict]
    val:   Sequence[dict]
    parts: dict[str, str]   # task or file -> what is used of it, for people and for comparing runs

    @property
    def name(self) -> str:
        return ", ".join(self.parts)


class ConversationGroups:
    """Groups of a list of conversations, such as a task or a mixture of tasks.

    supervise: 'assistant': what the assistant writes is learned; 'all': every token
    keep_whole: none is cropped: those longer than T+1 tokens are truncated, rows are filled with padding. Otherwise as
                text with long_docs 'crop': rows are filled up, and some conversations lose their end
    """

    def __init__(self, name: str, conversations: Sequence[dict], tokenizer, T: int, *, supervise: str,
                 keep_whole: bool):
        self.name, self.conversations, self.tokenizer, self.T = name, conversations, tokenizer, T
        self.supervise, self.keep_whole = supervise, keep_whole
        self.bos_id = tokenizer.get_bos_token_id()
        self.identity = {"data": hash_conversations(conversations), "T": T, "supervise": supervise,
                         "keep_whole": keep_whole}
        self.empty = f"there is nothing to learn in {name}: no conversation has an answer within {T} tokens"

    def __len__(self) -> int:
        return -(-len(self.conversations) // GROUP_SIZE)

    def load_rows(self, group: int) -> tuple[np.ndarray, PackStats]:
        indices = range(group * GROUP_SIZE, min((group + 1) * GROUP_SIZE, len(self.conversations)))
        docs = [self._render(idx) for idx in indices]
        # what lies beyond a row is cut off, so an answer that begins there can't be learned
        useful = [doc for doc in docs if max(doc[1:self.T + 1], default=-1) >= 0]
        if self.keep_whole:
            rows, stats = pack_whole(useful, self.T + 1)
        else:
            rows, stats = pack_documents(useful, self.T + 1, long_docs="crop")
        num_docs, num_tokens = len(docs) - len(useful), sum(map(len, docs)) - sum(map(len, useful))
        return rows, stats + PackStats(in_tokens=num_tokens, piece_tokens=num_tokens, num_docs=num_docs,
                                       skipped_docs=num_docs)

    def _render(self, idx: int) -> list[int]:
        """The tokens of a conversation, all of them, those not to be learned hidden."""
        conversation = self.conversations[idx]
        try:
            ids, mask = self.tokenizer.render_conversation(conversation, max_tokens=None)
        except (ValueError, TypeError, KeyError) as error:
            text = json.dumps(conversation, ensure_ascii=False, default=str)[:100]
            raise UserError(f"a conversation of {self.name} can't be learned from: {error}; it begins {text}") from None
        if self.supervise == "all":
            return ids
        return [token if learned else hide(token) for token, learned in zip(ids, mask, strict=True)]


def hash_conversations(conversations: Sequence[dict]) -> str:
    """16 hex digits that tell one list from another by its length and MAX_HASHED of its conversations."""
    digest, num = hashlib.sha256(str(len(conversations)).encode()), len(conversations)
    for i in range(min(num, MAX_HASHED)):
        conversation = conversations[i * num // min(num, MAX_HASHED)]
        digest.update(json.dumps(conversation, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Epoch:
    """What going through the groups once means."""
    num_rows: int
    stats:    PackStats

    def to_json(self) -> dict:
        return {"num_rows": self.num_rows, "stats": astuple(self.stats)}

    @staticmethod
    def from_json(value: dict) -> "Epoch":
        return Epoch(value["num_rows"], PackStats(*value["stats"]))

    def describe(self) -> dict[str, float]:
        """What is logged of it: counts, and what was lost as fractions."""
        return {"num_conversations": self.stats.num_docs, "num_rows": self.num_rows,
                "num_shortened": self.stats.cropped_docs, "num_skipped_conversations": self.stats.skipped_docs,
                **self.stats.fractions()}


def count_epoch(groups: ConversationGroups, ranks: Ranks, device: torch.device) -> Epoch:
    """Pack all groups once, to know how many rows there are and that every conversation is in order. Collective."""
    num_threads = max(1, count_cpus() // ranks.world_size)
    with timed(f"packing {len(groups.conversations):,} conversations"), ThreadPoolExecutor(num_threads) as pool:
        packed = pool.map(groups.load_rows, range(ranks.rank, len(groups), ranks.world_size))
        sums = sum((np.array([len(rows), *astuple(stats)]) for rows, stats in packed),
                   np.zeros(1 + len(astuple(PackStats())), np.int64))
    num_rows, *stats = sum_over_ranks(torch.from_numpy(sums).to(device)).tolist()
    if not num_rows:
        raise UserError(groups.empty)
    epoch = Epoch(num_rows, PackStats(*stats))
    fractions = epoch.stats.fractions()
    print0(f"conversations: {epoch.stats.num_docs:,} an epoch, in {num_rows:,} rows of {groups.T} tokens; "
           f"{epoch.stats.cropped_docs:,} shortened ({fractions['crop_frac']:.2%} of the tokens), "
           f"{epoch.stats.skipped_docs:,} with nothing to learn, padding {fractions['pad_frac']:.2%}")
    return epoch


def validation_conversations(name: str, conversations: Sequence[dict], tokenizer, T: int, num_rows: int, *,
                             batch_rows: int, ranks: Ranks) -> ValidationBatches | None:
    """A fixed set of held-out conversations, by one rule for all stages; None where none are held out.

    The rule: whole conversations, truncated to T+1 tokens, rows padded, only what the assistant writes counts.
    """
    if not len(conversations):
        return None
    groups = ConversationGroups(name, conversations, tokenizer, T, supervise="assistant", keep_whole=True)
    rule = f"held-out conversations of {name}; what the assistant writes; whole, truncated to the context, padded"
    return take_first_rows(groups, num_rows, rule, batch_rows=batch_rows, ranks=ranks)
