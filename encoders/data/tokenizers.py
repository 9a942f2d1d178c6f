"""WordPiece in the layout of CLIPS: `[bos=1] words [eos=2] [pad=0 ...] [CLS]`, the class token in the last slot.

Reads a `tokenizer.json` (bert-base-uncased's, for the published weights) or trains a small one on given captions.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from encoders.errors import ModelError, UsageError

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[CLS]", "[UNK]")  # of vocabularies trained here, in the order of their ids
FILE = "tokenizer.json"


class CaptionTokenizer:
    """Captions -> fixed-length ids."""

    def __init__(self, tokenizer: Tokenizer):
        cls = tokenizer.token_to_id("[CLS]")
        if cls is None or cls in (PAD, BOS, EOS):
            raise ModelError("the tokenizer has no [CLS] token beside ids 0, 1 and 2; a WordPiece vocabulary is needed")
        tokenizer.no_truncation()  # the layout is ours, whatever the file says
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._cls = cls

    @classmethod
    def read(cls, folder: Path) -> "CaptionTokenizer":
        """Read `folder/tokenizer.json`. Raises ModelError if it is missing or is not a tokenizer."""
        file = folder / FILE
        if not file.is_file():
            raise ModelError(f"{file} does not exist; text.tokenizer must name a folder with a {FILE}")
        try:
            return cls(Tokenizer.from_file(str(file)))
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"{file} cannot be read as a tokenizer: {error}") from error

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "CaptionTokenizer":
        """A lower-case WordPiece vocabulary for a small world: all characters of the captions, then the most frequent
        words. Equal captions give equal ids (the library's own trainer breaks ties at random).

        Raises UsageError if `vocab_size` cannot hold the special tokens and the characters.
        """
        normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
        words: Counter[str] = Counter()
        for caption in captions:
            words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)))
        characters = sorted({character for word in words for character in word})
        pieces = [*SPECIAL, *characters, *(f"##{character}" for character in characters)]
        if len(pieces) > vocab_size:
            raise UsageError(f"text.vocab_size {vocab_size} is below the {len(pieces)} tokens that spell the captions")
        by_count = sorted(words, key=lambda word: (-words[word], word))
        pieces = list(dict.fromkeys([*pieces, *by_count]))[:vocab_size]
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoders.WordPiece()
        return cls(tokenizer)

    def save(self, folder: Path) -> None:
        """Write `folder/tokenizer.json`."""
        aside = folder / f".{FILE}.partial"
        self._tokenizer.save(str(aside))
        aside.replace(folder / FILE)

    @property
    def size(self) -> int:
        """Ids run below this."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str, length: int) -> list[int]:
        """`length` ids: [bos] words [eos] [pad ...] [CLS]; words beyond the room are cut."""
        return self.lay_out(self.words(text), length)

    def lay_out(self, words: Sequence[int], length: int) -> list[int]:
        """The same for ids of words."""
        words = words[: length - 3]
        return [BOS, *words, EOS, *[PAD] * (length - 3 - len(words)), self._cls]

    def encode_target(self, text: str, length: int) -> list[int]:
        """What the captioner predicts: words [eos] in at most `length - 1` slots, -100 after them."""
        target = [*self.words(text)[: length - 2], EOS]
        return target + [-100] * (length - len(target))

    def decode(self, ids: Iterable[int]) -> str:
        """Words of the ids; special tokens are left out."""
        return self._tokenizer.decode([i for i in ids if i not in (PAD, BOS, EOS, self._cls, -100)])

    def words(self, text: str) -> list[int]:
        """The ids of a text's words, nothing added or cut."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids
