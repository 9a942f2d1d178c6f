"""Recaptioning: the demo's kind of LLaVA, and a loopback server that fails, cuts off, refuses and counts."""

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from pair_shards import add, sample, write_shards
from PIL import Image

from encoders.data import recaption, recaption_backends
from encoders.data.caption_files import CaptionFile, Entry, read
from encoders.data.formats import open_samples
from encoders.data.recaption import PROMPTS, CaptionsMissing, judge, main, shards
from encoders.data.recaption_backends import Answer, Question
from encoders.errors import DataError, ModelError, UsageError

KEY = "sk-canary-1234567890"
ROOT = Path(__file__).resolve().parent.parent
IMAGES = {hashlib.sha256(sample(index, 40)["image"]).hexdigest(): index for index in range(60)}
LONG = "A square. It is large. It has a colour"


class Loopback:
    """An OpenAI-compatible server. `script` maps (sample, kind) to answers to give before the usual one: an HTTP code,
    or (text, finish_reason). It keeps what it was asked, and whether the key came along."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[int, str]] = Counter()
        self.script: dict[tuple[int, str], list[Any]] = {}
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.pause = 0.0
        self.lock = threading.Lock()
        loopback = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, content, headers = loopback.answer(self.path, body, self.headers["Authorization"])
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str, body: dict[str, Any], key: str | None) -> tuple[int, bytes, dict[str, str]]:
        picture, question = body["messages"][0]["content"]
        kind = next(kind for kind, prompt in PROMPTS.items() if prompt == question["text"])
        head, _, content = picture["image_url"]["url"].partition(",")
        assert (path, head) == ("/v1/chat/completions", "data:image/jpeg;base64")
        index = IMAGES[hashlib.sha256(base64.b64decode(content)).hexdigest()]
        with self.lock:
            self.asked[index, kind] += 1
            self.bodies.append(body)
            self.keys.add(key)
            planned = self.script.get((index, kind))
            step = planned.pop(0) if planned else (f"{kind} of {index}.", "stop")
        time.sleep(self.pause)
        if isinstance(step, int):
            return step, f"no, {KEY}".encode(), {"Retry-After": "0", "Location": "http://127.0.0.1:9/"}
        if isinstance(step, bytes):
            return 200, step, {}
        text, reason = step
        return 200, json.dumps({"choices": [{"message": {"content": text}, "finish_reason": reason}]}).encode(), {}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    monkeypatch.setattr(recaption_backends, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    loopback = Loopback()
    yield loopback
    loopback.server.shutdown()
    loopback.server.server_close()


def ask(folder: Path, server: Loopback, *options: str) -> None:
    served = ["--server", server.url, "--served-model", "tiny", "--concurrency", "4"]
    main([str(folder), "--captioner", "tiny", *served, *options])


def entries(folder: Path, shard: int = 0) -> dict[tuple[str, str], Entry]:
    return read(folder / f"{shard:05d}.tar.tiny.jsonl")[1]


def test_every_picture_gets_both_captions_in_order(tmp_path: Path, server: Loopback) -> None:
    folder = write_shards(tmp_path / "shards", 10)
    ask(folder, server)
    for shard in range(2):
        keys = [f"{index:05d}" for index in range(shard, 10, 2)]
        found = entries(folder, shard)
        assert sorted(found) == sorted((key, kind) for key in keys for kind in PROMPTS)
        assert [key for key, _ in found] == [key for key in keys for _ in PROMPTS]
        assert all(one.caption == f"{one.kind} of {int(one.key)}." and not one.problem for one in found.values())
    assert set(server.asked.values()) == {1}
    assert server.keys == {f"Bearer {KEY}"}
    assert {(body["model"], body["temperature"]) for body in server.bodies} == {("tiny", 0)}
    assert {body["max_tokens"] for body in server.bodies} == {77, 512}
    ask(folder, server)
    assert server.asked.total() == 20  # nothing is asked twice


def test_what_goes_wrong_is_counted_and_never_dropped(
    tmp_path: Path, server: Loopback, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_shards(tmp_path / "shards", 12, shards=1, image={7: b"\xff\xd8 no picture"}, web={8: " "})
    server.script = {
        (0, "long"): [500, 429, 503],
        (1, "long"): [(LONG, "length")],
        (2, "long"): [("no stop and no end", "length")],
        (3, "short"): [("I\u2019m sorry, but I can't help.", "stop")],
        (4, "short"): [("  \n", "stop")],
        (5, "short"): [400],
        (6, "short"): [b"{}"],
        (9, "short"): [("half \ud83d", "stop")],
    }
    with pytest.raises(CaptionsMissing, match=r"long: 3, short: 7\)") as raised:
        ask(folder, server)
    assert raised.value.exit_code == 5
    found = entries(folder)
    assert len(found) == 24
    problems = {(int(key), kind): one.problem for (key, kind), one in found.items() if one.problem}
    assert problems == {
        (1, "long"): "cut off",
        (2, "long"): "cut off",
        (3, "short"): "refused",
        (4, "short"): "empty",
        (5, "short"): "failed",
        (6, "short"): "failed",
        (7, "short"): "undecodable image",
        (7, "long"): "undecodable image",
        (8, "short"): "no web caption",
        (8, "long"): "no web caption",
        (9, "short"): "unreadable",
    }
    assert found["00001", "long"].caption == "A square. It is large."  # whole sentences only
    assert found["00002", "long"].caption is None
    assert found["00000", "long"].caption == "long of 0."
    assert server.asked[0, "long"] == 4
    said = capsys.readouterr()
    for line in ("long: captioned: 8", "long: cut off: 2", "short: refused: 1", "short: failed: 2", "short: empty: 1"):
        assert line in said.out
    everything = said.out + said.err + (folder / "00000.tar.tiny.jsonl").read_text() + str(raised.value)
    assert "HTTP 400: no, ***" in everything
    assert KEY not in everything  # even though the server sent it back

    ask(folder, server, "--allow-missing")  # only what failed is asked again
    assert {question: times for question, times in server.asked.items() if times > 1} == {
        (0, "long"): 4,
        (5, "short"): 2,
        (6, "short"): 2,
    }
    assert entries(folder)["00005", "short"].caption == "short of 5."


def test_a_server_that_refuses_us_ends_the_run(tmp_path: Path, server: Loopback) -> None:
    folder = write_shards(tmp_path / "shards", 4, shards=1)
    for code in (401, 404, 302):
        server.script = {(index, kind): [code] for index in range(4) for kind in PROMPTS}
        with pytest.raises(ModelError, match=rf"HTTP {code}: no, \*\*\*; check"):
            ask(folder, server)
    assert not (folder / "00000.tar.tiny.jsonl").exists()


def test_a_dead_server_ends_the_run(tmp_path: Path, server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recaption, "MOST_FAILURES", 3)
    monkeypatch.setattr(recaption_backends, "FIRST_PAUSE", 0.0)
    folder = write_shards(tmp_path / "shards", 4, shards=1)
    server.url = "http://127.0.0.1:9/v1"
    with pytest.raises(ModelError, match="3 questions in a row failed.*refused"):
        ask(folder, server)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, server: Loopback) -> None:
    folder = write_shards(tmp_path / "shards", 40, shards=1)
    journal = folder / "00000.tar.tiny.jsonl.partial"
    served = ["--server", server.url, "--served-model", "tiny", "--concurrency", "2"]
    command = [sys.executable, "-m", "encoders.data.recaption", str(folder), "--captioner", "tiny", *served]
    server.pause = 0.05
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        until = time.monotonic() + 300
        while not journal.exists() or journal.read_bytes().count(b"\n") < 15:
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    journal.open("ab").write(b'{"key": "00039", "kind": "sh')  # as a kill within a write leaves it
    kept = set(read(journal)[1])
    assert 14 <= len(kept) < 80
    server.pause = 0.0
    ask(folder, server)
    assert len(entries(folder)) == 80
    assert all(one.caption for one in entries(folder).values())
    assert all(server.asked[int(key), kind] == 1 for key, kind in kept)  # what was answered was not asked again
    assert server.asked.total() <= 80 + 2  # at most what was open at the kill
    assert not journal.exists()


def test_ranks_share_the_shards(tmp_path: Path, server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(tmp_path / "shards", 12, shards=3)
    ask(folder, server, "--rank", "1", "--world", "2")
    assert [file.name for file in sorted(folder.glob("*.jsonl"))] == ["00001.tar.tiny.jsonl"]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ask(folder, server)
    assert len(list(folder.glob("*.jsonl"))) == 3
    assert set(server.asked.values()) == {1}
    with pytest.raises(UsageError, match="--rank 2 must lie between 0 and --world 2"):
        ask(folder, server, "--rank", "2")


def test_a_file_of_other_questions_is_not_mixed_in(tmp_path: Path, server: Loopback) -> None:
    folder = write_shards(tmp_path / "shards", 4, shards=1)
    ask(folder, server)
    with pytest.raises(UsageError, match=r"max_tokens \[77, 512\], not \[20, 512\]"):
        ask(folder, server, "--max-tokens", "20", "512")
    smaller = write_shards(tmp_path / "smaller", 2, shards=1)
    shutil.copy(folder / "00000.tar.tiny.jsonl", smaller)
    with pytest.raises(DataError, match="captions for '00002', which its shard does not hold"):
        ask(smaller, server)
    samples = open_samples(folder)
    asked_of = {"model": "tiny", "prompts": PROMPTS, "max_tokens": [77, 512]}
    with CaptionFile(samples, "00000.tar", range(4), folder, "tiny", asked_of):
        with pytest.raises(UsageError, match="being written by another process"):
            ask(folder, server)


def test_odd_keys_and_rows_that_cannot_be_read_are_captioned_and_kept_apart(tmp_path: Path, server: Loopback) -> None:
    keys = [b"a.b", b"a_b", b"a%2Eb", b"http://x/1.jpg/", b"caf\xe9", b"\xc3\xbc", b"../up", b"", b"k,a,row,too,long"]
    lines = [b"key,file,web,short,long", *(b"%s,%d.jpg,w,s,l" % (key, i) for i, key in enumerate(keys))]
    (tmp_path / "table.csv").write_bytes(b"\n".join(lines))
    for i in range(len(keys)):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    (tmp_path / "files.yaml").write_text("image: file\nkey: key\nweb: web\nshort: short\nlong: long\n")
    data = [str(tmp_path / "table.csv"), "--format", "csv", "--mapping", str(tmp_path / "files.yaml")]
    data += ["--images", str(tmp_path), "--captioner", "tiny", "--out", str(tmp_path / "captions"), "--allow-missing"]
    main([*data, "--server", server.url, "--served-model", "tiny"])
    found = read(tmp_path / "captions" / "table.csv.tiny.jsonl")[1]
    expected = ["a.b", "a_b", "a%2Eb", "http://x/1.jpg/", "caf\\udce9", "\u00fc", "../up", "row 7", "row 8"]
    assert [key for key, kind in found if kind == "short"] == expected
    assert {entry.problem for (key, _), entry in found.items() if key != "row 8"} == {""}
    assert found["row 8", "long"].problem == "damaged row"
    main([*data, "--merge", str(tmp_path / "new")])
    merged = open_samples(tmp_path / "new")
    assert [unquote(merged.key(i)) for i in range(len(merged))] == expected[:-1]
    assert [merged[i].short["tiny"] for i in range(len(merged))] == [f"short of {i}." for i in range(8)]


def test_shards_of_one_name_are_refused_unless_they_are_parts_of_a_table() -> None:
    class Parts:
        sizes = np.array([2, 0, 3])

        def shard(self, index: int) -> str:
            return "0.parquet"

    assert shards(Parts(), "parquet") == {"0.parquet": range(5)}
    with pytest.raises(UsageError, match=r"two shards are called 0\.parquet"):
        shards(Parts(), "tar")


def test_merged_tars_hold_old_and_new_captions(tmp_path: Path, server: Loopback) -> None:
    folder = write_shards(tmp_path / "shards", 6, long={2: {"llava": "An old one.", "tiny": "To be replaced."}})
    server.script = {(3, "short"): [("Sorry.", "stop")]}
    ask(folder, server, "--allow-missing", "--out", str(tmp_path / "captions"))
    merge = [str(folder), "--captioner", "tiny", "--out", str(tmp_path / "captions"), "--merge", str(tmp_path / "new")]
    with pytest.raises(CaptionsMissing, match=r"\(short: 1\)"):
        main(merge)
    merged, before = open_samples(tmp_path / "new"), open_samples(folder)
    assert [merged.key(i) for i in range(6)] == [before.key(i) for i in range(6)]
    for i in range(6):
        old, new, index = before[i], merged[i], int(before.key(i))
        assert (new.image, new.web, new.shard) == (old.image, old.web, old.shard)
        assert new.short == ({} if index == 3 else {"tiny": f"short of {index}."}) | old.short
        assert list(new.long.items()) == [
            ("tiny", f"long of {index}."),
            *(o for o in old.long.items() if o[0] != "tiny"),
        ]
    with pytest.raises(UsageError, match="exists; merge into an empty folder"):
        main([*merge, "--allow-missing"])
    with pytest.raises(DataError, match="no captions of 'other' yet"):
        main([str(folder), "--captioner", "other", "--merge", str(tmp_path / "other")])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("I cannot see the image.", "refused"),
        ("I am unable to describe this.", "refused"),
        ("As an AI language model, I ...", "refused"),
        ("Unfortunately, there is no image.", "refused"),
        ("I can see a dog.", ""),
        ("A sorry sight: a dog I cannot name.", ""),
        ("As an aid, a dog helps.", ""),
    ],
)
def test_refusals_are_told_from_captions(text: str, problem: str) -> None:
    entry = judge(Question("k", "short", b"", "", 1), Answer(text))
    assert (entry.problem, entry.caption) == (problem, None if problem else text)


def picture(index: int) -> bytes:
    return sample(index, 40)["image"]


def test_a_llava_folder_answers_in_batches_as_one_by_one_and_as_in_evaluation(tiny_llava: Path) -> None:
    from encoders.data.recaption_model import FolderModel
    from eval.answering.chat_model import ChatModel

    prompts = {"short": ("Describe the image in short:", 6), "long": ("Describe the image in details", 12)}
    questions = [
        Question(str(index), kind, picture(index), prompt, most)
        for index in range(5)
        for kind, (prompt, most) in prompts.items()
    ]
    found = [
        {(q.key, q.kind): answer for q, answer in FolderModel(tiny_llava, "cpu", "auto", size).answers(questions)}
        for size in (1, 3)
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 10
    chat = ChatModel(tiny_llava, "cpu", "float32")
    for question in questions:
        features = chat.encode([Image.open(io.BytesIO(question.image)).convert("RGB")])
        [expected] = chat.answer([chat.prompt(question.prompt)], features, question.max_tokens)
        assert found[0][question.key, question.kind].text.strip() == expected
    assert len({answer.text for answer in found[0].values()}) > 1


def test_prompts_of_a_batch_end_together_and_have_one_bos(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from encoders.data.recaption_model import FolderModel

    model = FolderModel(tiny_llava, "cpu", "auto", 2)
    seen: dict[str, Any] = {}
    generate = model.model.generate
    monkeypatch.setattr(model.model, "generate", lambda **inputs: seen.update(inputs) or generate(**inputs))
    prompts = ("Describe", "Describe the colour of the big red square")
    list(model.answers([Question(prompt, "short", picture(0), prompt, 2) for prompt in prompts]))
    ids, mask = seen["input_ids"], seen["attention_mask"]
    bos = model.tokenizer.bos_token_id
    assert (ids == bos).sum(dim=1).tolist() == [1, 1]
    assert mask[:, -1].tolist() == [1, 1]
    assert mask[0].tolist() == sorted(mask[0].tolist())  # padded on the left
    assert mask[0].sum() < mask[1].sum() == mask.shape[1]


def test_a_llavas_cut_off_is_told_by_its_stop_token(tiny_llava: Path, tmp_path: Path) -> None:
    from encoders.data.recaption_model import FolderModel

    question = Question("k", "short", picture(0), "Describe", 1)
    [(_, cut)] = FolderModel(tiny_llava, "cpu", "auto", 1).answers([question])
    assert not cut.ended
    folder = tmp_path / "stops"
    shutil.copytree(tiny_llava, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    vocabulary = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    (folder / "generation_config.json").write_text(
        json.dumps(settings | {"eos_token_id": list(range(vocabulary)), "do_sample": True, "temperature": 9.0})
    )
    model = FolderModel(folder, "cpu", "auto", 1)
    [(_, ended)] = model.answers([question])
    assert ended.ended
    assert not model.model.generation_config.do_sample
    (folder / "generation_config.json").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        FolderModel(folder, "cpu", "auto", 1)


def test_a_llava_captions_a_folder_of_plain_web_tars(tiny_llava: Path, tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    with tarfile.open(tmp_path / "web" / "0.tar", "w") as tar:  # as img2dataset writes them: no synthetic captions
        for index in range(3):
            add(tar, f"{index:03d}.jpg", picture(index))
            add(tar, f"{index:03d}.txt", b"some words")
    options = ["--mapping", "img2dataset", "--captioner", "tiny", "--model", str(tiny_llava), "--max-tokens", "4", "4"]
    main([str(tmp_path / "web"), *options, "--allow-missing"])
    found = read(tmp_path / "web" / "0.tar.tiny.jsonl")[1]
    assert len(found) == 6
    assert {one.problem for one in found.values()} <= {"", "cut off", "empty"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--server", "http://x"], "needs --served-model"),
        (["--server", "file:///etc", "--served-model", "m"], "must start with http"),
        (["--model", "m", "--captioner", "two"], "only --merge takes several"),
        (["--model", "m", "--batch-size", "0"], "at least 1"),
        (["--model", "nowhere"], r"nowhere has no config\.json"),
        (["--merge", "."], "is the data itself"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_shards(tmp_path / "shards", 2))
    with pytest.raises((UsageError, ModelError), match=message):
        main([".", "--captioner", "tiny", *options])


@pytest.mark.parametrize("options", [["--help"], ["x", "--captioner", "a/b", "--model", "m"]])
def test_help_and_usage_errors_do_not_wait_for_torch(options: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "encoders.data.recaption", *options]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == (0 if "--help" in options else 2), finished.stderr[-2000:]
    loaded = {line.split("|")[-1].strip() for line in finished.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in loaded
    assert not loaded & {"torch", "transformers"}
