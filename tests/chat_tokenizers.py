"""Tokenizers for the tests of templates: per template one of its family, as an LLM's folder holds it.

LLaMA-3's real one is read from the package llama-models where that is installed; SentencePiece's is trained here and
turned into a tokenizer.json of the form that Llama-2 and Vicuna have, prefix and byte fallback included.
"""

import random
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from conftest import WORDS
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<reponame>", "<empty_output>"]


def write_chatml(folder: Path, base: Path) -> Path:
    """SmolLM2's special tokens on another byte-level tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer.from_file(str(base / "tokenizer.json"))
    backend.add_special_tokens(CHATML_TOKENS)
    backend.save(str(folder / "tokenizer.json"))
    return folder


def write_sentencepiece(folder: Path) -> Path:
    """A small BPE model of SentencePiece (tokenizer.model) and the same as tokenizer.json."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    words = [*WORDS, "USER:", "ASSISTANT:", "A chat between", "questions.", "</", "<s", ">"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(rng.choices(words, k=9)) for _ in range(2000)),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=["</s"],  # with ">", a way to the end token, as larger vocabularies have it
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    vocabulary = {model.id_to_piece(number): number for number in range(model.get_piece_size())}
    scores = {piece: model.get_score(number) for piece, number in vocabulary.items()}
    bpe = models.BPE(
        vocabulary, generate_merges(vocabulary, scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = Tokenizer(bpe)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fuse = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), *fuse])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def llama3_model() -> Path | None:
    """The real tokenizer's file, if the package is there."""
    package = find_spec("llama_models")
    return Path(package.origin).parent / "llama3" / "tokenizer.model" if package and package.origin else None


@cache
def _bare_llama3(model: Path) -> str:
    return str(TikTokenConverter(str(model)).converted().to_str())


def write_real_llama3(folder: Path, model: Path, release: str) -> Path:
    """LLaMA-3's (`release` 3.0) or 3.1's tokenizer as its folder on the Hub has it, with the BOS that it adds."""
    reserved = (f"<|reserved_special_token_{number}|>" for number in range(256))
    named = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>"}
    named |= {9: "<|eot_id|>"}
    if release != "3.0":
        named |= {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}
    special = [named.get(place) or next(reserved) for place in range(256)]
    backend = Tokenizer.from_str(_bare_llama3(model))
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    bos = backend.token_to_id("<|begin_of_text|>")
    add_bos = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), add_bos])
    folder.mkdir(parents=True, exist_ok=True)
    eos = "<|eot_id|>" if release == "3.0" else "<|end_of_text|>"
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token=eos).save_pretrained(
        folder
    )
    return folder
