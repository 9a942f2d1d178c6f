"""The report's page: self-contained, and text stays text whatever questions, answers, names and settings say.

A plain parser checks that everywhere; where there is a Chromium, so does it.
"""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import Browser, executable
from result_folders import changed, pope_rows, two_runs, write_results

from eval.compare import main
from eval.comparing.comparison import compare, to_json
from eval.comparing.markup import LONGEST_TEXT, STEERING, text
from eval.comparing.report import render
from eval.comparing.results import load_arm
from eval.comparing.summary import show
from eval.comparing.views import Views

# What a page could be talked into: scripts, handlers, requests, styles, broken frames, other syntaxes, odd characters.
PAYLOADS = (
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<SCRIPT SRC=//evil.example/x.js></SCRIPT>",
    "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "<img src=x onerror=alert(1)>",
    '"><img src=x onerror=alert(1)>',
    "'><img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    "</svg><script>alert(1)</script>",
    "<svg><foreignObject><iframe src=//evil.example></iframe></foreignObject></svg>",
    "<iframe src=javascript:alert(1)></iframe>",
    "<object data=//evil.example/x></object>",
    "<embed src=//evil.example/x>",
    "<link rel=stylesheet href=//evil.example/x.css>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<base href=//evil.example/>",
    "<a href=javascript:alert(1)>x</a>",
    "<form action=//evil.example><input autofocus onfocus=alert(1)></form>",
    "<video src=//evil.example/x onerror=alert(1)>",
    "<details open ontoggle=alert(1)>",
    "<math><mi xlink:href=javascript:alert(1)>",
    "<style>*{background:url(//evil.example)}</style>",
    "</style><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "</head><body onload=alert(1)>",
    "</body></html><script>alert(1)</script>",
    "</table></div></main><script>alert(1)</script>",
    "</code></td><td onclick=alert(1)>",
    "<!--",
    "--><script>alert(1)</script>",
    "<![CDATA[<script>alert(1)</script>]]>",
    "]]><script>alert(1)</script>",
    "<?php echo 1 ?>",
    "<!doctype html>",
    "<plaintext>",
    "<xmp>",
    "<noscript><p title='</noscript><script>alert(1)</script>'>",
    "<textarea></textarea><script>alert(1)</script>",
    "<template><script>alert(1)</script></template>",
    "<b",
    "<",
    ">",
    "&",
    '"',
    "'",
    "`",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;alert(1)&#60;/script&#62;",
    "&amp;amp;",
    "&nbsp;&copy",
    "&#0;&#xD800;",
    "%3Cscript%3Ealert(1)%3C/script%3E",
    "\\u003cscript\\u003ealert(1)\\u003c/script\\u003e",
    '" onmouseover="alert(1)',
    "' onmouseover='alert(1)",
    '" style="background:url(//evil.example)',
    "x' autofocus onfocus='alert(1)",
    "javascript:alert(1)",
    "data:text/html,<script>alert(1)</script>",
    "http://evil.example/",
    "//evil.example/",
    "file:///etc/passwd",
    "url(//evil.example)",
    "expression(alert(1))",
    "@import '//evil.example';",
    "{title}",
    "{body}",
    "{0}",
    "{}",
    "{{7*7}}",
    "${7*7}",
    "#{7*7}",
    "<%= 7*7 %>",
    "%s%n%d",
    "[red]not markup[/red]",
    "[/]",
    "[link=http://evil.example]x[/link]",
    "'; DROP TABLE runs; --",
    "$(reboot)",
    "| sh",
    "../../etc/passwd",
    "\x00",
    "a\x00b",
    "\x01\x02\x08\x0b\x0c\x1f\x7f",
    "\x1b[31mred\x1b[0m",
    "\r\nSet-Cookie: x=1",
    "tab\tand\nline",
    "\u202egnirts desrever",
    "\u2066isolated\u2069 \u200f\u200e\u061c",
    "\u2028\u2029",
    "\ud800",
    "\udfff\ud800",
    "\ufeff\ufffe\uffff",
    "\ufdd0",
    "\U0001f469\u200d\U0001f680",
    "e\u0301\u0327\u0323" * 30,
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\uff1cscript\uff1ealert(1)\uff1c/script\uff1e",
    "+ADw-script+AD4-alert(1)+ADw-/script+AD4-",
    "x" * 5000,
    "<" * 1000,
)
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "main", "header", "section", "article", "h1", "h2", "h3", "p"),
    *("ul", "li", "dl", "dt", "dd", "span", "i", "b", "small", "strong", "code", "bdi", "br", "img", "details", "div"),
    *("summary", "table", "thead", "tbody", "tr", "th", "td", "svg", "line", "circle", "rect", "text"),
}
INERT = {
    *("lang", "charset", "content", "http-equiv", "name", "class", "style", "scope", "alt", "title", "open", "src"),
    *("viewbox", "width", "height", "role", "aria-label", "aria-hidden", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy"),
    *("r", "fill", "stroke", "stroke-width", "stroke-linecap", "opacity", "font-size", "font-weight", "text-anchor"),
}


class Page(HTMLParser):
    """What a page consists of: tags, attributes, and the text of its body outside of the style."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self.words: list[str] = []
        self.others: list[str] = []
        self.depth: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update((name, value or "") for name, value in attrs)
        if tag not in ("meta", "img", "br", "line", "circle", "rect"):
            self.depth.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "img", "br", "line", "circle", "rect"):
            self.depth.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.depth.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.depth:
            self.words.append(data)

    def handle_comment(self, data: str) -> None:
        self.others.append(data)

    def handle_pi(self, data: str) -> None:
        self.others.append(data)

    def unknown_decl(self, data: str) -> None:
        self.others.append(data)


def check_inert(page: str) -> Page:
    """Known tags and attributes only, nothing from elsewhere, everything closed."""
    parsed = Page()
    parsed.feed(page)
    parsed.close()
    assert parsed.depth == []
    assert parsed.others == []
    assert parsed.tags <= TAGS, parsed.tags - TAGS
    for name, value in parsed.attributes:
        assert name in INERT, name
        if name == "src":
            assert re.fullmatch(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+", value), value[:60]
        if name == "style":
            assert re.fullmatch(r"background:#[0-9a-f]{6}", value)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in page
    return parsed


def shown(payload: str) -> str:
    """How a payload must read on the page."""
    bounded = payload if len(payload) <= LONGEST_TEXT else payload[:LONGEST_TEXT] + " …"
    return STEERING.sub("\ufffd", bounded)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of which questions, answers, categories, settings and names all are hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    count = len(PAYLOADS)
    settings = changed(eval={f"key{at} {payload[:50]}": payload for at, payload in enumerate(PAYLOADS)})
    paths = []
    for name, good in (("0a", True), ("0b", False)):
        rows = pope_rows(count, 2, lambda *_, good=good: good)
        for row in rows:
            payload = PAYLOADS[row["index"] // 2]
            row |= {"prompt": f"{payload}\nsecond {payload}", "answer": payload, "category": payload[:40]}
        encoder = {"encoder": {"fingerprint": name, "path": PAYLOADS[1], "kind": PAYLOADS[4] + name}}
        other = {f"versions{PAYLOADS[5]}": name}
        paths.append(
            write_results(
                folder / name,
                rows,
                settings | {"model": settings["model"] | encoder, "other": other},
                encoder=name,
                dataset=PAYLOADS[8],
                protocol={PAYLOADS[9]: PAYLOADS[10]},
            )
        )
    names = ["</h1><script>alert('one')</script>\u202e", "[/]<img src=x onerror=alert(2)>"]
    arms = [load_arm([path], name) for path, name in zip(paths, names, strict=True)]
    comparison = compare(arms, draws=100, flips=2 * count, allow_differences=True)  # all questions in the gallery
    out = folder / "report.html"
    out.write_text(render(comparison, Views(missing=PAYLOADS[2])), encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps(to_json(comparison)))
    show(comparison, out)
    return out


def test_100_hostile_strings_stay_text(hostile: Path) -> None:
    assert len(PAYLOADS) >= 100
    page = hostile.read_text(encoding="utf-8")
    parsed = check_inert(page)
    words = "".join(parsed.words)
    for payload in PAYLOADS:
        # parsers read one kind of line break
        expected = shown(payload).replace("\r\n", "\n").replace("\r", "\n")
        assert words.count(expected) >= 3, f"{payload!r} is not on the page as it is"
    assert STEERING.search(page) is None
    content = json.loads(hostile.with_suffix(".json").read_text())
    assert content["names"][0].startswith("</h1><script>")


def test_text_is_escaped_and_bounded() -> None:
    for payload in PAYLOADS:
        safe = text(payload)
        assert html.unescape(safe) == shown(payload) or "&" in payload
        assert not set("<>\"'") & set(safe)
        safe.encode("utf-8")
    assert text({"a": "<b>"}) == "{&quot;a&quot;: &quot;&lt;b&gt;&quot;}"


def test_an_ordinary_report_is_inert(tmp_path: Path) -> None:
    a, b = two_runs(tmp_path)
    out = tmp_path / "report.html"
    main([str(a), str(b), "--out", str(out), "--draws", "100"])
    parsed = check_inert(out.read_text(encoding="utf-8"))
    words = " ".join(" ".join(parsed.words).split())
    for part in ("At a glance", "The encoders alone", "What the encoders see", "Not drawn: the model folder", "Cost"):
        assert part in words
    assert "250.0" not in words
    assert "empty: a 0, b 0; unparsed: a 0, b 0; failed: a 0, b 0" in words


@pytest.mark.skipif(executable() is None, reason="no Chromium here: the page was checked by a plain parser only")
def test_chromium_opens_it_without_error_or_request(hostile: Path, tmp_path: Path) -> None:
    a, b = two_runs(tmp_path)
    ordinary = tmp_path / "report.html"
    main([str(a), str(b), "--out", str(ordinary), "--draws", "100"])
    broken = tmp_path / "broken.html"
    broken.write_text("<img src=http://127.0.0.1:9/x.png><script>console.error('x')</script>")
    with Browser(tmp_path / "profile") as browser:
        for page in (ordinary, hostile):
            visit = browser.visit(page)
            assert visit.requests == [page.as_uri()]
            assert visit.complaints == []
            assert "At a glance" in visit.text
        assert "<script>alert('one')</script>" in visit.title  # as text
        bad = browser.visit(broken)  # the listener hears what there is to hear
        assert len(bad.requests) == 2
        assert bad.complaints
