"""Token ids: the CLIP kind against open_clip's tokenizer, the BERT kind against transformers', training against a naive
recount of all pairs."""

import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from transformers import BertTokenizer, CLIPTokenizer

from encoders.config import TextConfig
from encoders.data.tokenizers import CaptionTokenizer, pad_texts
from encoders.errors import ModelError, UsageError

TRICKY = [
    "a photo of a DOG",
    "",
    "!",
    "! wow!!! 100,000 items @ $3.50 (50% off)",
    "Café NAÏVE cafe\u0301 ÉCOLE",
    "Tom &amp;amp; Jerry &lt;b&gt;bold&lt;/b&gt; 5 &gt; 3 <br>",
    "🍎🐶 👨‍👩‍👧 ☀️",
    "“curly” ‘quotes’ – dash… it’s",
    "doesnâ€™t schÃ¶n",
    "ﬁligree Ｆｕｌｌ ½ ² Ⅳ",
    "日本語 العربية ΟΔΟΣ İstanbul",
    "  spaces\t\r\nand\u00a0no-break ",
    "it's don't I'LL we'Ve o'clock's",
    "#hash_tag IMG_1234.jpg http://x.org/?a=1&b=2",
    "tab\u0007bell zero\u200bwidth",
    "over-long caption, " * 60,
]
CAPTIONS = ["A dog, a cat and a red apple.", "Two dogs on red grass", "low lower lowest newest widest", "aaa aaaa aa"]


@pytest.fixture(scope="module")
def theirs() -> SimpleTokenizer:
    return SimpleTokenizer()


@pytest.fixture(scope="module")
def published(theirs: SimpleTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's own vocabulary, from the file that open_clip ships, as transformers writes it."""
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): index for token, index in theirs.encoder.items()}
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=list(theirs.bpe_ranks))
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def clip(published: Path) -> CaptionTokenizer:
    return CaptionTokenizer.read(published, "clip")


def bert_folder(folder: Path, words: list[str]) -> Path:
    bert = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    bert.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("text", TRICKY, ids=range(len(TRICKY)))
def test_clip_ids_equal_open_clips(clip: CaptionTokenizer, theirs: SimpleTokenizer, text: str) -> None:
    assert clip.words(text) == theirs.encode(text)
    row = clip.encode(text, 77)
    assert pad_texts([row], TextConfig(kind="clip", length=77)).equal(theirs(text))
    assert len(row) == min(len(theirs.encode(text)) + 2, 77)
    assert row[-1] == clip.eos


def test_clip_layouts_and_words_again(clip: CaptionTokenizer) -> None:
    assert (clip.size, clip.eos) == (49408, 49407)
    assert clip.words("!¤")[0] == 0  # a real token with the id of padding
    assert clip.encode("!+ a dog runs", 6) == [49406, 0, 266, 320, 1929, 49407]
    assert clip.encode_target("a dog", 5) == [320, 1929, 49407]
    assert clip.encode_target("a dog a dog", 4) == [320, 1929, 49407]  # at most 3, the last is the end
    padded = pad_texts([clip.encode("Café, 🍎 dogs!", 20)], TextConfig(kind="clip", length=20))[0]
    assert clip.decode(padded.tolist()) == "café , 🍎 dogs !"


