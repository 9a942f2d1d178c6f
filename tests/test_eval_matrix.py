"""The matrix says what the reports say: every number from its own report, in its own cell; hostile names stay text."""

import json
from collections.abc import Callable
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from encoders.errors import DataError, UsageError
from eval import matrix
from eval.comparing.bootstrap import Difference
from eval.comparing.comparison import Measure

ARMS = ["clip", "clips", "dreamlip"]
Change = Callable[[dict[str, Any]], Any]


def measure(name: str, offset: float, words: tuple[str, str], percent: bool = True, headline: bool = True) -> Measure:
    scores = [0.5 + offset, 0.56 + offset, 0.41 + offset]
    scale = 1.0 if percent else 1000.0
    differences = [
        Difference(
            value=scale * (score - scores[0]),
            low=scale * (score - scores[0] - 0.03),
            high=scale * (score - scores[0] + 0.04),
            error=scale * 0.02,
            luck=None,
            detectable=scale * 0.05,
            verdict=word,
        )
        for score, word in zip(scores[1:], words, strict=True)
    ]
    scores = [scale * score for score in scores]
    return Measure(name, percent, headline, scale * 1.0, scores, [[score] for score in scores], differences)


def write_report(file: Path, offset: float, words: tuple[str, str], *changes: Change) -> Path:
    """As compare-runs writes it, with what a matrix reads and something that it leaves out."""
    measures = {
        "pope": [
            measure("pope_f1_score", offset, words),
            measure("pope_recall", 0.2, ("worse", "worse"), headline=False),
        ],
        "mme": [measure("mme_perception_score", offset, ("within noise", "worse"), percent=False)],
    }
    content: dict[str, Any] = {
        "names": list(ARMS),
        "seeds": [1, 2, 1],
        "runs": [
            {"name": arm, "encoder": {"fingerprint": arm}, "model": {"fingerprint": f"{file} {at}"}}
            for at, arm in enumerate(("clip", "clips", "clips", "dreamlip"))
        ],
        "benches": [
            {
                "bench": bench,
                "questions": 100,
                "images": 10,
                "protocol": {"split": "test"},
                "dataset": {"fingerprint": "d0"},
                "failed": [0, 0, 0],
                "measures": [asdict(one) for one in of_bench],
                "flips": [],
            }
            for bench, of_bench in measures.items()
        ],
        "allowed": False,
        "draws": 1000,
    }
    for change in changes:
        change(content)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


