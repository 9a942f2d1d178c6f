"""Questions about pictures, and a server that answers them: OpenAI-compatible, as vLLM and SGLang are.

A backend takes questions as they come and gives answers as they are ready, in any order. Answers are greedy.
"""

import base64
import json
import random
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from typing import Any, Protocol

from encoders.errors import ModelError, UsageError

BUSY = (408, 409, 425, 429)  # and 5xx: worth another try
ONE_QUESTION = (400, 413, 415, 422)  # the server refuses this question; any other code, it refuses us
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before asking again
TYPES = {b"\xff\xd8": "image/jpeg", b"\x89P": "image/png", b"RI": "image/webp"}


@dataclass(frozen=True)
class Question:
    """One prompt about one picture (JPEG, PNG or WebP bytes that decode)."""

    key: str
    kind: str
    image: bytes
    prompt: str
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """What came back: text, and whether it ended by itself; or why there is none, which another run may mend."""

    text: str = ""
    ended: bool = True
    failure: str = ""


Answers = Generator[tuple[Question, Answer], None, None]


class Captioner(Protocol):
    """Describes pictures."""

    def answers(self, questions: Iterable[Question]) -> Answers:
        """Each question once with its answer. Raises ModelError if no question can be answered."""


class Server:
    """`model` behind BASE_URL/chat/completions, `concurrency` questions at a time.

    A busy or failing server is asked again `retries` times, ever later. The key goes into one header and nowhere else.
    """

    def __init__(
        self, base_url: str, model: str, key: str, *, concurrency: int = 32, retries: int = 6, timeout: float = 300
    ) -> None:
        if urllib.parse.urlsplit(base_url).scheme not in ("http", "https"):
            raise UsageError(f"--server {base_url} must start with http:// or https://")
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model, self.key = model, key
        self.concurrency, self.retries, self.timeout = concurrency, retries, timeout
        self._stop = threading.Event()
        self._opener = urllib.request.build_opener(_NoRedirect)

    def answers(self, questions: Iterable[Question]) -> Answers:
        """Whichever is ready first; a question is read only when there is room for it."""
        running: dict[Future[Answer], Question] = {}
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            for question in questions:
                running[pool.submit(self._ask, question)] = question
                if len(running) >= self.concurrency:
                    yield from _finished(running)
            while running:
                yield from _finished(running)
        finally:
            self._stop.set()  # if an error ended this, nothing is asked once more
            pool.shutdown(cancel_futures=True)
            self._stop.clear()

    def _ask(self, question: Question) -> Answer:
        body = json.dumps(self._body(question)).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        problem = ""
        for attempt in range(self.retries + 1):
            request = urllib.request.Request(self.url, body, headers)
            asked = 0.0
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    return _read_completion(response.read())
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"HTTP {error.code}: {self._say(error.read(2000).decode(errors='replace'))}"
                if error.code in ONE_QUESTION:
                    return Answer(failure=problem)
                if error.code not in BUSY and error.code < 500:
                    raise ModelError(f"{self.url} answers {problem}; check URL, --served-model and the key") from None
                asked = _retry_after(error.headers)
            except (OSError, HTTPException) as error:  # refused, reset, timed out, half an answer
                problem = f"{type(error).__name__}: {self._say(str(error))}"
            pause = max(asked, FIRST_PAUSE * 2**attempt * random.uniform(0.5, 1))
            if attempt == self.retries or self._stop.wait(min(pause, LONGEST_PAUSE)):
                break
        return Answer(failure=f"{problem} ({self.retries + 1} tries)")

    def _body(self, question: Question) -> dict[str, Any]:
        picture = f"data:{TYPES[question.image[:2]]};base64,{base64.b64encode(question.image).decode()}"
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question.prompt}]
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": question.max_tokens,
            "temperature": 0,
        }

    def _say(self, text: str) -> str:
        """Part of a server's text, without the key, which some servers send back."""
        return (text.replace(self.key, "***") if self.key else text)[:200]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key must not follow to another host: a redirect is reported as the HTTP error it then is."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _finished(running: dict[Future[Answer], Question]) -> Iterator[tuple[Question, Answer]]:
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        yield running.pop(future), future.result()


def _retry_after(headers: Message) -> float:
    """Seconds a server asks to wait for; 0 if it says none."""
    value = headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else 0.0


def _read_completion(content: bytes) -> Answer:
    try:
        choice = json.loads(content)["choices"][0]
        text, reason = choice["message"]["content"] or "", choice["finish_reason"]
        if not isinstance(text, str):
            raise TypeError(f"content is {text!r:.80}")
    except (ValueError, LookupError, TypeError) as error:
        return Answer(failure=f"not a chat completion ({type(error).__name__}: {error})")
    return Answer(text, ended=reason != "length")
