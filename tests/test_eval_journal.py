"""A killed eval-mllm goes on where it stopped and ends with the same samples; never with answers of other weights."""

import ast
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from bench_sets import write_benches
from safetensors.torch import load_file, save_file

from encoders import manifest
from encoders.errors import DataError, EvaluationIncomplete, UsageError
from eval import run
from eval.answering import journal as journal_module
from eval.answering import rounds
from eval.answering.journal import Journal, identity, working_place

NAMES = "pope,mmmu"
ROOT = Path(__file__).parent.parent


def test_a_line_is_known_again_and_a_torn_one_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    journal = Journal(file)
    journal.append("one", {"answer": "☂ \u2028 \n"})
    journal.append("two", [1, 2.5, None])
    journal.close()
    whole = file.read_bytes()
    for cut in range(1, len(whole)):
        file.write_bytes(whole[:-cut])
        again = Journal(file)
        expected = ["one"] if cut < len(whole.splitlines(keepends=True)[1]) + 1 else []
        assert list(again.lines) == expected
        again.append("two", [1, 2.5, None])
        again.close()
        assert Journal(file).lines["two"] == [1, 2.5, None]
    damaged = bytearray(whole)
    damaged[20] ^= 1  # in the first line: nothing behind it is trusted either
    file.write_bytes(bytes(damaged))
    assert Journal(file).lines == {}


def test_a_full_disk_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "a.jsonl")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(EvaluationIncomplete, match=r"a\.jsonl.*No space left.*the same command"):
        journal.append("one", 1)


def test_two_runs_do_not_write_one_folder(tmp_path: Path) -> None:
    with working_place(tmp_path / "out"):
        with pytest.raises(UsageError, match="another eval-mllm"), working_place(tmp_path / "out"):
            pass
    with working_place(tmp_path / "out"):
        pass


def test_identity_is_of_content_and_of_how_is_asked(tiny_llava: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llava, tmp_path / "llava")
    first = identity(folder, {"dtype": "float32"})
    assert identity(tiny_llava, {"dtype": "float32"}) == first
    assert identity(folder, {"dtype": "bfloat16"}) != first
    for name in ("chat_template.jinja", "preprocessor_config.json", "generation_config.json", "tokenizer.json"):
        kept = (folder / name).read_text()
        (folder / name).write_text(kept + " ")
        assert identity(folder, {"dtype": "float32"}) != first, name
        (folder / name).write_text(kept)
    assert identity(folder, {"dtype": "float32"}) == first
    change_a_weight(folder)
    assert identity(folder, {"dtype": "float32"}) != first


def test_identity_covers_what_a_manifest_does_not_list_and_weights_of_the_same_time(
    tiny_llava: Path, tmp_path: Path
) -> None:
    """A template laid into a sealed folder decides the answers too; a copy may keep size and time of other weights."""
    folder = shutil.copytree(tiny_llava, tmp_path / "llava")
    manifest.seal(folder, "llava", {})
    first = identity(folder, {})
    (folder / "chat_template.json").write_text("{}")
    assert identity(folder, {}) != first
    (folder / "chat_template.json").unlink()
    assert identity(folder, {}) == first
    change_a_weight(folder)
    with pytest.raises(DataError, match=r"model\.safetensors is not the file"):
        identity(folder, {})
    manifest.seal(folder, "llava", {})
    assert identity(folder, {}) != first


