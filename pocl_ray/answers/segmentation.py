"""Words of a text in any script, as ROUGE counts them.

ASCII text gives the very words of the `rouge_score` package: runs of letters and digits in lower case, the longer ones
stemmed by Porter's rules. That package drops all else, so a text in another script has no words at all there. Here

- a script that writes spaces gives runs of letters, digits and their marks (Unicode's properties L, M, N);
- a script that writes none (Chinese, Japanese, Thai and their like) gives its characters, with their marks;
- a pictograph, such as an emoji, is a word of its own; signs of currencies and of mathematics are dropped, as in ASCII.

Text is first made comparable by Unicode's own rules (NFKC and case folding), so that a letter with an accent is one
thing however it is encoded.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import cache, lru_cache

import regex

# Scripts whose words are not divided by spaces. Tibetan divides syllables by a sign, so it is none of them.
_UNSPACED = (
    "Han",
    "Hiragana",
    "Katakana",
    "Bopomofo",
    "Yi",
    "Thai",
    "Lao",
    "Khmer",
    "Myanmar",
    "Tai_Le",
    "New_Tai_Lue",
    "Tai_Tham",
    "Tai_Viet",
    "Javanese",
    "Balinese",
)
_ALONE = "".join(rf"\p{{Script_Extensions={script}}}" for script in _UNSPACED)
# An unspaced letter with its marks; or a run of other letters, digits and marks; or a symbol with what modifies it:
# flags are pairs of regional indicators, and joiners (U+200D) bind emoji to one.
_WORD = regex.compile(
    rf"[[\p{{L}}\p{{N}}]&&[{_ALONE}]]\p{{M}}*"
    rf"|(?:[[\p{{L}}\p{{N}}]--[{_ALONE}]]\p{{M}}*)+"
    r"|\p{Regional_Indicator}{2}"
    r"|[\p{So}--[©®™°¦]][\p{M}\p{Emoji_Modifier}]*(?:\u200d[\p{So}--[©®™°¦]][\p{M}\p{Emoji_Modifier}]*)*",
    regex.VERSION1,
)
_STEMMED_FROM = 4  # letters; rouge_score leaves shorter words as they are
# Soft hyphens, joiners within words and variants of a sign are typography; joiners between emoji are not.
_INVISIBLE = regex.compile(r"[\u00ad\u200b\u200c\u2060\ufeff\ufe0e\ufe0f]|(?<!\p{So}[\p{M}\p{Emoji_Modifier}]*)\u200d")


def words(text: str) -> list[str]:
    """Return the words of a text, in order.

    Args:
        text: Any text; one of punctuation alone has no words.
    """
    text = comparable(text)
    return [_stem()(word) if word.isascii() and len(word) >= _STEMMED_FROM else word for word in _WORD.findall(text)]


def comparable(text: str) -> str:
    """Return the text in lower case, such that what Unicode calls the same letter is written in the same way."""
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _INVISIBLE.sub("", folded)


@cache
def _stem() -> Callable[[str], str]:
    from nltk.stem.porter import PorterStemmer  # half a second, which `plan` and `--help` need not pay

    return lru_cache(maxsize=1 << 16)(PorterStemmer().stem)  # the stemmer takes most of the time
