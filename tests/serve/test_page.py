"""The page of the server, in a real browser where there is one: Chromium, driven by playwright."""

import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx2
import pytest

from tercet.data.files.documents import Document
from tercet.models.embedder import Embedder
from tercet.rank.scoring import scores_of
from tercet.serve.search import page as page_module
from tests.serve.indexed import DOCUMENTS, make_index
from tests.serving import Running, serving

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
HURTFUL = Document(
    "<b id=bold>9</b>",
    "keep <script>window.hurt = 1</script> and <img src=x onerror='window.hurt = 1'> 🙂 music",
    "<script>window.hurt = 1</script>",
    {"lang": "<i>x</i>"},
)
AWKWARD = Document(
    "awkward",
    "music with commas",
    "Awkward",
    {"topic": "a, b", "edge": " c ", "say": 'so "d\\', "in, on": "e=f", "none": "", "digits": "07"},
)
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def server(hybrid_folder, encoder_folder, tmp_path_factory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("pages")
    indexes = {
        "all": make_index(folder / "all", hybrid_folder, [*DOCUMENTS, HURTFUL]),
        "awkward": make_index(folder / "awkward", hybrid_folder, [*DOCUMENTS, AWKWARD]),
        "dense only": make_index(folder / "dense", encoder_folder),
    }
    with serving(indexes=indexes) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed, so the page was not opened in a browser")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Opened:
    """A page in a browser, and what it complained about."""

    def __init__(self, browser, url: str, **options) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._note)
        self.page.on("request", lambda request: self._require_own(request.url, url))
        self.page.goto(f"{url}/")

    def _note(self, message) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def _require_own(self, asked: str, url: str) -> None:
        if not asked.startswith((url, "data:")):
            self.problems.append(f"asked for {asked}")

    def search(self, query: str) -> list[str]:
        self.page.fill("#query", query)
        self.page.press("#query", "Enter")
        return self.titles()

    def titles(self) -> list[str]:
        """Return the titles of the hits when the last search has been answered."""
        self.page.wait_for_selector('#hits[aria-busy="false"]', state="attached")
        return self.page.locator(".hit h3").all_inner_texts()

    def set_weight(self, kind: str, value: float) -> None:
        slider = self.page.locator(f"#weight-{kind}")
        slider.fill(str(value))

    def require_no_sideways_scrolling(self) -> None:
        sizes = "[document.documentElement.scrollWidth, window.innerWidth]"
        width, room = self.page.evaluate(sizes)
        assert width <= room


@pytest.fixture
def opened(browser, server) -> Iterator[Opened]:
    """The page, which is to have no error, and no violation of its policy, when a test ends."""
    made = Opened(browser, server.url)
    made.page.wait_for_selector("#weight-dense")
    yield made
    made.context.close()
    assert made.problems == []


def titles(server: Running, **fields) -> list[str]:
    answer = server.post("/v1/search", {"k": 10, **fields}).json()
    return [hit["title"] or hit["id"] for hit in answer["results"][0]["hits"]]


def test_the_page_may_run_its_own_script_only_and_fetch_from_nowhere_else(server):
    answer = server.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    rules = dict(
        rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; ")
    )
    assert rules["default-src"] == rules["frame-ancestors"] == rules["base-uri"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", rules["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", rules["style-src"])
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"https?://|@import|url\(", answer.text)


def test_the_page_is_one_small_file_that_puts_text_in_as_text():
    text = (Path(page_module.__file__).parent / "page.html").read_text()
    assert len(text.splitlines()) <= 600
    assert not re.search("innerHTML|outerHTML|insertAdjacent|document.write|eval", text)


def test_hits_are_those_of_the_server_with_their_tokens_marked(opened, server):
    assert opened.search("music and files") == titles(server, query="music and files")
    marks = set(opened.page.locator("mark").all_inner_texts())
    assert {"music", "and", "files"} <= marks
    assert re.match(
        r"10 of 13 documents in \d+ ms \(query [\d.]+, search [\d.]+\)",
        opened.page.inner_text("#status"),
    )
    first = opened.page.locator(".hit").first
    assert re.findall(r"\u00d7 ([\d.]+)", first.locator(".bars").inner_text()) == [
        "1.00",
        "0.50",
        "2.00",
    ]
    widths = [each.bounding_box()["width"] for each in first.locator(".bar i").all()]
    assert max(widths) > 100


def test_sliders_change_the_ranking(opened, server):
    before = opened.search("draw the files of tomorrow")
    for kind, value in {"dense": 0, "sparse": 2, "multi": 0}.items():
        opened.set_weight(kind, value)
    after = opened.titles()
    weights = {"dense": 0, "sparse": 2, "multi": 0}
    assert after == titles(server, query="draw the files of tomorrow", weights=weights)
    assert after != before
    assert opened.page.locator(".hit").first.inner_text().count("does not count") == 2
    opened.set_weight("sparse", 0)
    opened.titles()
    assert opened.page.inner_text("#status") == "All weights are 0; give one of the kinds more."