def test_identity_is_of_our_code_and_of_the_libraries_that_decide_prompts_and_pixels(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = identity(tiny_llava, {})
    works = metadata.version
    for name in ("pillow", "tokenizers", "datasets"):
        with monkeypatch.context() as patched:
            patched.setattr(metadata, "version", lambda asked, name=name: "0" if asked == name else works(asked))
            assert identity(tiny_llava, {}) != first, name
    parts = journal_module.CODE
    for place in (tmp_path / "a", tmp_path / "z"):  # the same code wherever it is installed
        for part in parts:
            there = place / part.relative_to(ROOT)
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(part, there) if part.is_dir() else shutil.copy(part, there)
        monkeypatch.setattr(journal_module, "CODE", [place / part.relative_to(ROOT) for part in parts])
        assert identity(tiny_llava, {}) == first
        for name in ("eval/answering/prefix.py", "llava_adapter/save.py", "encoders/pretrained.py"):
            kept = (place / name).read_text()
            (place / name).write_text(f"{kept} ")
            assert identity(tiny_llava, {}) != first, name
            (place / name).write_text(kept)


def test_code_that_asks_imports_none_of_ours_that_could_change_an_answer_unseen() -> None:
    """What a bench says (limit, prompt) enters with each question; how answers are scored must not cost them."""
    files = {file for part in journal_module.CODE for file in (part.glob("*.py") if part.is_dir() else [part])}
    modules = {file.relative_to(ROOT).as_posix().removesuffix(".py").replace("/", ".") for file in files}
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    asked = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    ours = {name for name in asked if name.split(".")[0] in ("encoders", "llava_adapter", "eval")}
    assert {name for name in ours - modules if name != "encoders"} == {
        "encoders.errors",
        "encoders.manifest",
        "encoders.export.fold",  # only warns
        "encoders.weights.headers",  # for the fingerprint of the tower
        "eval.benches.benchmarks",
        "eval.benches.metrics",
        "eval.benches.one_line",  # a filter of answers
    }


def test_a_file_system_without_locks_is_not_called_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    with pytest.raises(UsageError, match="cannot be locked .*not supported.*--out"), working_place(tmp_path / "out"):
        pass


def change_a_weight(folder: Path) -> None:
    """One number, with the file's size and time as they were."""
    file = folder / "model.safetensors"
    stat = file.stat()
    state = load_file(file)
    state["language_model.lm_head.weight"][0, 0] += 1.0
    save_file(state, file, metadata={"format": "pt"})
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benches(tmp_path_factory.mktemp("benches"))


@pytest.fixture(scope="module")
def words(tiny_llava: Path, data: Path) -> list[str]:
    return [
        "--model",
        str(tiny_llava),
        "--data",
        str(data),
        "--dtype",
        "bfloat16",
        "--batch-size",
        "2",
        "--bench",
        NAMES,
    ]


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """samples.jsonl of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run.main([*words, "--out", str(out)])
    return (out / "samples.jsonl").read_bytes()


def killed(words: list[str], out: Path, trap: str) -> None:
    """Run eval-mllm with a trap of killed_eval.py; it must end by SIGKILL."""
    command = [sys.executable, str(Path(__file__).with_name("killed_eval.py")), trap, *words, "--out", str(out)]
    done = subprocess.run([*command, "--overwrite"], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


def test_a_killed_run_ends_with_the_same_samples(words: list[str], whole: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed(words, out, "torn:2")
    killed(words, out, "lines:3")
    (journal,) = (tmp_path / ".out.answers").glob("*.jsonl")
    assert len(Journal(journal).lines) == 5
    assert not out.exists()
    run.main([*words, "--out", str(out)])
    assert (out / "samples.jsonl").read_bytes() == whole
    entries = json.loads((out / "results.json").read_text())["benches"]
    assert entries["pope"]["cost"]["answers_reused"] == 9
    shown = {name for row in whole.decode().splitlines() for name in json.loads(row)["image_id"].split("_")}
    assert {file.stem for file in (out / "images").iterdir()} == shown
    assert [path.name for path in tmp_path.iterdir() if "partial" not in path.name] == ["out"]


def test_answers_of_another_device_are_not_taken_over(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --device auto, a run that a GPU began may go on where there is none."""
    identities: list[str] = []

    class Stop(Exception):
        pass

    def stop(*_: object, identity: str, **__: object) -> None:
        identities.append(identity)
        raise Stop

    monkeypatch.setattr("eval.answering.lmms_model.EncoderSwapLlava", stop)
    for device, dtype in (("cpu", "bfloat16"), ("cpu", "auto"), ("NVIDIA H200", "auto")):
        monkeypatch.setattr("eval.answering.chat_model.hardware", lambda name, device=device: device)
        with pytest.raises(Stop):
            run.main([*words, "--dtype", dtype, "--out", str(tmp_path / "out")])
    assert identities[0] == identities[1] != identities[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills(words: list[str], whole: bytes, tmp_path: Path) -> None:
    """At every stage of a line, and between the last answer and the finished folder."""
    out = tmp_path / "out"
    for number in range(9):
        killed(words, out, f"{'lines' if number % 3 else 'torn'}:{number % 2}")
    for _ in range(2):
        killed(words, out, "torn:1")

    for _ in range(4):
        killed(words, out, "scoring")
    for _ in range(5):
        killed(words, out, "sealing")
    run.main([*words, "--out", str(out)])
    assert (out / "samples.jsonl").read_bytes() == whole


def test_changed_weights_are_asked_anew(
    words: list[str], whole: bytes, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same path, size and time of the files; all questions are asked."""
    folder, out = shutil.copytree(tiny_llava, tmp_path / "llava"), tmp_path / "out"
    words = ["--model", str(folder), *words[2:-1], "pope"]
    killed(words, out, "lines:4")
    change_a_weight(folder)
    asked: list[int] = []
    greedy = rounds.greedy
    monkeypatch.setattr(rounds, "greedy", lambda *arguments: asked.append(len(arguments[3])) or greedy(*arguments))
    run.main([*words, "--out", str(out)])
    assert sum(asked) == 9
