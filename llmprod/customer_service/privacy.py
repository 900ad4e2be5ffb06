"""Personal data: found and masked before a text is logged, tracked or learnt from."""

import re
from collections.abc import Callable
from functools import partial

from llmprod import segment
from llmprod.extras import extra

with extra("support"):
    import phonenumbers
    from stdnum import iban, luhn

LETTER = rf"[^\W{segment.UNSPACED}]"  # or a digit; a character of a script without spaces ends a word
EMAIL = re.compile(rf"(?:{LETTER}|[.+-]){{1,64}}@[\w-]{{1,63}}(?:\.[\w-]{{1,63}}){{1,5}}")
DIGITS = re.compile(rf"(?<!{LETTER})(?<!-)\d(?:[ -]?\d){{11,40}}(?!{LETTER})")
IBAN = re.compile(rf"(?<!{LETTER})[A-Z]{{2}}\d{{2}}(?: ?[A-Z0-9]{{2,4}}){{3,8}}(?!{LETTER})", re.IGNORECASE)
LONGEST = 5000  # characters of a text that are searched for telephone numbers, which is slow


def mask(text: str) -> str:
    """Replaces e-mail addresses, card numbers, IBANs and telephone numbers by [e-mail], [card] … in a text.

    Cards count if their check digit is right (Luhn; library `python-stdnum`), IBANs likewise, telephone numbers if
    `phonenumbers` takes them for possible ones with a country code, or of China where the text has Chinese characters,
    else of the United Kingdom. Order numbers and amounts stay.
    """
    region = "CN" if segment.CHARACTER.search(text) else "GB"
    text = EMAIL.sub("[e-mail]", text)
    text = IBAN.sub(partial(mask_words, name="IBAN", is_valid=iban.is_valid), text)
    text = DIGITS.sub(partial(mask_words, name="card", is_valid=is_card), text)
    found = list(phonenumbers.PhoneNumberMatcher(text[:LONGEST], region)) if re.search(r"\d", text[:LONGEST]) else []
    for match in reversed(found):
        text = f"{text[: match.start]}[telephone]{text[match.end :]}"
    return text


def is_card(digits: str) -> bool:
    """Whether digits can be a card's number: 12 to 19 of them with the right check digit."""
    return 12 <= len(digits) <= 19 and luhn.is_valid(digits)


def mask_words(found: re.Match, name: str, is_valid: Callable[[str], bool]) -> str:
    """A match whose longest run of words that is a valid number is masked; what stands around it stays."""
    words = re.split(r"[ -]", found[0])
    for length in range(len(words), 0, -1):
        for start in range(len(words) - length + 1):
            if is_valid("".join(words[start : start + length])):
                return " ".join([*words[:start], f"[{name}]", *words[start + length :]])
    return found[0]
