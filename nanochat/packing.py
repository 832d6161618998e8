"""Token lists -> rows of one length: best-fit packing with cropping (text), or whole with padding (chat).

A value of a row is a token to learn (its id, 0 or more), a token that is only read (a hidden id, below PAD) or padding
(PAD). So rows of text are plain ids, and a loader moves one array instead of tokens and a mask.

R rows, P pieces of documents.
"""

import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

PAD = -1                 # fills the end of an incomplete row; as a target it means "nothing to learn"
MIN_PIECE_TOKENS = 64    # a long document's last piece is dropped below this: too little context to learn from
MIN_ROWS_TO_DROP = 16    # the incomplete last row of a group with at least so many full rows is dropped


def hide(token):
    """The hidden value of a token, which is read but not learned; its own inverse. Takes an id or an array of them."""
    return PAD - 1 - token


@dataclass(frozen=True)
class PackStats:
    """What packing did to the tokens of some documents: in = row + crop + tail + piece. Groups add up."""
    in_tokens:    int = 0   # of all documents with their bos, plus the first token of each further piece, a repeat
    row_tokens:   int = 0   # in rows, to be learned from or hidden
    crop_tokens:  int = 0   # cut off to make a piece fit; with long_docs 'crop' also all that exceeds a row
    tail_tokens:  int = 0   # in incomplete last rows that were dropped
    piece_tokens: int = 0   # in last pieces too short to keep, and in documents with nothing to learn
    pad_tokens:   int = 0   # filled in to complete kept rows; not part of in_tokens
    cropped_docs: int = 0   # pieces that lost their end
    num_docs:     int = 0
    skipped_docs: int = 0   # with nothing to learn

    def __add__(self, other: "PackStats") -> "PackStats":
        return PackStats(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def fractions(self) -> dict[str, float]:
        """The losses as fractions of the incoming tokens, and padding as a fraction of the rows."""
        in_tokens, slots = max(1, self.in_tokens), max(1, self.row_tokens + self.pad_tokens)
        return {"crop_frac": self.crop_tokens / in_tokens, "tail_frac": self.tail_tokens / in_tokens,
                "piece_frac": self.piece_tokens / in_tokens, "pad_frac": self.pad_tokens / slots}


def pack_documents(docs: Sequence[Sequence[int]], row_tokens: int, *, packing: str = "best-fit",
                   long_docs: str = "split", keep_tail: bool = False) -> tuple[np.ndarray, PackStats]:
    """Pack documents, each a list of tokens that starts with bos, into rows (R, row_tokens) int32, padded with PAD.

    packing:   'best-fit': every piece of a document starts with bos and is cut only where `place_best_fit` must.
               'stream': the documents in their order, cut wherever a row ends; a row starts with the last token of
               the one before it, so that each token is a target once.
    long_docs: the rest of a document beyond a row: 'split' cuts it into more pieces, 'crop' drops it
    keep_tail: pad the incomplete last row instead of dropping it (validation)
    """
    num_docs, doc_tokens = len(docs), sum(map(len, docs))
    docs = [doc for doc in docs if len(doc) > 1]                    # nothing but bos: nothing to learn
    short_tokens = doc_tokens - sum(map(len, docs))
    cropped_docs = sum(len(doc) > row_tokens for doc in docs) if long_docs == "crop" else 0
    if long_docs == "crop":
        docs = [doc[:row_tokens] for doc in docs]
    # struct turns Python integers into an array faster than numpy's own conversions do
    flat = np.frombuffer(b"".join(struct.pack(f"{len(doc)}i", *doc) for doc in docs), np.int32)
    crop_tokens = doc_tokens - short_tokens - len(flat)

    lengths = np.array([len(flat)] if packing == "stream" else [len(doc) for doc in docs], np.int64)
    starts, sizes, nth = cut_documents(lengths, row_tokens)
    if packing == "stream":
        placed, kept = np.arange(len(sizes)), sizes
    else:
        # At most half a row: with a small context the fixed limit alone would drop every last piece
        short = (nth > 0) & (sizes < min(MIN_PIECE_TOKENS, row_tokens // 2))
        short_tokens += int(sizes[short].sum())
        starts, sizes = starts[~short], sizes[~short]
        placed, kept = place_best_fit(sizes, row_tokens)
    spans = zip(starts[placed].tolist(), kept.tolist(), strict=True)
    packed = np.concatenate([flat[:0], *(flat[start:start + size] for start, size in spans)])
    if packing == "best-fit":
        packed[np.cumsum(kept) - kept] = flat[:1]                   # further pieces start with bos too

    num_full, tail_tokens = divmod(len(packed), row_tokens)
    if keep_tail or num_full < MIN_ROWS_TO_DROP:
        tail_tokens = 0
    kept_tokens = len(packed) - tail_tokens
    rows = np.full((-(-kept_tokens // row_tokens), row_tokens), PAD, np.int32)
    rows.reshape(-1)[:kept_tokens] = packed[:kept_tokens]
    return rows, PackStats(
        in_tokens=doc_tokens + int(np.count_nonzero(nth)), row_tokens=kept_tokens,
        crop_tokens=crop_tokens + int(np.sum(sizes[placed] - kept)), tail_tokens=tail_tokens,
        piece_tokens=short_tokens, pad_tokens=rows.size - kept_tokens,
        cropped_docs=cropped_docs + int(np.sum(sizes[placed] > kept)), num_docs=num_docs,
        skipped_docs=num_docs - len(docs))


def cut_documents(lengths: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents that lie end to end into pieces of at most a row; returns (starts, sizes, nth), (P,) int64 each.
    Piece `nth` of a document begins with the last token of the piece before it, which packing replaces by bos."""
    stride = row_tokens - 1
    num_pieces = np.maximum(1, -(-(lengths - 1) // stride)) * (lengths > 0)
    doc_idx = np.repeat(np.arange(len(lengths)), num_pieces)
    nth = np.arange(len(doc_idx)) - (np.cumsum(num_pieces) - num_pieces)[doc_idx]
    starts = (np.cumsum(lengths) - lengths)[doc_idx] + nth * stride
    return starts, np.minimum(row_tokens, lengths[doc_idx] - nth * stride), nth


def place_best_fit(sizes: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of the pieces that fills up rows, as (piece indices, tokens kept of each).

    Repeatedly the longest piece that fits the gap left in the row; where none fits, the shortest one left, cropped
    to the gap. (Cropping the longest instead wastes 4-10 times more, taking pieces at random 1-3 points more.) Of
    equal pieces the last goes first where one fits, and the first where none does.
    """
    order = np.argsort(sizes, kind="stable")
    left, left_sizes = order.tolist(), sizes[order].tolist()        # the pieces not placed yet, shortest first
    placed, kept, gap = [], [], row_tokens
    while left:
        i = max(0, bisect_right(left_sizes, gap) - 1)
        placed.append(left.pop(i))
        kept.append(min(left_sizes.pop(i), gap))
        gap = gap - kept[-1] or row_tokens
    return np.array(placed, np.int64), np.array(kept, np.int64)


def pack_whole(docs: Sequence[Sequence[int]], row_tokens: int) -> tuple[np.ndarray, PackStats]:
    """Pack documents into rows (R, row_tokens) int32 without cutting them; one longer than a row is truncated. Each row
    takes repeatedly the longest document that fits (first-fit decreasing), then PAD."""
    left, rows = sorted((doc[:row_tokens] for doc in docs if len(doc)), key=len), [[]]
    while left:
        i = bisect_right(left, row_tokens - len(rows[-1]), key=len) - 1
        if i >= 0:
            rows[-1].extend(left.pop(i))
        else:
            rows.append([])
    packed = np.full((len(rows) if rows[0] else 0, row_tokens), PAD, np.int32)
    for packed_row, row in zip(packed, rows, strict=False):
        packed_row[:len(row)] = row
    in_tokens, kept_tokens = sum(map(len, docs)), sum(map(len, rows))
    return packed, PackStats(
        in_tokens=in_tokens, row_tokens=kept_tokens, crop_tokens=in_tokens - kept_tokens, num_docs=len(docs),
        pad_tokens=packed.size - kept_tokens, cropped_docs=sum(len(doc) > row_tokens for doc in docs))
