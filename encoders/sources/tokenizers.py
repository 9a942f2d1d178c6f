"""Caption tokenizers of published models: tokenizer.json, the older vocabulary files, or the BPE that open_clip
brings along."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from encoders.data.tokenizers import END, FILE, START, CaptionTokenizer, Kind
from encoders.errors import ModelError
from encoders.sources.open_clip import open_clip_class
from encoders.weights.files import inside

VOCABULARIES: dict[Kind, tuple[str, ...]] = {"bert": ("vocab.txt",), "clip": ("vocab.json", "merges.txt")}


def read_tokenizer(folder: Path, kind: Kind) -> CaptionTokenizer | None:
    """The tokenizer of a folder, or None if it holds none. Raises ModelError if it is not of this kind."""
    if inside(folder, FILE).is_file():
        return CaptionTokenizer.read(folder, kind)
    files = [inside(folder, name) for name in VOCABULARIES[kind]]
    if not all(file.is_file() for file in files):
        return None
    try:
        return CaptionTokenizer(_word_pieces(*files) if kind == "bert" else _byte_pairs(*files), kind)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: {' and '.join(VOCABULARIES[kind])} cannot be read: {error}") from error


def open_clip_tokenizer() -> CaptionTokenizer:
    """CLIP's own byte-pair encoding, from the vocabulary in open_clip's package. Raises UsageError without it."""
    theirs = open_clip_class("SimpleTokenizer")()
    marks = dict(zip(theirs.all_special_ids, (START, END), strict=True))
    vocabulary = {marks.get(index, piece): index for piece, index in theirs.encoder.items()}
    return CaptionTokenizer(_clip(vocabulary, list(theirs.bpe_ranks)), "clip")


def _word_pieces(vocabulary: Path) -> Tokenizer:
    """bert-base-uncased's."""
    tokenizer = Tokenizer(models.WordPiece.from_file(str(vocabulary), unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _byte_pairs(vocabulary: Path, merges: Path) -> Tokenizer:
    lines = merges.read_text().splitlines()
    return _clip(
        json.loads(vocabulary.read_text()), [line for line in lines if line and not line.startswith("#version")]
    )


def _clip(vocabulary: dict[str, int], merges: list[str]) -> Tokenizer:
    from transformers import CLIPTokenizer

    tokenizer: Tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges).backend_tokenizer
    return tokenizer