def test_kinds_that_an_index_lacks_cannot_be_weighed(opened, server):
    opened.page.select_option("#index", "dense only")
    assert opened.page.is_enabled("#weight-dense")
    assert opened.page.is_disabled("#weight-sparse") and opened.page.is_disabled("#weight-multi")
    said = opened.page.inner_text("#weights")
    assert "The index has no token weights." in said and "The index has no token vectors." in said
    assert opened.search("music") == titles(server, query="music", index="dense only")
    assert opened.page.locator("mark").count() == 0


def test_filters_are_typed_or_clicked(opened, server):
    opened.search("music")
    opened.page.fill("#where", "lang=de, year=2003, year=2005")
    opened.page.press("#where", "Enter")
    where = {"lang": "de", "year": [2003, 2005]}
    assert opened.titles() == titles(server, query="music", where=where)
    opened.page.fill("#where", "")
    opened.search("music")
    opened.page.locator(".hit button", has_text="lang=en").first.click()
    assert opened.titles() == titles(server, query="music", where={"lang": "en"})
    assert opened.page.input_value("#where") == "lang=en"
    opened.page.fill("#where", "lang")
    opened.search("music")
    said = 'Write a field and its value, as lang=en; got "lang".'
    assert opened.page.inner_text("#status") == said
    opened.page.fill("#where", "language=en")
    assert opened.search("music") == []
    assert "Where language: no document has this field" in opened.page.inner_text("#status")


def test_a_click_on_any_value_finds_the_documents_that_have_it(opened, server):
    opened.page.select_option("#index", "awkward")
    opened.search("commas")
    for field, value in AWKWARD.fields.items():
        opened.page.fill("#where", "lang=en")
        opened.search("commas")
        assert "Awkward" not in opened.titles()
        opened.page.fill("#where", "")
        opened.search("commas")
        opened.page.locator(".hit button", has_text=f"{field}={value}").click()
        assert opened.titles() == ["Awkward"], opened.page.input_value("#where")
    for field, value in AWKWARD.fields.items():  # all of them at once
        opened.page.locator(".hit button", has_text=f"{field}={value}").click()
        assert opened.titles() == ["Awkward"]
    assert opened.page.input_value("#where").count("=") == len(AWKWARD.fields) + 1


def test_a_document_that_looks_like_html_is_shown_as_text(opened, server):
    assert HURTFUL.title in opened.search("keep script window music")
    hit = opened.page.locator(".hit", has_text=HURTFUL.title).first
    assert hit.locator(".text").inner_text() == HURTFUL.text
    assert hit.locator("mark", has_text="music").count() == 1  # after a character of two halves
    assert hit.locator("button").all_inner_texts() == ["lang=<i>x</i>"]
    assert opened.page.evaluate("window.hurt") is None
    assert opened.page.locator(".hit script, .hit img, #bold, .hit button i").count() == 0


@pytest.mark.parametrize("roles", [("", ""), ("query", "document")])
def test_two_texts_are_compared_by_each_kind(opened, server, roles):
    texts = ["play music in a terminal", "a music player for the terminal window"]
    embedder: Embedder = server.embedder("hybrid")
    one, other = (
        embedder.encode_vectors([text], role or "default")
        for text, role in zip(texts, roles, strict=True)
    )
    opened.page.click("#tab-compare")
    opened.page.fill("#first", texts[0])
    opened.page.fill("#second", texts[1])
    opened.page.select_option("#roles", roles[0])
    opened.page.click("#pair button")
    opened.page.wait_for_selector("#score-dense")
    for kind in embedder.kinds:
        expected = scores_of(kind, one, other).item()
        shown = float(opened.page.inner_text(f"#score-{kind}").replace(",", ""))
        assert shown == pytest.approx(expected, abs=2e-3)
    assert "music" in opened.page.inner_text("#scores .chips")


def test_a_comparison_needs_two_texts(opened):
    opened.page.click("#tab-compare")
    opened.page.click("#pair button")
    assert opened.page.inner_text("#compared") == "Write two texts to compare."


def test_state_is_shown_in_words(opened):
    opened.page.click("#tab-state")
    opened.page.wait_for_selector("#state table")
    said = opened.page.inner_text("#state")
    for line in (
        "Index all",
        "Index dense only",
        "Model hybrid",
        "Waiting\t0 of at most 1,000,000",
    ):
        assert line in said
    assert "dense, sparse, multi; dense ones of 64 coordinates in float32" in said


