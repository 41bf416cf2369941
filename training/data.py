"""From text to batches: encode, mark what is to be learnt, pack into rows.

In a conversation only the assistant's tokens (and the end marker) are targets; prose is learnt
whole. Documents are laid end to end in rows, so that the model also meets late positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from training.tokenizer import END_OF_TEXT, IM_END, IM_START
from training.words import Message

IGNORE = -100
BATCH_TOKENS = 2048  # of one worker
# Row length -> share of the steps. Most answers are short; some rows teach far positions.
ROW_LENGTHS: tuple[tuple[int, float], ...] = ((256, 0.45), (512, 0.4), (1024, 0.1), (2048, 0.05))


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids, and for each whether the model should learn to produce it."""

    ids: np.ndarray  # int16 [tokens]
    learn: np.ndarray  # bool [tokens]


def encode_prose(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Document]:
    out = []
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        ids = np.array([*encoding.ids, END_OF_TEXT], dtype=np.int16)
        out.append(Document(ids, np.ones(len(ids), dtype=bool)))
    return out


def encode_chat(tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]]) -> list[Document]:
    """Targets run from after "<|im_start|>assistant\\n" to "<|im_end|>", both of each turn, without
    the tokens of what is `given`."""
    texts, spans = [], []
    for messages in conversations:
        text = ""
        given = []
        for m in messages:
            start = len(text) + len(f"<|im_start|>{m['role']}\n")
            text += f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n"
            if m.get("given"):
                given.append((start, start + len(m["given"])))
        texts.append(text)
        spans.append(given)
    header = tokenizer.encode("assistant\n", add_special_tokens=False).ids
    out = []
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    for encoding, given in zip(encodings, spans, strict=True):
        ids = encoding.ids
        learn = np.zeros(len(ids) + 1, dtype=bool)
        position = 0
        while IM_START in ids[position:]:
            start = ids.index(IM_START, position) + 1
            end = ids.index(IM_END, start) + 1
            if ids[start : start + len(header)] == header:
                learn[start + len(header) : end] = True
            position = end
        if given:
            begins = np.array([offset[0] for offset in encoding.offsets])
            for first, last in given:
                learn[:-1][(begins >= first) & (begins < last)] = False
        out.append(Document(np.array([*ids, END_OF_TEXT], dtype=np.int16), learn))
    return out


def save_documents(documents: Sequence[Document], path: Path) -> None:
    """One flat file that every worker reads."""
    sizes = np.array([len(d.ids) for d in documents], dtype=np.int64)
    np.savez(
        path,
        sizes=sizes,
        ids=np.concatenate([d.ids for d in documents]),
        learn=np.concatenate([d.learn for d in documents]),
    )


def load_documents(path: Path) -> list[Document]:
    with np.load(path, allow_pickle=False) as flat:
        ids, learn, ends = flat["ids"], flat["learn"], np.cumsum(flat["sizes"])
    return [
        Document(ids[end - size : end], learn[end - size : end])
        for end, size in zip(ends.tolist(), np.diff(ends, prepend=0).tolist(), strict=True)
    ]


class Packer:
    """An endless stream of (ids, targets) rows over shuffled documents."""

    def __init__(self, documents: Sequence[Document], *, seed: int) -> None:
        self.documents = documents
        self.rng = np.random.default_rng(seed)
        self.order = self._orders()

    def _orders(self) -> Iterator[int]:
        while True:
            yield from self.rng.permutation(len(self.documents)).tolist()

    def row(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """`length + 1` tokens of whole documents, the last one cut."""
        ids: list[np.ndarray] = []
        learn: list[np.ndarray] = []
        size = 0
        while size < length + 1:
            document = self.documents[next(self.order)]
            ids.append(document.ids)
            learn.append(document.learn)
            size += len(document.ids)
        flat = np.concatenate(ids)[: length + 1].astype(np.int64)
        mask = np.concatenate(learn)[: length + 1]
        return flat[:-1], np.where(mask[1:], flat[1:], IGNORE)

    def batch(self, tokens: int = BATCH_TOKENS) -> tuple[Tensor, Tensor]:
        """Ids and targets, each [rows, length]; rows * length is `tokens`."""
        lengths, shares = zip(*ROW_LENGTHS, strict=True)
        length = min(tokens, int(self.rng.choice(lengths, p=shares)))
        rows = [self.row(length) for _ in range(tokens // length)]
        ids, targets = (np.stack(part) for part in zip(*rows, strict=True))
        return torch.from_numpy(ids), torch.from_numpy(targets)
