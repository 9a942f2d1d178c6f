"""Captions -> ids in the layout of a text tower: a tokenizer read from a `tokenizer.json`, or a small one trained here.

bert (CLIPS): WordPiece, `[bos=1] words [eos=2] [CLS]`. clip (CLIP, DreamLIP): byte-pair encoding, `[sot] words [eot]`.
Ids travel unpadded and a row's length is its number of real tokens: of a CLIP vocabulary id 0 is a word ("!").
"""

import heapq
import html
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise, takewhile
from pathlib import Path
from typing import Literal

import ftfy
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from encoders.config import TextConfig
from encoders.errors import ModelError, UsageError

Kind = Literal["bert", "clip"]
PAD, BOS, EOS = 0, 1, 2  # bos, eos and [CLS] are the bert kind's
NO_TARGET = -100  # in a captioner's targets: what cross-entropy ignores
BERT_SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[CLS]", "[UNK]")  # of vocabularies trained here, in the order of their ids
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
CLIP_PATTERN = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
FILE = "tokenizer.json"


class CaptionTokenizer:
    """Captions -> unpadded ids; `pad_texts` makes a batch. Raises ModelError if the vocabulary lacks the special
    tokens of `kind`."""

    def __init__(self, tokenizer: Tokenizer, kind: Kind):
        self._head, self._tail = _bert_frame(tokenizer) if kind == "bert" else _clip_frame(tokenizer)
        tokenizer.no_truncation()  # the layout is ours, whatever the file says
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # a caption that spells one is text
        self._tokenizer, self.kind = tokenizer, kind

    def __reduce__(self) -> tuple[type["CaptionTokenizer"], tuple[Tokenizer, Kind]]:
        return CaptionTokenizer, (self._tokenizer, self.kind)  # a pickled Tokenizer forgets what __init__ sets

    @classmethod
    def read(cls, folder: Path, kind: Kind) -> "CaptionTokenizer":
        """Read `folder/tokenizer.json`. Raises ModelError if it is missing, is no tokenizer or is not of this kind."""
        file = folder / FILE
        if not file.is_file():
            raise ModelError(f"{file} does not exist; text.tokenizer must name a folder with a {FILE}")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"{file} cannot be read as a tokenizer: {error}") from error
        try:
            return cls(tokenizer, kind)
        except ModelError as error:
            raise ModelError(f"{file}: {error}") from error

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, kind: Kind) -> "CaptionTokenizer":
        """A lower-case vocabulary for a small world. Equal captions give equal ids: ties go by name (the library's own
        trainers break them at random).

        Raises UsageError if `vocab_size` cannot hold the special tokens and what spells any word.
        """
        tokenizer = _bert_skeleton() if kind == "bert" else _clip_skeleton()
        normalizer, splitter = tokenizer.normalizer, tokenizer.pre_tokenizer
        words: Counter[str] = Counter()
        for caption in captions:
            caption = _cleaned(caption) if kind == "clip" else caption
            words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)))
        tokenizer.model = _word_pieces(words, vocab_size) if kind == "bert" else _byte_pairs(words, vocab_size)
        return cls(tokenizer, kind)

    def save(self, folder: Path) -> None:
        """Write `folder/tokenizer.json`."""
        aside = folder / f".{FILE}.partial"
        self._tokenizer.save(str(aside))
        aside.replace(folder / FILE)

    @property
    def size(self) -> int:
        """Ids run below this."""
        return max(self._tokenizer.get_vocab().values()) + 1

    @property
    def eos(self) -> int:
        """The id that ends the words."""
        return self._tail[0]

    def encode(self, text: str, length: int) -> list[int]:
        """At most `length` ids, unpadded: bert [bos] words [eos] [CLS], clip [sot] words [eot]; words beyond the room
        are cut."""
        return self.lay_out(self.words(text), length)

    def lay_out(self, words: Sequence[int], length: int) -> list[int]:
        """The same for ids of words."""
        room = length - len(self._head) - len(self._tail)
        return [*self._head, *words[:room], *self._tail]

    def encode_target(self, text: str, length: int) -> list[int]:
        """What the captioner predicts, unpadded: words [eos], at most `length - 1` ids."""
        return [*self.words(text)[: length - 2], self.eos]

    def decode(self, ids: Iterable[int]) -> str:
        """The words up to the first end token; special tokens are left out."""
        special = {*self._head, *self._tail, *([PAD] if self.kind == "bert" else [])}
        words = [i for i in takewhile(lambda i: i != self.eos, ids) if i not in special]
        text: str = self._tokenizer.decode(words)
        return text.replace(WORD_END, " ").strip() if self.kind == "clip" else text

    def words(self, text: str) -> list[int]:
        """The ids of a text's words, nothing added or cut."""
        text = _cleaned(text) if self.kind == "clip" else text
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def pad_texts(rows: Sequence[Sequence[int]], config: TextConfig) -> Tensor:
    """Unpadded texts -> (n,L) int64 with L = config.length, padded with 0. In kind bert a row's last id, the class
    token that is pooled, goes to the last slot; the padding lies before it."""
    ids = np.zeros((len(rows), config.length), dtype=np.int64)
    lengths = np.array([len(row) for row in rows])
    if config.kind == "bert":
        ids[:, -1] = [row[-1] for row in rows]
        rows, lengths = [row[:-1] for row in rows], lengths - 1
    real = np.arange(config.length) < lengths[:, None]  # (n,L)
    ids[real] = np.fromiter(chain.from_iterable(rows), dtype=np.int64)
    return torch.from_numpy(ids)


