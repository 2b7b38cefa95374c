import numpy as np
import pytest

from tercet.data.batches.blocks import TokenBlocks, token_blocks
from tercet.data.files.texts import open_texts
from tercet.errors import DataError


def ids_of(texts):
    """One token a character: the text 'abc' is 97, 98, 99."""
    return [np.array([ord(c) for c in text], np.int32) for text in texts]


def made(tmp_path, *texts, size=6, **options) -> TokenBlocks:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(texts) + "\n")
    return token_blocks(open_texts(path, **options.pop("reading", {})), ids_of, size, **options)


def read(blocks: TokenBlocks):
    return [["".join(map(chr, ids)) for ids in block] for block in blocks.read(range(len(blocks)))]


def test_a_block_holds_whole_texts_as_long_as_they_fit(tmp_path):
    blocks = made(tmp_path, "abc", "de", "fghi", "jk", "lmnopq", "rs")
    assert read(blocks) == [["abc", "de"], ["fghi", "jk"], ["lmnopq"], ["rs"]]
    assert blocks.sizes.tolist() == [5, 6, 6, 2]


def test_a_text_longer_than_a_block_is_cut_and_a_rest_of_one_token_dropped(tmp_path):
    blocks = made(tmp_path, "abcdefghijklm", "no", "pqrstuvw")
    assert read(blocks) == [["abcdef"], ["ghijkl"], ["no"], ["pqrstu"], ["vw"]]


def test_texts_of_one_token_are_counted_and_left_out(tmp_path):
    blocks = made(tmp_path, "a", "bc", "d")
    assert read(blocks) == [["bc"]] and blocks.skipped == 2
    with pytest.raises(DataError, match="no text has two tokens"):
        made(tmp_path, "a", "b")


def test_concatenated_texts_ignore_borders_and_drop_the_rest(tmp_path):
    blocks = made(tmp_path, "abcd", "e", "fghij", "klmn", concatenated=True)
    assert read(blocks) == [["abcdef"], ["ghijkl"]]
    lines = ["abcd"] * 1_001  # a group of a thousand lines, and one of a single one
    blocks = made(tmp_path, *lines, size=12, concatenated=True)
    assert read(blocks) == [["abcdabcdabcd"]] * 333
    with pytest.raises(DataError, match="do not fill one block of 12 tokens"):
        made(tmp_path, "abc", size=12, concatenated=True)


def test_the_fingerprint_changes_with_texts_and_size(tmp_path):
    one = made(tmp_path, "abc", "de").fingerprint
    assert one == made(tmp_path, "abc", "de").fingerprint
    others = {
        made(tmp_path, "abc", "df").fingerprint,
        made(tmp_path, "abc", "de", size=4).fingerprint,
    }
    assert len({one, *others}) == 3