def test_the_keyboard_is_enough(opened, server):
    page = opened.page

    def focused() -> str:
        return page.evaluate("document.activeElement.id || document.activeElement.className")

    assert focused() == "query"
    page.keyboard.type("music")
    page.keyboard.press("Enter")
    hits = opened.titles()
    page.keyboard.press("ArrowDown")
    assert focused() == "hit"
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.querySelector('h3').innerText") == hits[1]
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.locator(".hit .text.folded").count() == len(hits) - 1
    page.keyboard.press("Escape")
    assert focused() == "query"
    page.keyboard.press("Escape")
    assert page.input_value("#query") == "" and opened.titles() == []
    page.locator("#tab-search").focus()
    page.keyboard.press("ArrowRight")
    assert focused() == "tab-compare" and page.is_visible("#first")
    page.keyboard.press("/")
    assert focused() == "query" and page.is_visible("#ask")
    page.keyboard.type("a/b")
    assert page.input_value("#query") == "a/b"


def test_every_field_has_a_name(opened):
    opened.search("music")
    unnamed = opened.page.evaluate(
        "[...document.querySelectorAll('input, select, textarea, button')].filter(each => "
        "!(each.labels && each.labels.length) && !each.ariaLabel && !each.innerText.trim() "
        "&& each.getClientRects().length).length"
    )
    assert unnamed == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(browser, server, scheme):
    opened = Opened(browser, server.url, color_scheme=scheme)
    opened.page.wait_for_selector("#weight-dense")
    opened.search("music")
    pairs = opened.page.evaluate(
        """["--ink", "--soft", "--own", "--warn"].flatMap((name) =>
          ["--paper", "--panel"].map((behind) => [name, behind].map((each) =>
            getComputedStyle(document.documentElement).getPropertyValue(each).trim())))"""
    )
    assert all(contrast(*pair) >= 4.5 for pair in pairs), pairs
    paper = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    opened.context.close()
    assert opened.problems == []


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours (WCAG 2.2)."""

    def light(colour: str) -> float:
        code = colour[1:] if len(colour) == 7 else "".join(2 * each for each in colour[1:])
        parts = [int(code[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted([light(one), light(other)])
    return (high + 0.05) / (low + 0.05)


def test_nothing_sticks_out_on_a_phone(browser, server):
    opened = Opened(browser, server.url, viewport=PHONE)
    opened.page.wait_for_selector("#weight-dense")
    opened.search("keep music")
    opened.require_no_sideways_scrolling()
    boxes = [opened.page.locator(f"#weight-{k}").bounding_box() for k in ("dense", "sparse")]
    assert all(one["y"] < other["y"] for one, other in pairwise(boxes))
    opened.page.click("#tab-compare")
    opened.page.fill("#first", "music")
    opened.page.fill("#second", "music " * 50)
    opened.page.click("#pair button")
    score = opened.page.locator("#score-dense")
    score.wait_for()
    assert score.bounding_box()["height"] < 40  # the number is on one line
    opened.require_no_sideways_scrolling()
    opened.page.click("#tab-state")
    opened.page.wait_for_timeout(200)
    opened.require_no_sideways_scrolling()
    opened.context.close()
    assert opened.problems == []


def test_without_an_index_the_page_says_how_to_make_one_and_compares(browser, encoder_folder):
    with serving({"plain": encoder_folder}) as server:
        opened = Opened(browser, server.url)
        opened.page.wait_for_selector("#without")
        assert "tercet serve --index runs/index" in opened.page.inner_text("#without")
        assert not opened.page.is_visible("#ask")
        opened.page.click("#tab-compare")
        opened.page.fill("#first", "music")
        opened.page.fill("#second", "music")
        opened.page.click("#pair button")
        opened.page.wait_for_selector("#score-dense")
        assert opened.page.inner_text("#score-dense") == "1.000"
        assert "the model does not make it" in opened.page.inner_text("#scores")
        opened.context.close()
        assert opened.problems == []


def test_a_server_with_a_key_asks_for_it_and_one_that_is_gone_is_noticed(browser, encoder_folder):
    with serving({"plain": encoder_folder}, key="secret", wait=True) as server:
        opened = Opened(browser, server.url)
        opened.page.wait_for_selector("#key:not([hidden])")
        assert "API key is missing" in opened.page.inner_text("#status")
        opened.page.fill("#secret", "wrong")
        opened.page.press("#secret", "Enter")
        opened.page.locator("#status", has_text="API key is wrong").wait_for()
        opened.page.fill("#secret", "secret")
        opened.page.press("#secret", "Enter")
        opened.page.wait_for_selector("#without:not([hidden])")
        assert not opened.page.is_visible("#key")
        assert opened.page.evaluate("localStorage.length + sessionStorage.length") == 0
        assert opened.context.cookies() == []
        with pytest.raises(httpx2.HTTPStatusError):
            server.get("/v1/state").raise_for_status()
    opened.page.click("#tab-state")
    opened.page.wait_for_selector("#state .problem")
    assert opened.page.inner_text("#state") == (
        "The server cannot be reached. Is it still running?"
    )
    opened.context.close()
    assert all("Failed to load resource" in problem for problem in opened.problems)