def test_special_tokens_in_captions_are_text(clip: CaptionTokenizer, tmp_path: Path) -> None:
    assert max(clip.words("a <|endoftext|> <|startoftext|> b")) < 49406
    words = ["[PAD]", "[unused1]", "[unused2]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "[", "]", "cls"]
    bert = CaptionTokenizer.read(bert_folder(tmp_path, words), "bert")
    assert bert.words("a [CLS]") == [7, 8, 10, 9]
    in_worker = pickle.loads(pickle.dumps(bert))  # noqa: S301 - our own bytes
    assert in_worker.words("a [CLS]") == [7, 8, 10, 9]


def test_bert_layout_of_clips_and_bert_vocabulary(tmp_path: Path) -> None:
    words = ["[PAD]", "[unused1]", "[unused2]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "##gy", "runs", ","]
    ours = CaptionTokenizer.read(bert_folder(tmp_path, words), "bert")
    text = "A doggy, runs"
    bert = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    expected = bert(text, add_special_tokens=False)["input_ids"]
    assert ours.words(text) == expected
    assert ours.encode(text, 12) == [1, *expected, 2, 4]
    assert ours.encode("dog " * 50, 8) == [1, *[7] * 5, 2, 4]
    assert ours.lay_out([], 8) == [1, 2, 4]
    assert ours.encode_target("a dog", 5) == [6, 7, 2]
    assert ours.encode_target("a dog runs a dog", 5) == [6, 7, 9, 2]
    assert ours.decode(ours.encode(text, 12)) == "a doggy, runs"
    assert (ours.size, ours.eos) == (12, 2)  # transformers adds [MASK]


def test_padding_puts_the_class_token_last_in_bert_only() -> None:
    rows = [[1, 7, 7, 2, 4], [1, 2, 4], [1, 7, 7, 7, 2, 4]]
    bert = pad_texts(rows, TextConfig(length=6))
    assert bert.tolist() == [[1, 7, 7, 2, 0, 4], [1, 2, 0, 0, 0, 4], [1, 7, 7, 7, 2, 4]]
    clip = pad_texts(rows, TextConfig(kind="clip", length=6))
    assert clip.tolist() == [[1, 7, 7, 2, 4, 0], [1, 2, 4, 0, 0, 0], [1, 7, 7, 7, 2, 4]]
    assert bert.dtype == clip.dtype == torch.int64


def test_a_vocabulary_of_the_other_kind_is_refused(published: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a WordPiece vocabulary.*text\.kind clip"):
        CaptionTokenizer.read(published, "bert")
    stock = bert_folder(tmp_path, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"])  # words it lacks would read as bos
    with pytest.raises(ModelError, match=r"unused tokens as ids 0, 1, 2 \(found \['\[PAD\]', '\[UNK\]', '\[CLS\]'\]\)"):
        CaptionTokenizer.read(stock, "bert")
    with pytest.raises(ModelError, match=r"needs <\|startoftext\|> \(found id None\).*text\.kind bert"):
        CaptionTokenizer.read(stock, "clip")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read as a tokenizer"):
        CaptionTokenizer.read(tmp_path, "clip")
    with pytest.raises(ModelError, match="does not exist; text.tokenizer must name"):
        CaptionTokenizer.read(tmp_path / "nowhere", "clip")


def naive_byte_pairs(words: Counter[str], tokens: int) -> list[str]:
    """Merged tokens in order, every pair of every word counted anew for each."""
    spelt = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    found: list[str] = []
    while len(found) < tokens:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for i in range(len(spelt[word]) - 1):
                pairs[spelt[word][i : i + 2]] += count
        if not pairs:
            return found
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if "".join(best) not in found:
            found.append("".join(best))
        for word, symbols in spelt.items():
            merged, i = [], 0
            while i < len(symbols):
                step = 2 if symbols[i : i + 2] == best else 1
                merged.append("".join(symbols[i : i + step]))
                i += step
            spelt[word] = tuple(merged)
    return found


@pytest.mark.parametrize("vocab_size", [520, 540, 2000])
def test_trained_byte_pairs_equal_a_naive_recount(vocab_size: int) -> None:
    trained = CaptionTokenizer.train(CAPTIONS, vocab_size, "clip")
    text = " ".join(CAPTIONS).lower().replace(",", " , ").replace(".", " . ")
    expected = naive_byte_pairs(Counter(text.split()), vocab_size - 514)
    by_id = sorted(trained._tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    assert [token for token, _ in by_id[512:]] == [*expected, "<|startoftext|>", "<|endoftext|>"]
    assert trained.size == 514 + len(expected)
    assert trained.eos == trained.size - 1


def test_trained_byte_pairs_spell_any_text_and_keep_whole_words(theirs: SimpleTokenizer, tmp_path: Path) -> None:
    trained = CaptionTokenizer.train(CAPTIONS, 2000, "clip")
    trained.save(tmp_path)
    read = CaptionTokenizer.read(tmp_path, "clip")
    ours = read._tokenizer.get_vocab()
    bytes_alone_and_last = list(theirs.encoder)[:512]
    assert [ours[token] for token in bytes_alone_and_last] == list(range(512))  # CLIP's own first ids
    for text in ("zebra ß 🐶 日本", "a dog lowest", "qx\u0301!"):
        assert read.decode(read.encode(text, 77)) == theirs.decode(theirs.encode(text)).strip()
    assert len(read.words("newest dogs")) == 2  # whole words of the captions are one token each
    stock = CLIPTokenizer.from_pretrained(tmp_path)
    for text in CAPTIONS:
        assert read.encode(text, 77) == stock(text)["input_ids"]
    with pytest.raises(UsageError, match="vocab_size 513 is below the 514 tokens"):
        CaptionTokenizer.train(CAPTIONS, 513, "clip")


def test_trained_word_pieces_spell_unseen_words(tmp_path: Path) -> None:
    CaptionTokenizer.train(CAPTIONS, 70, "bert").save(tmp_path)
    trained = CaptionTokenizer.read(tmp_path, "bert")
    assert trained.size <= 70
    assert trained.decode(trained.encode("a dog gdo", 12)) == "a dog gdo"
    with pytest.raises(UsageError, match="vocab_size 20"):
        CaptionTokenizer.train(CAPTIONS, 20, "bert")


def test_trained_vocabulary_is_a_function_of_the_captions(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from encoders.data.tokenizers import CaptionTokenizer\n"
        "for kind in ('bert', 'clip'):\n"
        f"    CaptionTokenizer.train({CAPTIONS!r}, 560, kind).save(Path(sys.argv[1], kind))"
    )
    # Another seed of Python's hashes, so another order of its sets.
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    for folder in ("here/bert", "here/clip", "there/bert", "there/clip"):
        (tmp_path / folder).mkdir(parents=True)
    subprocess.run([sys.executable, "-c", script, tmp_path / "there"], check=True, env=environment, timeout=120)
    for kind in ("bert", "clip"):
        CaptionTokenizer.train(CAPTIONS, 560, kind).save(tmp_path / "here" / kind)
        here, there = (tmp_path / side / kind / "tokenizer.json" for side in ("here", "there"))
        assert here.read_bytes() == there.read_bytes()
