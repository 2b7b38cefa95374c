"""Reads pages as a browser and a screen reader would."""

import re
from html.parser import HTMLParser

_EMPTY = {"meta", "br", "hr", "img", "input", "link"}


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.open = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in _EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.seen.append(data)


def text_of(page: str) -> str:
    """What a reader sees, tags taken away; every element must be closed."""
    parser = _Reader()
    parser.feed(page)
    assert parser.open == []
    return " ".join(" ".join(parser.seen).split())


def assert_self_contained(page: str) -> None:
    """Nothing is fetched and nothing runs."""
    without_names = re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)
    for sign in ("http:", "https:", "<script", "<link", "@import", "url(//", " src="):
        assert sign not in without_names
    assert set(re.findall(r'href="(.)', page)) <= {"#"}


def spoken(page: str) -> list[str]:
    """The texts of charts for those who do not see them."""
    return re.findall(r'role="img" aria-label="([^"]*)"', page)
