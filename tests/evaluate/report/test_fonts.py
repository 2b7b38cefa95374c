import re

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager, ft2font
from matplotlib.text import Text

from tercet.evaluate.report.figures import bars, dots, drawing, write_png
from tercet.evaluate.report.fonts import OWN_FONT, fitted, give_fonts, lettering, width
from tercet.evaluate.report.intervals import Interval

VALUE = Interval(0.5, 0.4, 0.6, 10)


@pytest.fixture
def only_own_font(monkeypatch):
    """A system without other fonts."""
    own = [each for each in font_manager.fontManager.ttflist if "matplotlib" in each.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)


@pytest.fixture
def korean_font(tmp_path, monkeypatch, only_own_font):
    """A font with boxes for the letters of two Korean words."""
    letters = "한국어모델"
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names = [".notdef", *(f"g{number}" for number in range(len(letters)))]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): f"g{n}" for n, c in enumerate(letters)})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Test Korean Sans", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "korean.ttf")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist])
    font_manager.fontManager.addfont(tmp_path / "korean.ttf")


def drawn(*names):
    return list(lettering(names).drawn.values())


def test_names_in_letters_of_the_own_font_stay():
    names = ["minilm", "Ελληνικά", "русский", "naïve → $x$"]
    assert drawn(*names) == names
    assert lettering(names).families == [OWN_FONT]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("한국어 위키", "[ko]"),
        ("中文", "[zh]"),
        ("日本語モデル", "[ja]"),
        ("ไทย", "[th]"),
        ("हिन्दी", "[hi]"),
        ("runs/내-모델/model", "runs/[ko]-[ko]/model"),
        ("한국어 wiki 中文", "[ko] wiki [zh]"),
        ("\uff12", "2"),
        ("𓀀 data", "[?] data"),
    ],
)
def test_a_script_without_a_font_becomes_the_code_of_its_language(only_own_font, name, code):
    assert drawn(name) == [code]


def test_names_that_differ_stay_different(only_own_font):
    assert drawn("한국어", "모델", "[ko]") == ["[ko]", "[ko] 2", "[ko] 3"]


def test_a_font_that_has_the_letters_draws_them(korean_font):
    found = lettering(["한국어 모델", "BM25"])
    assert found.drawn == {"한국어 모델": "한국어 모델", "BM25": "BM25"}
    assert found.families == [OWN_FONT, "Test Korean Sans"]


def test_letters_that_this_font_lacks_too_are_replaced(korean_font):
    assert drawn("한국어 中文") == ["한국어 [zh]"]


def test_the_box_font_of_matplotlib_is_no_font(only_own_font):
    names = {each.name for each in font_manager.fontManager.ttflist}
    assert any(name.startswith("Last Resort") for name in names)
    assert drawn("한") == ["[ko]"]


@pytest.mark.parametrize(("name", "code"), [("العربية", "[ar]"), ("עברית", "[he]")])
def test_letters_that_matplotlib_cannot_put_in_order_are_replaced(monkeypatch, name, code):
    monkeypatch.delattr(ft2font, "__libraqm_version__", raising=False)
    assert drawn(name) == [code]


def test_a_broken_font_is_passed_over(tmp_path, korean_font):
    (tmp_path / "korean.ttf").write_bytes(b"broken")
    entry = font_manager.fontManager.ttflist[-1]
    font_manager.fontManager.ttflist[-1] = type(entry)(**{**vars(entry), "size": "1"})
    assert drawn("한국어") == ["[ko]"]


@pytest.mark.parametrize("draw", [lambda rows: bars({n: {"한국어": VALUE} for n in rows}), dots])
def test_no_warning_and_no_box_is_left_in_a_picture(only_own_font, tmp_path, draw):
    names = {f"모델 {n}": {"中文": {"日本語": VALUE}} for n in range(2)}
    with drawing():
        figure = draw(names)
        write_png(tmp_path / "a.png", figure)  # a warning would be an error
    texts = [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text)]
    assert not re.search("[가-힣一-龥]", "".join(texts))
    assert any(text.startswith("[ko]") for text in texts)


def test_names_at_ticks_are_drawn_with_the_font(korean_font, tmp_path):
    with drawing():
        figure = bars({"한국어": {"ndcg@10": VALUE}, "BM25": {"ndcg@10": VALUE}})
        give_fonts(figure)
        write_png(tmp_path / "a.png", figure)
    labels = figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["한국어", "BM25"]
    assert labels[0].get_fontfamily() == [OWN_FONT, "Test Korean Sans"]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("minilm", "minilm"),
        ("a" * 12, "a" * 12),
        ("runs/first-try/model", "run…ry/model"),
        ("한국어모델의이름", "한…델의이름"),
    ],
)
def test_long_names_are_shortened_in_the_middle(name, short):
    assert fitted(name, 12) == short
    assert width(short) <= 12
