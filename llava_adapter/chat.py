"""Pinned chat templates and supervision: messages -> token ids and labels.

Ids are concatenated turn by turn, never re-tokenised and counted. `jinja` renders the same conversation to text that
tokenises to the same ids; it is saved with every LLaVA, so that stock tools build the prompt of training.
Messages are `{"role": "system" | "user" | "assistant", "content": str}`; `<image>` in a user's text marks the image.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from encoders.errors import DataError, ModelError

IMAGE = "<image>"
IGNORED = -100
Message = Mapping[str, str]


class Segment(NamedTuple):
    """A piece of a conversation that is tokenised on its own."""

    kind: Literal["markup", "text", "image"]
    """Special tokens are read in markup only: in text they are spelled out, whatever the user wrote."""
    text: str
    supervised: bool = False


# Content is a string that holds <image>, or a list of {"type": "image"} and {"type": "text", "text": ...} parts.
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
{{- HEADER_START + message['role'] + HEADER_END + '<image>\\n' * found.images -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- found.text | trim + END -}}{%- endgeneration -%}
{%- else -%}{{- found.text | trim + END -}}
{%- endif -%}
{{- BETWEEN -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- HEADER_START + 'assistant' + HEADER_END -}}{%- endif -%}
"""


@dataclass(frozen=True)
class ChatTemplate:
    """The markup around the turns of one family of LLMs, and the special tokens that go with it."""

    prefix: str
    """What every conversation starts with."""
    system: str
    """The system text of conversations that bring none; "" for no system turn."""
    header_start: str
    header_end: str
    end: str
    """The end token of a turn: supervised after an answer, and the tokenizer's EOS."""
    between: str
    """What follows the end token; not supervised."""
    bos_token: str
    stop_tokens: tuple[str, ...]
    """Generation stops at these, where the vocabulary has them."""
    pad_tokens: tuple[str, ...]
    """The first of these that the vocabulary has is used for padding; none of them is a stop token."""
    spare_tokens: tuple[str, ...]
    """Unused tokens of the vocabulary: the first one found becomes `<image>`."""

    def header(self, role: str) -> str:
        """The markup before a turn of `role`."""
        return self.header_start + role + self.header_end

    def segments(self, messages: Sequence[Message], bos_token: str) -> Iterator[Segment]:
        """The conversation piece by piece; in a message the image comes first, then a newline, then the words."""
        yield Segment("markup", self.prefix)
        if self.system and messages[0]["role"] != "system":
            yield Segment("markup", self.header("system") + self.system + self.end + self.between)
        for message in messages:
            images, text = split_image(message)
            supervised = message["role"] == "assistant"
            yield Segment("markup", self.header(message["role"]))
            for _ in range(images):
                yield Segment("image", IMAGE)
                yield Segment("text", "\n")
            yield Segment("text", text, supervised)
            yield Segment("markup", self.end, supervised)
            yield Segment("markup", self.between)

    @property
    def jinja(self) -> str:
        """The same as a chat template for tokenizer and processor, generation marks around answer and end token."""
        system = self.header("system") + self.system + self.end + self.between if self.system else ""
        names = {"PREFIX": self.prefix, "SYSTEM": system, "HEADER_START": self.header_start}
        names |= {"HEADER_END": self.header_end, "END": self.end, "BETWEEN": self.between}
        constants = (f"{{%- set {name} = {_jinja_string(text)} -%}}\n" for name, text in names.items())
        return "".join(constants) + _CHAT_JINJA


class CaptionTemplate:
    """LLaVA's first stage: BOS, the image, the caption and a newline. No question, no end token; training only."""

    def segments(self, messages: Sequence[Message], bos_token: str) -> Iterator[Segment]:
        """The image and the caption (supervised, with its newline) of one question-answer pair."""
        roles = [message["role"] for message in messages]
        images = sum(split_image(message)[0] for message in messages)
        if roles != ["user", "assistant"] or images != 1:
            raise DataError(
                f"template 'plain' takes one user turn with one {IMAGE} and one answer, not {roles} with {images} "
                "images; use caption data for the projector stage, or a chat template"
            )
        yield Segment("markup", bos_token)
        yield Segment("image", IMAGE)
        yield Segment("text", messages[1]["content"].strip() + "\n", supervised=True)

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
        header_start="<|start_header_id|>",
        header_end="<|end_header_id|>\n\n",
        end="<|eot_id|>",
        between="",
        bos_token="<|begin_of_text|>",
        stop_tokens=("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
        pad_tokens=("<|finetune_right_pad_id|>", "<|reserved_special_token_1|>"),
        spare_tokens=("<|reserved_special_token_0|>",),
    ),
    # SmolLM2's own default system turn only introduces the model by name; it would cost 17 tokens a sample, so: none.
    "chatml": ChatTemplate(
        prefix="",
        system="",
        header_start="<|im_start|>",
        header_end="\n",
        end="<|im_end|>",
        between="\n",
        bos_token="<|im_start|>",
        stop_tokens=("<|im_end|>", "<|endoftext|>"),
        pad_tokens=("<empty_output>",),
        spare_tokens=("<reponame>",),
    ),
    "plain": CaptionTemplate(),
}


def split_image(message: Message) -> tuple[int, str]:
    """Number of image marks in a message (only a user can show one) and its stripped text without them."""
    if message["role"] != "user":
        return 0, message["content"].strip()
    return message["content"].count(IMAGE), message["content"].replace(IMAGE, "").strip()


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
    for segment in template.segments(messages, tokenizer.bos_token):
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
    segments = [*template.segments(messages, tokenizer.bos_token), Segment("markup", template.header("assistant"))]
    return [token for segment in segments for token in _tokenize(tokenizer, segment, image_tokens)]


def template_of(chat_template: str | None) -> str:
    """Name of the pinned template that a tokenizer or processor carries. Raises ModelError if it is not one of ours."""
    for name, template in TEMPLATES.items():
        if template.jinja == chat_template:
            return name
    raise ModelError("the chat template is not one of ours (llama3, chatml); compose the LLaVA with this toolkit")


def _tokenize(tokenizer: PreTrainedTokenizerBase, segment: Segment, image_tokens: int) -> list[int]:
    if segment.kind == "image":
        return [tokenizer.image_token_id] * image_tokens
    return tokenizer.encode(segment.text, add_special_tokens=False, split_special_tokens=segment.kind == "text")


def _jinja_string(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
