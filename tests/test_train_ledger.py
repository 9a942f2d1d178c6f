"""The ledger: counts in memory, every report in a file that resumes cut and full disks do not lose."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from encoders.errors import DataError
from train.ledger import Ledger


def ledger(out: Path, share: float = 1.0) -> Ledger:
    return Ledger(out, share, 100, Accelerator(cpu=True))


def bad(*ids: int, reason: str = "no image") -> list[dict[str, Any]]:
    return [{"bad": [{"id": i, "reason": reason, "shard": "0.tar", "key": f"k{i}"} for i in ids]}]


def take(book: Ledger, step: int, batches: Iterable[dict[str, Any]], samples: int = 100) -> None:
    book.count(samples, book.note(step, batches))


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]


def test_reports_are_ordered_by_step_whenever_they_are_written(tmp_path: Path) -> None:
    written = {}
    for every in (1, 3):
        out = tmp_path / str(every)
        out.mkdir()
        book = ledger(out)
        for step in (1, 2, 3):
            take(book, step, bad(9 - step, 5) + bad(2, reason="no web caption"))
            if step % every == 0:
                book.gather()
                book.write()
        written[every] = (out / "bad_samples.jsonl").read_bytes()
        assert book.state() == {"seen": 300, "bad": 9, "bytes": len(written[every])} | {
            "by_reason": {"no image": 6, "no web caption": 3},
            "counts": {},
        }
    assert written[1] == written[3]
    assert [(report["step"], report["id"]) for report in lines(tmp_path / "1")][:4] == [(1, 2), (1, 5), (1, 8), (2, 2)]


def test_a_resume_takes_back_what_was_written_after_its_checkpoint(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    take(book, 1, bad(1))
    book.gather()
    book.write()
    state = book.state()
    take(book, 2, bad(2))
    book.gather()
    book.write()
    again = ledger(tmp_path)
    again.restore(state)
    assert [report["id"] for report in lines(tmp_path)] == [1]
    assert again.state() == state
    begun = ledger(tmp_path)
    begun.restore(None)
    assert lines(tmp_path) == []


def test_a_lost_file_is_told_and_the_counts_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = ledger(tmp_path)
    take(book, 1, bad(1))
    book.gather()
    book.write()
    (tmp_path / "bad_samples.jsonl").unlink()
    again = ledger(tmp_path)
    again.restore(book.state())
    assert "some reports of bad samples are gone" in capsys.readouterr().out
    take(again, 2, bad(2))
    again.gather()
    again.write()
    assert (again.bad, [report["id"] for report in lines(tmp_path)]) == (2, [2])


def test_too_many_bad_samples_stop_the_run_and_are_named(tmp_path: Path) -> None:
    book = ledger(tmp_path, share=0.02)
    take(book, 1, bad(1, 2))
    with pytest.raises(DataError, match=r"4 of 150 samples are bad, more than .* 0\.02 allows \(\{'no image': 4\}\)"):
        take(book, 2, bad(3, 4), samples=50)
    assert [report["key"] for report in lines(tmp_path)] == ["k1", "k2", "k3", "k4"]
