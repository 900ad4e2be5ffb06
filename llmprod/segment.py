"""Word segmentation, also of scripts that put no spaces between words (Chinese, Japanese)."""

import itertools
import re
from collections.abc import Iterable

UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # kana and Han characters
RUN, CHARACTER = re.compile(f"[{UNSPACED}]+"), re.compile(f"[{UNSPACED}]")


def words(text: str) -> list[str]:
    """The words between spaces; of scripts without spaces each character is one, as word processors count them."""
    return CHARACTER.sub(r" \g<0> ", text).split()


def pairs(text: str) -> str:
    """The text, with runs of characters without spaces written as their overlapping pairs: 退货政策 is 退货 货政 政策.

    So whoever looks for words finds some: a pair is about as long as a word, and no dictionary has to know it (as in
    Lucene's CJKAnalyzer). Texts of other scripts stay as they are.
    """
    return RUN.sub(lambda run: f" {' '.join(map(''.join, itertools.pairwise(run[0]))) or run[0]} ", text)


def lower_pairs(text: str) -> str:
    """`pairs` in lower case: a `preprocessor` for the vectorisers of scikit-learn."""
    return pairs(text.lower())


def spaced(text: str) -> str:
    """The text with its characters without spaces apart, so that what works on words works on them; see `closed`."""
    return CHARACTER.sub(r" \g<0> ", text)


def closed(text: str) -> str:
    """`spaced` undone: no space stands beside a character of a script without spaces."""
    return re.sub(rf" *([{UNSPACED}]) *", r"\1", text)


def language_of(texts: Iterable[str]) -> str:
    """zh where Chinese characters are most of the letters of some texts, else en."""
    letters = re.findall(r"[^\W\d_]", "".join(texts))
    return "zh" if 2 * sum(CHARACTER.match(letter) is not None for letter in letters) > len(letters) else "en"