class Page(HTMLParser):
    """Headings, the rows of each table, and every tag and attribute."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.in_table = False
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.in_table = True
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_table &= tag != "table"

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.in_table and self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += f" {data}"


def write_matrix(tmp_path: Path, *reports: Path, names: tuple[str, ...] = ("llama", "small")) -> tuple[Page, Any]:
    out = tmp_path / "out" / "matrix.html"
    matrix.main([*map(str, reports), "--out", str(out), "--name", *names])
    return Page(out.read_text()), json.loads(out.with_suffix(".json").read_text())


def test_every_number_stands_in_its_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_report(tmp_path / "a.json", 0.0, ("better", "worse"))
    two = write_report(tmp_path / "b.json", 0.25, ("better", "within noise"), lambda c: c["benches"].pop())
    page, content = write_matrix(tmp_path, one, two)
    assert len(page.tables) == 3  # clips, dreamlip, and all scores
    clips, dreamlip, scores = ([[cell.split() for cell in row] for row in table] for table in page.tables)
    assert [cell[0] for cell in clips[0]] == ["score", "llama", "small"]
    assert [" ".join(row[0]) for row in clips[1:]] == ["POPE F1", "MME perception"]  # no recall: not a headline
    assert clips[1][1] == ["+6.0", "▲", "better", "+3.0", "to", "+10.0"]
    assert clips[1][2] == ["+6.0", "▲", "better", "+3.0", "to", "+10.0"]
    assert clips[2][1] == ["+60.0", "●", "within", "noise", "+30.0", "to", "+100.0"]
    assert clips[2][2] == ["–"]  # not asked of the second
    assert dreamlip[1][1] == ["−9.0", "▼", "worse", "−12.0", "to", "−5.0"]
    assert dreamlip[1][2][1:4] == ["●", "within", "noise"]
    assert scores[1] == [["POPE", "F1"], ["50.0"], ["56.0"], ["41.0"], ["75.0"], ["81.0"], ["66.0"]]
    assert scores[2][1:] == [["500.0"], ["560.0"], ["410.0"], ["–"], ["–"], ["–"]]
    assert content["rows"][0]["cells"][1]["scores"][1] == pytest.approx(0.81)
    assert content["rows"][1]["cells"][1] is None
    told = capsys.readouterr().out
    lead = "clips against clip, headline scores: with llama better in 1 of 2; with small better in 1 of 1. The same"
    assert lead in " ".join(told.split())
    assert "with every language model: POPE F1 (better)." in " ".join(told.split())
    assert lead in " ".join("".join(page.words).split())
    alone = "dreamlip against clip, headline scores: with llama worse in 2 of 2; with small within noise in 1 of 1."
    assert alone in " ".join(told.split())


def test_few_images_are_not_called_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("few images", "few images")
    one, two = (write_report(tmp_path / f"{n}.json", 0.0, words, lambda c: c["benches"].pop()) for n in "ab")
    write_matrix(tmp_path, one, two)
    assert "with llama too few images in 1 of 1; with small" in " ".join(capsys.readouterr().out.split())


def test_what_a_report_warns_of_stands_on_top(tmp_path: Path) -> None:
    one = write_report(tmp_path / "a.json", 0.0, ("better", "worse"), lambda c: c.update(allowed=True))
    two = write_report(
        tmp_path / "b.json", 0.0, ("better", "worse"), lambda c: c["benches"][0].update(failed=[1, 2, 0])
    )
    words = " ".join(write_matrix(tmp_path, one, two)[0].words)
    assert "llama: settings besides the encoder differ" in words
    assert "small: 3 questions failed and count as wrong" in words


def test_the_page_asks_for_nothing_and_names_stay_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;"

    def rename(content: dict[str, Any]) -> None:
        content["names"][1] = hostile
        content["benches"][0]["bench"] = hostile
        content["benches"][0]["measures"][0]["name"] = hostile

    files = [write_report(tmp_path / f"{n}.json", 0.0, ("better", "worse"), rename) for n in range(2)]
    page, _ = write_matrix(tmp_path, *files, names=(hostile, "small"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert not {name for _, attributes in page.tags for name in attributes} & {"src", "href", "onerror", "onload"}
    assert hostile in page.tables[0][1][0]
    assert hostile in page.tables[0][0][1]


def test_encoders_that_a_stage_trained_further_are_those_they_began_as(tmp_path: Path) -> None:
    """Stage tower leaves another tower beside every language model."""

    def trained(name: str) -> Change:
        return lambda c: [run.update(made_from=run["name"], encoder={"fingerprint": name}) for run in c["runs"]]

    one, two = (write_report(tmp_path / f"{n}.json", 0.0, ("better", "worse"), trained(n)) for n in ("a", "b"))
    assert write_matrix(tmp_path, one, two)[1]["arms"] == list(ARMS)


FAULTS: dict[str, tuple[str, Change]] = {
    "other arms": ("same arms in the same order", lambda c: c["names"].reverse()),
    "another encoder": ("clips has another encoder", lambda c: c["runs"][1]["encoder"].update(fingerprint="x")),
    "other questions": ("pope has 100 questions .* 99", lambda c: c["benches"][0].update(questions=99)),
    "as many other questions": (
        "pope is not asked alike",
        lambda c: c["benches"][0].update(dataset={"fingerprint": "d1"}),
    ),
    "another protocol": ("pope is not asked alike", lambda c: c["benches"][0].update(protocol={"split": "val"})),
    "the same models": (
        "are about the same model",
        lambda c: c["runs"][3]["model"].update(
            fingerprint=c["runs"][3]["model"]["fingerprint"].replace("b.json", "a.json")
        ),
    ),
    "no runs": (r"is no report\.json", lambda c: c.pop("runs")),
    "a measure without a score": (r"is no report\.json", lambda c: c["benches"][0]["measures"][0].pop("scores")),
    "a difference without an interval": (
        r"is no report\.json",
        lambda c: c["benches"][0]["measures"][0]["differences"][0].pop("low"),
    ),
    "fewer runs than seeds": (r"is no report\.json", lambda c: c.update(seeds=[1, 2, 2])),
}


@pytest.mark.parametrize("name", FAULTS)
def test_reports_that_do_not_line_up_are_refused(name: str, tmp_path: Path) -> None:
    message, change = FAULTS[name]
    one = write_report(tmp_path / "a.json", 0.0, ("better", "worse"))
    two = write_report(tmp_path / "b.json", 0.0, ("better", "worse"), change)
    with pytest.raises(DataError, match=message):
        write_matrix(tmp_path, one, two)
    assert not (tmp_path / "out").exists()


def test_usage(tmp_path: Path) -> None:
    one = write_report(tmp_path / "a.json", 0.0, ("better", "worse"))
    with pytest.raises(UsageError, match="two report"):
        matrix.main([str(one), "--out", str(tmp_path / "m.html")])
    with pytest.raises(UsageError, match="different names"):
        matrix.main([str(one), str(one), "--out", str(tmp_path / "m.html")])
    with pytest.raises(UsageError, match=r"\.html"):
        matrix.main([str(one), str(one), "--name", "a", "b", "--out", str(tmp_path / "m.pdf")])
    with pytest.raises(DataError, match=r"nowhere\.json is no report"):
        matrix.main([str(one), str(tmp_path / "nowhere.json"), "--out", str(tmp_path / "m.html")])
    two = write_report(tmp_path / "b.json", 0.0, ("better", "worse"))
    (tmp_path / "m.html").mkdir()
    with pytest.raises(UsageError, match=r"m\.html cannot be written"):
        matrix.main([str(one), str(two), "--out", str(tmp_path / "m.html")])
    assert not list(tmp_path.glob(".*"))
