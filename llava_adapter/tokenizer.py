"""The LLM's tokenizer as a LLaVA's: `<image>`, pinned template, one BOS, end and pad tokens, and text that stays text.

Works on the tokenizer.json alone, so what is saved does the same in every library that reads the file.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from encoders.errors import ModelError, UsageError
from llava_adapter.chat import CHAT_TEMPLATES, IMAGE, ChatTemplate

PAD = "<pad>"


def chat_template(name: str) -> ChatTemplate:
    """A pinned chat template by name. Raises UsageError for any other name, as for `plain`, which is none."""
    if name not in CHAT_TEMPLATES:
        raise UsageError(f"template {name!r} is not a chat template; choose one of: {', '.join(CHAT_TEMPLATES)}")
    return CHAT_TEMPLATES[name]


def prepare_tokenizer(llm: Path, template: ChatTemplate) -> PreTrainedTokenizerFast:
    """The LLM's tokenizer with `<image>`, the template, its end token as EOS, a pad token that is no stop token,
    and no BOS of its own (the template writes the one BOS). Raises ModelError if it lacks the template's tokens."""
    file = llm / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{llm} has no tokenizer.json; {_way_to_one(llm)}")
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more exact
        raise ModelError(f"{file} is not a tokenizer: {error}; fetch or save it again") from error
    markup = (template.bos_token, *template.stop_tokens[:1])
    lacking = [token for token in markup if backend.token_to_id(token) is None]
    if lacking:
        raise ModelError(f"{file} lacks {', '.join(lacking)}: not the tokenizer of a model for this chat template")
    spare = next((token for token in template.spare_tokens if backend.token_to_id(token) is not None), None)
    content = json.loads(backend.to_str())
    if spare is not None and backend.token_to_id(IMAGE) is None:
        _rename(content, spare, IMAGE)
    _leave_no_prefix(content)
    _leave_no_way_to_special_tokens(content)
    backend = Tokenizer.from_str(json.dumps(content))
    pad = next((token for token in template.pad_tokens if backend.token_to_id(token) is not None), PAD)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (IMAGE, pad)])
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=template.bos_token,
        eos_token=template.ends["assistant"],
        pad_token=pad,
        extra_special_tokens={"image_token": IMAGE},
        chat_template=template.jinja,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def generation_config(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> GenerationConfig:
    """Greedy, and an end at whichever of the template's stop tokens the vocabulary has."""
    vocabulary = tokenizer.get_vocab()
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[vocabulary[token] for token in template.stop_tokens if token in vocabulary],
        pad_token_id=tokenizer.pad_token_id,
    )


def _way_to_one(llm: Path) -> str:
    if (llm / "tokenizer.model").is_file():
        return (
            "its tokenizer.model is the older form; save it once as the newer one: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER). If that tells of Protobuf versions, "
            "pip install 'sentencepiece<0.2.2' before it"
        )
    return "pass the folder of an LLM together with its tokenizer"


def _rename(content: dict[str, Any], old: str, new: str) -> None:
    """Give a token another name; its id and the vocabulary size stay."""
    for token in content["added_tokens"]:
        if token["content"] == old:
            token["content"] = new
    vocabulary = content["model"]["vocab"]
    if old in vocabulary:
        vocabulary[new] = vocabulary.pop(old)


def _leave_no_prefix(content: dict[str, Any]) -> None:
    """Tokenizers from SentencePiece put a space before every text. Off: the template writes its spaces itself, so that
    a conversation has the same ids in pieces and as a whole."""
    normalizer, splitter = content["normalizer"], content["pre_tokenizer"]
    if normalizer is not None and normalizer["type"] == "Sequence":
        normalizer["normalizers"] = [one for one in normalizer["normalizers"] if one["type"] != "Prepend"]
    if splitter is not None and splitter["type"] == "Metaspace":
        splitter["prepend_scheme"] = "never"


def _leave_no_way_to_special_tokens(content: dict[str, Any]) -> None:
    """Tokenizers from SentencePiece list merges for every entry of the vocabulary: `</` and `s>` would become the end
    token itself, whoever wrote them."""
    special = {token["content"] for token in content["added_tokens"] if token["special"]}
    model = content["model"]
    if "merges" in model:  # pairs, or the older form "left right"
        glued = ("".join(pair) if isinstance(pair, list) else pair.replace(" ", "") for pair in model["merges"])
        model["merges"] = [pair for pair, whole in zip(model["merges"], glued, strict=True) if whole not in special]