def _cleaned(text: str) -> str:
    """CLIP's clean-up before its tokenizer: broken encodings and typographic quotes mended, HTML entities resolved
    (some are escaped twice), one space for any white space, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _bert_frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What stands before and after the words. Ids 0, 1 and 2 must be free of meaning: bert-base-uncased holds [PAD] and
    two [unused] there."""
    cls = tokenizer.token_to_id("[CLS]")
    found = [tokenizer.id_to_token(i) for i in (PAD, BOS, EOS)]
    free = [token in BERT_SPECIAL[:3] or str(token).startswith("[unused") for token in found]
    if cls is None or not all(free):
        raise ModelError(
            f"not a WordPiece vocabulary in the layout of text.kind bert: it needs a [CLS] token (found id {cls}) and "
            f"padding or unused tokens as ids 0, 1, 2 (found {found}); CLIP's BPE is text.kind clip"
        )
    return [BOS], [EOS, cls]


def _clip_frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What stands before and after the words."""
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    if start is None or end is None:
        raise ModelError(
            f"not a byte-pair vocabulary of text.kind clip: it needs {START} (found id {start}) and {END} (found id "
            f"{end}); BERT's WordPiece is text.kind bert"
        )
    return [start], [end]


def _bert_skeleton() -> Tokenizer:
    """bert-base-uncased's tokenizer without a vocabulary."""
    tokenizer = Tokenizer(models.WordPiece())
    tokenizer.normalizer, tokenizer.pre_tokenizer = (
        normalizers.BertNormalizer(lowercase=True),
        pre_tokenizers.BertPreTokenizer(),
    )
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _clip_skeleton() -> Tokenizer:
    """CLIP's tokenizer without a vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(CLIP_PATTERN, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _word_pieces(words: Counter[str], vocab_size: int) -> models.WordPiece:
    """All characters of the words, alone and inside a word, then the most frequent words."""
    characters = sorted({character for word in words for character in word})
    pieces = [*BERT_SPECIAL, *characters, *(f"##{character}" for character in characters)]
    if len(pieces) > vocab_size:
        raise UsageError(f"text.vocab_size {vocab_size} is below the {len(pieces)} tokens that spell the captions")
    by_count = sorted(words, key=lambda word: (-words[word], word))
    pieces = list(dict.fromkeys([*pieces, *by_count]))[:vocab_size]
    return models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]")


def _byte_pairs(words: Counter[str], vocab_size: int) -> models.BPE:
    """All 256 bytes (as the characters that stand for them), alone and at the end of a word, then what the most
    frequent neighbours merge to, then the two special tokens; fewer than `vocab_size` if no neighbours are left."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = dict.fromkeys([*alphabet, *(byte + WORD_END for byte in alphabet)])
    room = vocab_size - 2
    if len(pieces) > room:
        raise UsageError(f"text.vocab_size {vocab_size} is below the {len(pieces) + 2} tokens that spell any text")
    spelt = [[*word[:-1], word[-1] + WORD_END] for word in words]
    counts = list(words.values())
    frequency: Counter[tuple[str, str]] = Counter()
    places: defaultdict[tuple[str, str], set[int]] = defaultdict(set)  # words that hold, or once held, a pair
    for index, symbols in enumerate(spelt):
        for pair in pairwise(symbols):
            frequency[pair] += counts[index]
            places[pair].add(index)
    queue = [(-count, pair) for pair, count in frequency.items()]
    heapq.heapify(queue)
    merges: dict[tuple[str, str], None] = {}  # ordered; a pair can come up again when another merge spells its parts
    while queue and len(pieces) < room:
        count, pair = heapq.heappop(queue)
        if -count != frequency[pair]:
            continue  # counted anew since: the fresh entry is in the queue as well
        merges[pair] = pieces["".join(pair)] = None
        changed: set[tuple[str, str]] = set()
        for index in places.pop(pair):
            before = list(pairwise(spelt[index]))
            spelt[index] = _joined(spelt[index], pair)
            after = list(pairwise(spelt[index]))
            for neighbours in before:
                frequency[neighbours] -= counts[index]
            for neighbours in after:
                frequency[neighbours] += counts[index]
                places[neighbours].add(index)
            changed.update(before, after)
        for neighbours in changed:
            if frequency[neighbours]:
                heapq.heappush(queue, (-frequency[neighbours], neighbours))
    vocabulary = {piece: index for index, piece in enumerate([*pieces, START, END])}
    return models.BPE(vocabulary, list(merges), end_of_word_suffix=WORD_END)


def _joined(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """The symbols with every occurrence of the pair, from the left, made one."""
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined
