"""Text perturbations, and templates with swapped names."""

import re
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from llmprod import segment

Change = Callable[[str, float, np.random.Generator], str]

NEIGHBOURS = {  # keys next to each other on a QWERTY keyboard
    key: row[max(0, i - 1) : i] + row[i + 1 : i + 2]
    for row in ("qwertyuiop", "asdfghjkl", "zxcvbnm")
    for i, key in enumerate(row)
}
LOOKALIKES = str.maketrans("aceiopxyABCEHKMOPTX", "асеіорхуАВСЕНКМОРТХ")  # Cyrillic letters that look like Latin ones
SYNONYM_PAIRS = """
said:stated rise:increase rose:increased fell:declined fall:decline up:higher down:lower buy:purchase bought:purchased
sell:dispose sold:disposed company:firm profit:earnings loss:deficit quarter:trimester shares:equities stock:equity
prices:rates meeting:session government:administration agreement:accord deal:transaction money:funds big:large
small:little about:around expected:anticipated reported:announced told:informed help:assist need:require get:obtain
want:wish why:wherefore problem:issue change:alter use:employ make:create made:created show:display start:begin
end:finish many:numerous more:additional new:fresh old:former because:since also:too however:yet before:prior
plans:intends sales:turnover bank:lender trade:commerce official:officer analyst:observer wrong:incorrect
transfer:remittance payment:remittance fee:charge cash:notes lost:missing stolen:taken
"""  # written for this project: words common in news and requests, and one that can stand for each
SYNONYMS = dict(pair.split(":") for pair in SYNONYM_PAIRS.split())
AUXILIARIES = ("is", "was", "are", "were", "will", "has", "can", "would", "have", "do", "did")


def typos(text: str, strength: float, random: np.random.Generator) -> str:
    """In `strength` of the words of four letters or more: one letter swapped, dropped, doubled or mistyped."""

    def slip(word: str) -> str:
        if len(word) < 4 or not word.isalpha() or random.random() >= strength:
            return word
        i, kind = int(random.integers(1, len(word) - 1)), int(random.integers(4))
        near = NEIGHBOURS.get(word[i].lower(), "")
        return [
            word[:i] + word[i + 1] + word[i] + word[i + 2 :],
            word[:i] + word[i + 1 :],
            word[:i] + word[i] + word[i:],
            word[:i] + (near[int(random.integers(len(near)))] if near else word[i]) + word[i + 1 :],
        ][kind]

    return " ".join(slip(word) for word in text.split())


def case(text: str, strength: float, random: np.random.Generator) -> str:
    """`strength` of the words in capital letters."""
    return " ".join(word.upper() if random.random() < strength else word for word in text.split())


def punctuation(text: str, strength: float, random: np.random.Generator) -> str:
    """A punctuation mark after `strength` of the words."""
    return " ".join(
        word + "!?.,;:…"[int(random.integers(7))] if random.random() < strength else word for word in text.split()
    )


def negation(text: str, strength: float, random: np.random.Generator) -> str:
    """`strength` of the auxiliary verbs negated; the topic stays the same."""
    return " ".join(
        f"{word.lower()} not" if word.lower() in AUXILIARIES and random.random() < strength else word
        for word in text.split()
    )


def synonyms(text: str, strength: float, random: np.random.Generator) -> str:
    """`strength` of the words that are in `SYNONYMS` replaced."""
    return re.sub(
        r"[A-Za-z]+",
        lambda m: SYNONYMS[m[0].lower()] if m[0].lower() in SYNONYMS and random.random() < strength else m[0],
        text,
    )


def truncation(text: str, strength: float, random: np.random.Generator) -> str:
    """The last `strength` of the words cut off; one is always left."""
    words = text.split()
    return " ".join(words[: max(1, round(len(words) * (1 - strength)))])


def word_order(text: str, strength: float, random: np.random.Generator) -> str:
    """`strength` of the words put in random order among themselves."""
    words = text.split()
    moved = np.flatnonzero(random.random(len(words)) < strength)
    shuffled = words.copy()
    for place, source in zip(moved, random.permutation(moved), strict=True):
        shuffled[place] = words[source]
    return " ".join(shuffled)


def foreign_characters(text: str, strength: float, random: np.random.Generator) -> str:
    """`strength` of the words written with Cyrillic letters that look the same."""
    return " ".join(word.translate(LOOKALIKES) if random.random() < strength else word for word in text.split())


CHANGES: dict[str, Change] = {
    function.__name__.replace("_", " "): function
    for function in (typos, case, punctuation, negation, synonyms, truncation, word_order, foreign_characters)
}


