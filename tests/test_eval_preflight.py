"""What is missing is said before a model is loaded: each by its file and with its remedy; and that takes no time."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from bench_sets import OWNER, gqa, gqa_images, mme, nocaps, pope, write_benches, write_repository

from encoders.errors import DataError, ModelError, SwapError, UsageError
from eval.benches import preflight as module
from eval.benches.benchmarks import BENCHES, Table, bench_of
from eval.benches.data_check import count_questions
from eval.benches.preflight import check_requirements, preflight, weight_bytes
from eval.benches.staging import Source, located

GQA_TABLES = ("testdev_balanced_instructions", "testdev"), ("testdev_balanced_images", "testdev")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benches(tmp_path_factory.mktemp("originals"))


@pytest.fixture
def data(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals, tmp_path / "data"))


def checked(names: str, data: Path, model: Path, out: Path, **options: Any) -> list[str]:
    benches = [bench_of(name) for name in names.split(",")]
    return [note.text for note in preflight(benches, located(benches, data), model, out, "cpu", **options)]


def test_what_is_whole_passes_with_its_size_named(originals: Path, tiny_llava: Path, tmp_path: Path) -> None:
    start = time.perf_counter()
    notes = checked(",".join(BENCHES), originals, tiny_llava, tmp_path / "out")
    assert time.perf_counter() - start < 5
    assert len(notes) == len(BENCHES)
    assert notes[0].startswith("mme: 8 questions of a local copy, but the benchmark has 2,374; the scores compare with")
    assert list(tmp_path.iterdir()) == []


def damage(data: Path, what: str) -> None:
    home = data / OWNER
    parquet = {bench: next(iter((home / bench).rglob("*.parquet"))) for bench in ("MME", "POPE", "MMMU")}
    if what == "folder":
        shutil.rmtree(home / "POPE")
    elif what == "README":
        (home / "POPE" / "README.md").unlink()
    elif what == "no YAML":
        (home / "POPE" / "README.md").write_text("---\nconfigs: [\n---\n")
    elif what == "config":
        write_repository(home / "GQA", {GQA_TABLES[0]: gqa()})
    elif what == "split":
        write_repository(home / "POPE", {("default", "train"): pope()})
    elif what == "file":
        parquet["MMMU"].unlink()
    elif what == "column":
        write_repository(home / "POPE", {("default", "test"): [row | {"category": "x"} for row in pope()]})
        rows = [{key: value for key, value in row.items() if key != "ocr_tokens"} for row in textvqa_rows()]
        write_repository(home / "textvqa", {("default", "validation"): rows})
    elif what == "part":
        parquet["POPE"].rename(parquet["POPE"].with_name("test-00001-of-00003.parquet"))
    elif what == "two sets":
        shutil.copy(parquet["POPE"], parquet["POPE"].with_name("test-00000-of-00002.parquet"))
    elif what == "cut":
        parquet["POPE"].write_bytes(parquet["POPE"].read_bytes()[:-9])
    elif what == "pointer":
        parquet["POPE"].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    elif what == "odd pair":
        write_repository(home / "MME", {("default", "test"): mme()[:-1]})
    elif what == "truth":
        write_repository(home / "POPE", {("default", "test"): [row | {"answer": "maybe"} for row in pope()]})
    elif what == "picture":
        write_repository(home / "GQA", {GQA_TABLES[0]: gqa(), GQA_TABLES[1]: gqa_images()[1:]})
    elif what == "ids":
        rows = [row | {"image_id": str(row["image_id"])} for row in nocaps()]
        write_repository(home / "NoCaps", {("default", "validation"): rows})

    elif what == "line break":
        rows = [row | {"annotations_captions": ["a dog\n", "a cat"]} for row in nocaps()]
        rows[1]["annotations_captions"] = ["a dog", "a\u2028cat"]
        write_repository(home / "NoCaps", {("default", "validation"): rows})


def textvqa_rows() -> list[dict[str, Any]]:
    from bench_sets import textvqa

    return textvqa()


DAMAGES = [
    ("folder", "pope", r"lmms-lab-encoder/POPE is missing.*fetch-benches --to"),
    ("README", "pope", r"POPE/README.md is missing; it lists the configs"),
    ("no YAML", "pope", r"POPE: the front matter of its README.md is no YAML.*take lmms-lab-encoder/POPE"),
    ("config", "gqa", r"GQA: it has no config 'testdev_balanced_images', but testdev_balanced_instructions"),
    ("split", "pope", r"POPE: it has no split 'test' in config 'default', but train"),
    ("file", "mmmu", r"MMMU: none of data/validation-\* .* is there"),
    ("column", "textvqa_ocr", r"validation-00000-of-00001.parquet: textvqa_ocr needs the column 'ocr_tokens'"),
    ("part", "pope", r"POPE/data lacks part 0 \(counted from 0\) of 3"),
    ("two sets", "pope", r"POPE/data holds parts of two versions"),
    ("cut", "pope", r"test-00000-of-00001.parquet is not whole"),
    ("pointer", "pope", r"is a pointer of Git LFS.*git lfs pull"),
    ("odd pair", "mme", r"two questions on each picture, but code_reasoning/code_reasoning/3.png has 1"),
    ("truth", "pope", r"row 0 has the answer 'maybe'"),
    ("picture", "gqa", r"question 2 is about picture 'n2'"),
    ("ids", "nocaps", r"image_id is of type string"),
    ("line break", "nocaps", r"row 1 has the reference 'a\\u2028cat', which is not one line"),
]


@pytest.mark.parametrize(("what", "bench", "message"), DAMAGES)
def test_missing_or_damaged_data_is_named(
    what: str, bench: str, message: str, data: Path, tiny_llava: Path, tmp_path: Path
) -> None:
    damage(data, what)
    with pytest.raises(DataError, match=message):
        checked(bench, data, tiny_llava, tmp_path / "out")
    if what == "column":  # which the bench without OCR tokens does not need
        checked("textvqa", data, tiny_llava, tmp_path / "out")


def test_a_split_may_have_a_folder_for_each_subject(tmp_path: Path) -> None:
    files = "data_files: [{split: test, path: '*/test-*'}]"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {files}\n---\n")
    for name in ("art/test-00000-of-00001", "law/test-00000-of-00002", "law/test-00001-of-00002"):
        name += ".parquet"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict({"question": [name]}).to_parquet(tmp_path / name)
    bench = replace(BENCHES["pope"], task="other", tables=(Table("owner/subjects", "default", "test"),))
    sources = {"owner/subjects": Source(tmp_path)}
    assert count_questions(bench, sources) == 3
    (tmp_path / "law" / "test-00000-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"law lacks part 0 \(counted from 0\) of 2"):
        count_questions(bench, sources)


def test_without_java_nocaps_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check_requirements([BENCHES["pope"]])
    with pytest.raises(UsageError, match=r"^nocaps is scored with Java, and there is no `java`.*leave nocaps out"):
        check_requirements([BENCHES["pope"], BENCHES["nocaps"]])
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    with pytest.raises(UsageError, match=r"-version` fails; install a Java runtime"):
        check_requirements([BENCHES["nocaps"]])


def test_memory_disk_and_weights(
    originals: Path, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weight_bytes(tiny_llava, "bfloat16")
    assert weights_of(tiny_llava) == weights * 2 == weight_bytes(tiny_llava, "float32")

    def refusal(kind: type[SwapError], run: Callable[[], Any]) -> str:
        with pytest.raises(kind) as caught:
            run()
        return str(caught.value)

    def check(**options: Any) -> list[str]:
        return checked("pope", originals, tiny_llava, tmp_path / "deep" / "out", **options)

    monkeypatch.setattr(module, "free_memory", lambda: int(weights * 1.1))
    assert "which may not suffice; use --dtype bfloat16" in check()[-1]
    assert "take 0.0 GB" in refusal(ModelError, lambda: check(dtype="float32"))
    refusal(ModelError, lambda: check(processes=2))
    monkeypatch.undo()
    assert module.free_memory() > 10**6

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert "free; name another folder with --out" in refusal(UsageError, check)
    monkeypatch.undo()

    broken = Path(shutil.copytree(tiny_llava, tmp_path / "llava"))
    file = next(broken.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    assert str(file) in refusal(ModelError, lambda: checked("pope", originals, broken, tmp_path / "out"))
    file.unlink()
    assert "no model.safetensors" in refusal(ModelError, lambda: checked("pope", originals, broken, tmp_path / "out"))


def weights_of(model: Path) -> int:
    from safetensors import safe_open

    total = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            total += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    return total


def test_neither_torch_nor_lmms_eval_is_imported_for_names_and_data(originals: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom eval.benches.benchmarks import resolve\n"
        "from eval.benches.data_check import count_questions\nfrom eval.benches.staging import located\n"
        "benches = resolve('mme,pope,gqa,textvqa_ocr,mmmu,chartqa,nocaps')\nresolve('ai2d')\n"
        f"sources = located(benches, Path({str(originals)!r}))\n"
        "print([count_questions(bench, sources) for bench in benches])\n"
        "from eval.fetch import parser\nparser().format_help()\n"
        "assert not {'torch', 'transformers', 'lmms_eval', 'datasets', 'huggingface_hub'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[8, 9, 8, 6, 7, 6, 5]"
