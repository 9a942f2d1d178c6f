"""Pinned chat templates and supervision: messages -> token ids and labels.

Ids are concatenated piece by piece, never re-tokenised and counted. `jinja` renders the same conversation to text that
tokenises to the same ids; it is saved with every LLaVA, so that stock tools build the prompt of training. A message is
`{"role": "system" | "user" | "assistant", "content": ...}`; `<image>` in a user's text marks an image.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from encoders.errors import DataError, ModelError

IMAGE = "<image>"
IGNORED = -100
ROLES = ("system", "user", "assistant")
Message = Mapping[str, Any]
"""Its content is a string, or a list of parts as in transformers: {"type": "image"}, {"type": "text", "text": ...}. The
text of a part is text: there a written-out `<image>` marks nothing."""


class Segment(NamedTuple):
    """A piece of a conversation that is tokenised on its own."""

    kind: Literal["markup", "text", "image"]
    """Special tokens are read in markup only: in text they are spelled out, whatever the user wrote."""
    text: str
    supervised: bool = False


_CHAT_JINJA = """\
{{- PREFIX -}}
{%- if messages[0]['role'] != 'system' -%}{{- SYSTEM -}}{%- endif -%}
{%- for message in messages -%}
{%- set found = namespace(images=0, text='') -%}
{%- if message['content'] is not string -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{%- set found.images = found.images + 1 -%}
{%- else -%}{%- set found.text = found.text + part['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- elif message['role'] == 'user' -%}
{%- set found.images = message['content'].split('<image>') | length - 1 -%}
{%- set found.text = message['content'] | replace('<image>', '') -%}
{%- else -%}{%- set found.text = message['content'] -%}
{%- endif -%}
{%- set found.text = found.text | trim -%}
{%- set before = LEAD if found.images or found.text else '' -%}
{{- HEADERS[message['role']] -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- before + found.text + ENDS['assistant'] -}}{%- endgeneration -%}
{%- else -%}{{- before + '<image>\\n' * found.images + found.text + ENDS[message['role']] -}}
{%- endif -%}
{{- BETWEEN -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- HEADERS['assistant'] -}}{%- endif -%}
"""


@dataclass(frozen=True)
class ChatTemplate:
    """The markup around the turns of one family of LLMs, and the special tokens that go with it."""

    prefix: str
    """What every conversation starts with."""
    system: str
    """The system text of conversations that bring none; "" for no system turn."""
    headers: Mapping[str, str]
    """By role: what comes before a turn."""
    ends: Mapping[str, str]
    """By role: what ends a turn. The assistant's is supervised after an answer, and the tokenizer's EOS."""
    between: str
    """What follows a turn's end; not supervised."""
    lead: str
    """Stands before a turn's content unless that is empty; supervised with an answer."""
    bos_token: str
    stop_tokens: tuple[str, ...]
    """Generation stops at these, where the vocabulary has them."""
    pad_tokens: tuple[str, ...]
    """The first of these that the vocabulary has is used for padding; none of them is a stop token."""
    spare_tokens: tuple[str, ...]
    """Unused tokens of the vocabulary: the first one found becomes `<image>`."""

    def segments(self, messages: Sequence[Message], bos_token: str) -> Iterator[Segment]:
        """The conversation piece by piece; in a message the images come first, each with a newline, then the words."""
        yield Segment("markup", self.prefix)
        if self.system and messages[0]["role"] != "system":
            yield Segment("markup", self._system_turn())
        for message in messages:
            role = message["role"]
            images, text = split_images(message)
            supervised = role == "assistant"
            yield Segment("markup", self.headers[role])
            if images:
                yield Segment("markup", self.lead)
            for _ in range(images):
                yield Segment("image", IMAGE)
                yield Segment("text", "\n")
            yield Segment("text", self.lead + text if text and not images else text, supervised)
            yield Segment("markup", self.ends[role], supervised)
            yield Segment("markup", self.between)

    def _system_turn(self) -> str:
        return self.headers["system"] + self.lead + self.system + self.ends["system"] + self.between

    @property
    def jinja(self) -> str:
        """The same as a chat template for tokenizer and processor, generation marks around answer and end token."""
        system = self._system_turn() if self.system else ""
        texts = {"PREFIX": self.prefix, "SYSTEM": system, "LEAD": self.lead, "BETWEEN": self.between}
        constants = {name: _jinja_string(text) for name, text in texts.items()}
        constants |= {"HEADERS": _jinja_mapping(self.headers), "ENDS": _jinja_mapping(self.ends)}
        return "".join(f"{{%- set {name} = {text} -%}}\n" for name, text in constants.items()) + _CHAT_JINJA


class CaptionTemplate:
    """LLaVA's first stage: BOS, the image, the caption and a newline. No question, no end token; training only."""

    def segments(self, messages: Sequence[Message], bos_token: str) -> Iterator[Segment]:
        """The image and the caption (supervised, with its newline) of one question-answer pair."""
        roles = [message["role"] for message in messages]
        images = sum(split_images(message)[0] for message in messages)
        if roles != ["user", "assistant"] or images != 1:
            raise DataError(
                f"template 'plain' takes one user turn with one {IMAGE} and one answer, not {roles} with {images} "
                "images; use caption data for the projector stage, or a chat template"
            )
        yield Segment("markup", bos_token)
        yield Segment("image", IMAGE)
        yield Segment("text", split_images(messages[1])[1] + "\n", supervised=True)

    @property
    def jinja(self) -> str:
        """The same as a jinja text; string content only."""
        return (
            "{{- bos_token + '<image>' -}}\n{%- generation -%}"
            "{{- messages[1]['content'] | trim + '\\n' -}}{%- endgeneration -%}\n"
        )


TEMPLATES: dict[str, ChatTemplate | CaptionTemplate] = {
    # The markup of the LLaMA-3 release without its dates, with the system text of LLaVA-MORE.
    "llama3": ChatTemplate(
        prefix="<|begin_of_text|>",
        system="You are a helpful language and vision assistant. You are able to understand the visual content that "
        "the user provides, and assist the user with a variety of tasks using natural language.",
        headers={role: f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ROLES},
        ends=dict.fromkeys(ROLES, "<|eot_id|>"),
        between="",
        lead="",
        bos_token="<|begin_of_text|>",
        stop_tokens=("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
        pad_tokens=("<|finetune_right_pad_id|>", "<|reserved_special_token_1|>"),
        spare_tokens=("<|reserved_special_token_0|>",),
    ),
    # LLaVA-1.5's own: the space before a word belongs to the word, so it is part of the answer.
    "vicuna_v1": ChatTemplate(
        prefix="<s>",
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        headers={"system": "", "user": "USER:", "assistant": " ASSISTANT:"},
        ends={"system": " ", "user": "", "assistant": "</s>"},
        between="",
        lead=" ",
        bos_token="<s>",
        stop_tokens=("</s>",),
        pad_tokens=(),
        spare_tokens=(),
    ),
    # SmolLM2's own default system turn only introduces the model by name; it would cost 17 tokens a sample, so: none.
    "chatml": ChatTemplate(
        prefix="",
        system="",
        headers={role: f"<|im_start|>{role}\n" for role in ROLES},
        ends=dict.fromkeys(ROLES, "<|im_end|>"),
        between="\n",
        lead="",
        bos_token="<|im_start|>",
        stop_tokens=("<|im_end|>", "<|endoftext|>"),
        pad_tokens=("<empty_output>",),
        spare_tokens=("<reponame>",),
    ),
    "plain": CaptionTemplate(),
}
CHAT_TEMPLATES = {name: known for name, known in TEMPLATES.items() if isinstance(known, ChatTemplate)}


def split_images(message: Message) -> tuple[int, str]:
    """Number of images in a message (only a user can show them) and its stripped text without their marks."""
    content = message["content"]
    if not isinstance(content, str):
        images = sum(part["type"] == "image" for part in content)
        return images, "".join(part["text"] for part in content if part["type"] == "text").strip()
    if message["role"] != "user":
        return 0, content.strip()
    return content.count(IMAGE), content.replace(IMAGE, "").strip()


def encode(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | CaptionTemplate,
    messages: Sequence[Message],
    image_tokens: int,
) -> tuple[list[int], list[int]]:
    """Token ids and labels (L) of a conversation; each image takes `image_tokens` ids of the image token.

    Labels are -100 except on the answers and their end tokens. Raises DataError if that leaves nothing to learn.
    """
    ids: list[int] = []
    labels: list[int] = []
    for segment in _joined(template.segments(messages, tokenizer.bos_token)):
        piece = _tokenize(tokenizer, segment, image_tokens)
        ids += piece
        labels += piece if segment.supervised else [IGNORED] * len(piece)
    if all(label == IGNORED for label in labels):
        raise DataError("a conversation has no assistant turn, so no token of it would be learned")
    return ids, labels


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, messages: Sequence[Message], image_tokens: int
) -> list[int]:
    """Token ids (L) of a conversation up to where the assistant answers next: exactly the ids seen in training."""
    segments = [*template.segments(messages, tokenizer.bos_token), Segment("markup", template.headers["assistant"])]
    return [token for segment in _joined(segments) for token in _tokenize(tokenizer, segment, image_tokens)]


def template_of(chat_template: str | None) -> str:
    """Name of the pinned template that a tokenizer or processor carries. Raises ModelError if it is not one of ours."""
    for name, template in TEMPLATES.items():
        if template.jinja == chat_template:
            return name
    known = ", ".join(CHAT_TEMPLATES)
    raise ModelError(f"the chat template is not one of ours ({known}); compose the LLaVA with this toolkit")


def _joined(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Neighbouring markup as one piece: a header's letters may merge with those of the turn's end before it."""
    waiting = ""
    for segment in segments:
        if segment.kind == "markup" and not segment.supervised:
            waiting += segment.text
            continue
        if segment.text:
            if waiting:
                yield Segment("markup", waiting)
                waiting = ""
            yield segment
    if waiting:
        yield Segment("markup", waiting)


def _tokenize(tokenizer: PreTrainedTokenizerBase, segment: Segment, image_tokens: int) -> list[int]:
    if segment.kind == "image":
        return [tokenizer.image_token_id] * image_tokens
    return tokenizer.encode(segment.text, add_special_tokens=False, split_special_tokens=segment.kind == "text")


def _jinja_string(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def _jinja_mapping(texts: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{_jinja_string(name)}: {_jinja_string(text)}" for name, text in texts.items()) + "}"