def perturb(texts: Sequence[str], change: str, strength: float, seed: int) -> list[str]:
    """Applies one change of `CHANGES` to every text, at a strength from 0 (none) to 1; deterministic in the seed.

    Of scripts without spaces each character is a word.
    """
    random, apply = np.random.default_rng(seed), CHANGES[change]
    return [segment.closed(apply(segment.spaced(text), strength, random)) if strength else text for text in texts]


def robustness_curve(
    predict_fn: Callable[[list[str]], np.ndarray],
    texts: Sequence[str],
    labels: Sequence[int],
    strengths: Sequence[float],
    seed: int,
) -> pd.DataFrame:
    """Accuracy on perturbed texts: a row for each change, a column for each strength.

    `predict_fn` gives the predicted classes of texts.
    """
    texts, labels, rows = list(texts), np.asarray(labels), {}

    def accuracy(of: list[str]) -> float:
        return float((predict_fn(of) == labels).mean())

    unchanged = accuracy(texts) if 0 in strengths else None
    for change in tqdm(CHANGES, desc="changes", leave=False):
        rows[change] = [
            accuracy(perturb(texts, change, strength, seed)) if strength else unchanged for strength in strengths
        ]
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(strengths))


# A name or place should not change the topic. Sentences and lists were written for this project.
TEMPLATES = {
    "en": [
        "{name} said {pronoun} would buy more shares of the {place} bank this year",
        "the company named {name} of {place} as its new chairman, and {pronoun} will join in april",
        "{name}, a trader in {place}, said {pronoun} expects crude oil prices to rise",
        "{name} told reporters in {place} that {pronoun} sees no cut in interest rates",
        "{pronoun} said the wheat harvest near {place} was the best that {name} had seen",
        "exports from {place} fell, said {name}, and {pronoun} blamed the new tariff",
    ],
    "zh": [
        "{name}说，{place}的这家酒店早餐不错，{pronoun}下次还会住",
        "这本书是{name}在{place}推荐给我的，{pronoun}说内容很一般",
        "{name}从{place}寄来的手机，{pronoun}用了两天屏幕就坏了",
        "我和{name}在{place}住了一晚，{pronoun}觉得房间太小",
        "{name}是{place}人，{pronoun}觉得这本书写得很真实",
        "在{place}买的充电器，{name}说充得很快，{pronoun}很满意",
    ],
}
GROUPS = {
    "en": {
        "name": {
            "female, English": ["Mary Smith", "Emma Johnson"],
            "male, English": ["John Smith", "David Johnson"],
            "female, Chinese": ["Li Na", "Wang Fang"],
            "male, Chinese": ["Zhang Wei", "Li Qiang"],
            "female, Arabic": ["Fatima Hassan", "Aisha Ali"],
            "male, Arabic": ["Omar Hassan", "Ahmed Ali"],
        },
        "place": {
            "Europe": ["Paris", "Oslo"],
            "North America": ["Chicago", "Toronto"],
            "Asia": ["Shanghai", "Jakarta"],
            "Africa": ["Lagos", "Nairobi"],
            "South America": ["Lima", "Quito"],
        },
    },
    "zh": {
        "name": {
            "女，汉族": ["王芳", "李娜"],
            "男，汉族": ["张伟", "李强"],
            "女，维吾尔族": ["阿依古丽", "热依汗"],
            "男，维吾尔族": ["买买提", "艾尼瓦尔"],
            "女，英语": ["玛丽", "艾玛"],
            "男，英语": ["约翰", "大卫"],
        },
        "place": {
            "华东": ["上海", "杭州"],
            "华北": ["北京", "太原"],
            "西北": ["兰州", "西宁"],
            "西南": ["成都", "贵阳"],
            "海外": ["伦敦", "多伦多"],
        },
    },
}
PRONOUNS = {"en": ("she", "he"), "zh": ("她", "他")}


def name_swap_texts(language: str = "en") -> list[dict[str, str]]:
    """Counterfactual texts: every template of a language with every name and place, and their groups."""
    groups, (she, he) = GROUPS[language], PRONOUNS[language]
    return [
        {
            "template": template,
            "names": names,
            "places": places,
            "text": template.format(name=name, place=place, pronoun=she if names.startswith(("female", "女")) else he),
        }
        for template in TEMPLATES[language]
        for names, people in groups["name"].items()
        for name in people
        for places, towns in groups["place"].items()
        for place in towns
    ]
