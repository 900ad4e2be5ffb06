"""Companies and currencies in texts: rules, a token classifier."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

from llmprod import LLMProdError, machine, models
from llmprod.finetune import trainer


class EntityError(LLMProdError):
    """Annotated sentences can't be used as they are."""


@dataclass(frozen=True)
class Entity:
    """A mention: `text[start:end]` names a company or a currency; `name` is the same for all its spellings."""

    kind: str
    name: str
    start: int
    end: int


# Annotated sentences: words and BIO tags

KINDS = ("PERSON", "ORGANIZATION", "LOCATION")


TAGS = ("O", *(f"{place}-{kind}" for kind in KINDS for place in "BI"))


ANSWER = re.compile(rf"(.+?) - ({'|'.join(KINDS)})(?:, |$)")


def load(folder: Path) -> pd.DataFrame:
    """The sentences of the artifact `ner-finance`: their words (`tokens`) and BIO tags (`tags`), both lists.

    Sentences whose entities can't be found among their words are left out; `frame.attrs["left_out"]` says how many.
    Raises EntityError for a file that is not the artifact's.
    """
    path = folder / "samples.jsonl"
    try:
        samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [(sample["input"][-1]["content"].split(), answers(sample["ideal"])) for sample in samples]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EntityError(f"{path}: is not the file of the artifact 'ner-finance' ({error}).") from error
    aligned = [(tokens, tags) for tokens, named in rows if (tags := align(tokens, named)) is not None]
    frame = pd.DataFrame(aligned, columns=["tokens", "tags"])
    frame.attrs["left_out"] = len(rows) - len(frame)
    return frame


def answers(ideal: str) -> list[tuple[str, str]]:
    """(name, kind) in order of appearance, from "[Bank - ORGANIZATION, …]"; names may hold commas and hyphens."""
    return ANSWER.findall(ideal[1:-1]) if ideal.startswith("[") else []


def align(tokens: Sequence[str], named: Iterable[tuple[str, str]]) -> list[str] | None:
    """BIO tags of the words: each entity at its first place after the one before it. None where one has no place."""
    tags, after = ["O"] * len(tokens), 0
    for name, kind in named:
        words = name.split()
        places = range(after, len(tokens) - len(words) + 1)
        start = next((i for i in places if list(tokens[i : i + len(words)]) == words), None)
        if start is None:
            return None
        after = start + len(words)
        tags[start:after] = [f"B-{kind}"] + [f"I-{kind}"] * (len(words) - 1)
    return tags


def split(frame: pd.DataFrame, seed: int = 0, test: float = 0.5, validation: float = 0.2) -> pd.DataFrame:
    """The frame with a column `split`: `test` of the sentences, and `validation` of the others.

    All copies of a sentence, whatever their case, come into one split. Sentences of one agreement come into several.
    """
    texts = frame["tokens"].map(" ".join).str.lower()
    order = np.random.default_rng(seed).permutation(sorted(set(texts)))
    tests = round(test * len(order))
    validations = round(validation * (len(order) - tests))
    names = np.repeat(["test", "validation", "train"], [tests, validations, len(order) - tests - validations])
    return frame.assign(split=texts.map(dict(zip(order, names, strict=True))))


def spans(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(kind, first, after the last) of the entities in BIO tags; an I- that continues nothing begins one."""
    start = 0
    for i, (before, tag) in enumerate(itertools.pairwise(["O", *tags, "O"])):
        goes_on = tag[0] == "I" and tag[2:] == before[2:]
        if before != "O" and not goes_on:
            yield before[2:], start, i
        if tag != "O" and not goes_on:
            start = i


def companies_of(tags: Sequence[str], places: Sequence[tuple[int, int]], text: str) -> list[Entity]:
    """The companies (ORGANIZATION) that BIO tags mark, where `places` are the words' offsets in `text`."""
    found = ((places[first][0], places[after - 1][1]) for kind, first, after in spans(tags) if kind == "ORGANIZATION")
    return [Entity("company", normal(text[start:end]), start, end) for start, end in found]


def annotated(tokens: Sequence[str], tags: Sequence[str]) -> tuple[str, list[Entity]]:
    """An annotated sentence as text, its words joined by spaces, and the companies in it."""
    ends = list(itertools.accumulate(len(token) + 1 for token in tokens))
    places = [(end - 1 - len(token), end - 1) for token, end in zip(tokens, ends, strict=True)]
    text = " ".join(tokens)
    return text, companies_of(tags, places, text)


# Rules


def listed(words: str) -> frozenset[str]:
    """A set of words from a line of them."""
    return frozenset(words.split())


LEGAL = listed(
    "inc incorporated corp corporation co company ltd limited plc ag sa nv bv oyj oy ab asa as a/s gmbh kg spa srl "
    "llc llp lp pty kk"
)


# Where nothing is capitalised, the others are ordinary words or initials.
UNCASED_LEGAL = LEGAL - {"company", "limited", "as", "lp", "kg"}


BOUNDS = LEGAL - {"as", "ab"}  # one name ends, the next may begin


GENERAL = listed("group holding holdings bank bancorp bancshares")


TITLE_WORDS = listed("group holding holdings")  # dropped from the end of a name, as legal forms are


# Words that no company's name begins with or goes across: closed classes, weekdays, months.
FUNCTION = listed(
    "a an the this that these those its his her their our my your and or but nor so if as at by for from in into of "
    "on off onto over per to up upon via with without under after before since until during through between against "
    "among about around because while when where which who whom whose what how than then there here not no it he she "
    "they we i you is are was were be been being has have had do does did will would could should may might can must "
    "shall also however meanwhile both each every any some all other another such only just still yet now today "
    "yesterday tomorrow more most less least very too own same few many several monday tuesday wednesday thursday "
    "friday saturday sunday january february march april june july august september october november december"
)


# Words that end the run before a legal form where nothing is capitalised: verbs, nouns and units of newswire.
NEWSWIRE = listed(
    "said says say told added reported reports announced expects expected sees plans set sets agreed agrees acquire "
    "acquires acquired acquiring buy buys buying bought sell sells selling sold cut cuts raise raises raised rises "
    "rise rose fell fall falls complete completes completed seek seeks seeking make makes made making take takes took "
    "taken get gets got hold holds held own owns owned controls controlled lead led formed named called include "
    "includes including signed approve approves approved declares declared splits ups hikes omits pays paid pay "
    "payable based listed privately publicly formerly previously jointly subject due results result lower higher "
    "better strong offered offers offer bid bids stake stakes share shares shr shrs avg stock stocks split dividend "
    "dividends payout div qtly qtr quarter quarterly year yr mths months month week weeks day days net loss losses "
    "profit profits earnings revs revenues sales income turnover pretax oper record note name reuter prior annual "
    "interim final initial regular extraordinary unit units subsidiary subsidiaries affiliate division divisions "
    "parent partner owner maker makers producer retailer operator supplier distributor rival giant firm firms company "
    "companies concern merger mergers acquisition acquisitions purchase purchases sale takeover buyout talks pact "
    "deal agreement accord contract venture proposal plan letter tender intent interest control president chairman "
    "director directors board shareholder shareholders holders spokesman analyst analysts official officials "
    "executive executives officer cents cent cts ct dlrs dlr dollars dollar mln billion bln pct percent stg pounds "
    "marks yen francs vs versus one two three four five six seven eight nine ten first-half st nd rd th jan feb mar "
    "apr jun jul aug sept sep oct nov dec meeting filing suit court joint wholly fully majority minority outstanding "
    "common preferred debt notes loan loans market price prices rate rates assets business businesses operations like "
    "against corrected full gain gains charge growth begins starts ends ended merge merges action row"
)


STOPS = FUNCTION | NEWSWIRE


# What does not name one bank or group, and is not again the company when it stands alone.
GENERIC = listed(
    "american british canadian japanese german west swiss french dutch italian european chinese foreign international "
    "national general united first new world central commercial investment investor banking savings state private "
    "public merchant federal reserve development export import major large larger big bigger leading industrial "
    "financial trading trade oil insurance food energy electronics brokerage lobby study working user age peer "
    "steering u s local regional small blood river parent consumer operating media industry borrower "
    "lender beneficiary intermediary agent"
)


LONGEST = 5  # words of a name before its legal form


OPERATION = listed("operation operate operated operative operatives owner owners founder chairman author")


WORD = re.compile(r"A/S\b|(?:[^\W\d_]\.){2,}|\w+(?:[&.-]\w+|['’](?!s\b)\w+)*|['’]s\b|[^\w\s]")


TICKER = re.compile(
    r"<(?!(?:PAGE|TABLE|CAPTION|TEXT|FN|S|C)>)([A-Z]{1,5})(?:\.[A-Z]{1,2})?>|"
    r"\b(?:NYSE|NASDAQ|Nasdaq|AMEX|LSE|TSX|OTC|HEL|OMX|FWB|ASX)\s?:\s?([A-Z]{1,5})\b"
)


def normal(name: str) -> str:
    """A company's name in lower case, single spaces and no legal form: "AKAMAI TECHNOLOGIES , INC" and "akamai
    technologies" are one.
    """
    words = [plain(word) for word in WORD.findall(name)]
    words = [word for word in words if word[0].isalnum() or word == "&"]
    while len(words) > 1 and words[-1] in LEGAL | TITLE_WORDS:
        words.pop()
    while len(words) > 1 and words[0] in ("the", "&"):
        words.pop(0)
    return " ".join(words) or name.lower()


def plain(word: str) -> str:
    """A word in lower case without apostrophes and an abbreviation's dots ("N.V." is "nv"; "amazon.com" stays)."""
    return re.sub(r"['’]|\.(?!\w\w)", "", word.lower()) or word


def is_cased(text: str) -> bool:
    """Whether case tells names from other words: not in lower-cased newswire, nor in a headline of capitals."""
    return text != text.lower() and text != text.upper()


def by_rules(text: str, amounts: bool = True) -> list[Entity]:
    """Companies by their legal form or ticker, currencies by their names, in order of appearance.

    A company is the run of words before a legal form (inc, corp, plc, ag, oyj, group, bank …) and any other place
    where the same name stands without it. In cased text the run is capitalised; elsewhere, as in lower-cased newswire
    without punctuation, it ends at function words and at words that newswire uses around names.

    Args:
        text: one document or sentence
        amounts: whether the currency of an amount counts ("5 mln dlrs", "$3"), which a text is hardly ever about
    """
    return resolve([*companies(text), *tickers(text), *currencies(text, amounts)])


def companies(text: str) -> list[Entity]:
    """The companies of `by_rules`, which may overlap."""
    cased = is_cased(text)
    words = [(match.group(), *match.span()) for match in WORD.finditer(text)]
    lower = [plain(word) for word, _, _ in words]
    found = {}
    for last, known in enumerate(lower):
        if not is_form(words[last][0], known, "".join(lower[last + 1 : last + 2]), cased):
            continue
        general, end = known in GENERAL | {"company"}, words[last][2]
        if cased and not general and last > 1 and lower[last - 1] == ",":
            last, end = last - 1, words[last - 2][2]  # "Inc" after a comma is outside the mention, as in the agreements
        elif last < len(words) - 1 and lower[last + 1] in UNCASED_LEGAL and text[end : words[last + 1][1]] == " ":
            end = words[last + 1][2]  # "co ltd"
        first = run(words, lower, last, cased)
        if first == last or lower[last - 1] == "of" or (general and GENERIC.issuperset(lower[first:last])):
            continue
        if not cased and known == "group" and last - first == 1:  # "entertainment group", as often as a name
            continue
        start = words[first][1]
        found[start, end] = Entity("company", normal(text[start:end]), start, end)
    return [*found.values(), *again(text, list(found.values()), cased)]


def is_form(word: str, known: str, following: str, cased: bool) -> bool:
    """Whether a word (`known` in its plain form) can end a company's name; "As" and the "co" of "co owner" can't."""
    if known not in GENERAL and known not in (LEGAL if cased else UNCASED_LEGAL):
        return False
    return word not in (known, "As") if cased else known != "co" or following not in OPERATION


def run(words: Sequence[tuple[str, int, int]], lower: Sequence[str], last: int, cased: bool) -> int:
    """Where the name that ends before word `last` begins; `last` itself where no name does."""
    first, floor = last, max(0, last - LONGEST)
    opening = -1  # newswire opens with its company: where the item's first word stands again, the name begins
    if not cased and lower[0] not in FUNCTION and lower[0] in lower[floor:last]:
        opening = last - 1 - lower[floor:last][::-1].index(lower[0])
    while first > floor and first != opening:
        word, known = words[first - 1][0], lower[first - 1]
        if known in BOUNDS:
            break
        if known == "s":  # "mcdonald's corp", but "britain's tesco plc"
            inside = first == last or opening >= 0
        elif cased:
            bank_of = known == "of" and "bank" in lower[max(0, first - 2) : first - 1]
            inside = bank_of or (word != word.lower() and known not in FUNCTION)
        else:
            linked = known in ("of", "and") and opening >= 0
            inside = word[0].isalpha() and (linked or first - 1 == opening or known not in STOPS)
        if not (inside or known == "&"):
            break
        first -= 1
    while first < last and lower[first] in ("of", "and", "&"):  # another name ends before the opening
        first += 1
    return first


def again(text: str, found: Sequence[Entity], cased: bool) -> Iterator[Entity]:
    """Other places where a company's name stands without its legal form."""
    for entity in {entity.name: entity for entity in found}.values():
        general = text[entity.start : entity.end].split()[-1].lower() in GENERAL
        if entity.name in GENERIC or (not cased and " " not in entity.name and (general or len(entity.name) < 4)):
            continue
        pattern = rf"(?<![\w&]){re.escape(entity.name)}(?![\w&])"
        for match in re.finditer(pattern, text, re.IGNORECASE):
            if not cased or match.group()[0].isupper() or match.group() in text[entity.start : entity.end]:
                yield Entity("company", entity.name, *match.span())


def tickers(text: str) -> list[Entity]:
    """Companies by ticker: "<IBM>", "<IBM.N>", "(NYSE: IBM)"; the name is the ticker in lower case."""
    return [
        Entity("company", match[match.lastindex].lower(), *match.span(match.lastindex))
        for match in TICKER.finditer(text)
    ]


CURRENCIES = {
    "canadian_dollar": r"(?:c|can|cdn)\$|cad",
    "australian_dollar": r"a\$|aud",
    "hong_kong_dollar": r"hk\$|hkd",
    "dollar": r"dollars?|dlrs?|usd|\$",
    "yen": r"yen|jpy|¥",
    "pound": r"pounds?(?: sterling)?(?! (?:of|per)\b)|(?<!\ba )sterling(?! (?:silver|performance))|stg|gbp|£",
    "mark": r"marks?(?! (?:of|out|down)\b)|deutsche?marks?|d-?marks?",
    "euro": r"euros?(?![ -]*(?:zone|area|bloc|bonds?|disney|cup|(?:19|20)\d\d)\b)|eur|€",
    "franc": r"francs?|chf",
    "yuan": r"yuan|renminbi|rmb|cny",
    "lira": r"lire|lira",
    "crown": r"crowns?|kron[aeo]r?|sek|nok|dkk",
    "peso": r"pesos?",
    "rupee": r"rupees?|inr",
    "rouble": r"roubles?|rubles?",
    "guilder": r"guilders?",
    "cruzado": r"cruzados?",
}


CURRENCY = re.compile(
    r"(?<![\w$€£¥])(?:(?P<country>canadian|australian|hong kong|new zealand|singapore|taiwan|swiss|french|belgian|"
    r"finnish|swedish|norwegian|danish|mexican|philippine|indian|turkish|italian)[ -]|"
    r"(?P<own>u\.? ?s\.? ?|us(?=\$)|american |british |deutsche |(?:west )?german |japanese |chinese ))?"
    rf"(?:{'|'.join(f'(?P<{name}>{pattern})' for name, pattern in CURRENCIES.items())})(?![^\W\d])",
    re.IGNORECASE,
)


AMOUNT = re.compile(r"(?:\d|\b(?:mln|bln|billion|million|trillion|bn|mn|mio|k|thousand|hundred))[ -]*$", re.IGNORECASE)


DOUBTFUL = listed("mark marks pound pounds crown crowns")


def currencies(text: str, amounts: bool = True) -> list[Entity]:
    """The currencies of a text, "canadian dollar" apart from "dollar"; `amounts` as in `by_rules`.

    "mark", "pound" and "crown" are other words too: they need a country, or an amount before the plural, or an article
    or another currency before the singular in a text that names a second currency.
    """
    matches = list(CURRENCY.finditer(text))
    certain = any(is_certain(match) for match in matches) or len({match.lastgroup for match in matches}) > 1
    found = []
    for match in matches:
        before = text[max(0, match.start() - 20) : match.start()].lower()
        amount = bool(AMOUNT.search(before)) or bool(re.match(r"\s?\d", text[match.end() :]))
        if not is_certain(match) and not is_meant(match.group().lower(), before, amount, certain):
            continue
        if amounts or not (amount or match.group().lower() in ("dlr", "dlrs", "stg")):
            kind = match.lastgroup.replace("_", " ")
            country = f"{match['country'].lower()} " if match["country"] else ""
            found.append(Entity("currency", country + kind, *match.span()))
    return found


def is_certain(match: re.Match) -> bool:
    """Whether a currency's word is no other word, or its country stands before it."""
    return bool(match["country"] or match["own"]) or match.group().lower() not in DOUBTFUL


def is_meant(word: str, before: str, amount: bool, certain: bool) -> bool:
    """Whether a doubtful word is a currency, by what stands before it and by whether others are named in the text."""
    if word.endswith("s"):
        return amount or (certain and bool(re.search(r"\b(?:in|for|into|to|against|from) $", before)))
    return certain and bool(re.search(r"(?:\b(?:the|against|dollar|yen|sterling|franc|and)|/)[ /-]*$", before))


def resolve(entities: Iterable[Entity]) -> list[Entity]:
    """Entities without overlaps, in order of appearance: of two that overlap the longer one stays, of two as long the
    one that was given first.
    """
    kept: list[Entity] = []
    for entity in sorted(entities, key=lambda e: e.start - e.end):
        if all(entity.end <= other.start or other.end <= entity.start for other in kept):
            kept.append(entity)
    return sorted(kept, key=lambda e: e.start)


# The token classifier

SPLIT = re.compile(r"\w+|[^\w\s]+")  # how the annotated sentences were split


def encode(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[Sequence[str]], max_length: int
) -> tuple[list[list[int]], list[int], list[list[int]]]:
    """Sentences that are split into words as rows of at most `max_length` word pieces; a long one fills several rows.

    Returns each row's word pieces, the number of its sentence, and for each piece the number of the word that begins
    with it, -1 where none does.
    """
    rows = tokenizer(
        [list(words) for words in sentences],
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
        return_overflowing_tokens=True,
    )
    source, opened, before = rows["overflow_to_sample_mapping"], [], None
    for row, sentence in enumerate(source):
        opens = []
        for word in rows.word_ids(row):
            opens.append(-1 if word is None or (sentence, word) == before else word)
            before = before if word is None else (sentence, word)
        opened.append(opens)
    return rows["input_ids"], source, opened


def learn(
    frame: pd.DataFrame,
    model: str = "minilm",
    epochs: int = 6,
    learning_rate: float = 5e-4,
    max_length: int = 128,
    precision: str = "auto",
    seed: int = 0,
    batch_tokens: int = 256,
    progress: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Fine-tunes an encoder with one linear layer on its token vectors to give each word its BIO tag.

    As in BERT's named entity recognition (Devlin et al. 2019, section 5.3) a word is judged by its first piece, by
    cross-entropy. Token embeddings stay as they were, there is no dropout. MiniLM's tokenizer lower-cases: capitals
    tell it nothing, and lower-cased newswire looks as cased text does.

    Args:
        frame: sentences with `tokens` and `tags`
        model: a registered model or a folder
        epochs: passes over the sentences; 0 gives the encoder with an untrained head
        learning_rate: its peak, after a tenth of the steps (1e-3 learned nothing on a validation of 116 sentences)
        max_length: word pieces of a row; longer sentences fill several
        batch_tokens: word pieces of a batch

    Raises EntityError where there are no sentences, or a tag is unknown.
    """
    if not len(frame):
        raise EntityError("There are no sentences to learn from.")
    if unknown := set(itertools.chain.from_iterable(frame["tags"])) - set(TAGS):
        raise EntityError(f"The tags {', '.join(sorted(unknown))} are unknown; use {', '.join(TAGS)}.")
    device, precision, _ = machine.device_and_precision(precision)
    machine.seed_everything(seed)
    folder = models.model_folder(model)
    classifier = AutoModelForTokenClassification.from_pretrained(
        folder,
        id2label=dict(enumerate(TAGS)),
        label2id={tag: i for i, tag in enumerate(TAGS)},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        use_safetensors=True,
        dtype=torch.float32,
    )
    classifier.base_model.embeddings.requires_grad_(False)
    classifier.to(device).train()
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=max_length)
    rows, source, opened = encode(tokenizer, frame["tokens"].tolist(), max_length)
    numbers = [[TAGS.index(tag) for tag in tags] for tags in frame["tags"]]
    labels = [
        [numbers[s][word] if word >= 0 else -100 for word in opens] for s, opens in zip(source, opened, strict=True)
    ]
    batches = trainer.TokenBudget([len(row) for row in rows], batch_tokens, seed)
    steps = epochs * len(batches)
    parameters = [p for p in classifier.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    order = itertools.chain.from_iterable(batches for _ in range(epochs))
    for chosen in tqdm(order, desc="token classifier", total=steps, leave=False, disable=not progress):
        batch = tokenizer.pad({"input_ids": [rows[i] for i in chosen]}, return_tensors="pt").to(device)
        target = torch.full(batch["input_ids"].shape, -100)
        for i, row in enumerate(chosen):
            target[i, : len(labels[row])] = torch.tensor(labels[row])
        with machine.autocast(device, precision):
            loss = classifier(**batch, labels=target.to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return classifier.eval(), tokenizer


@torch.inference_mode()
def predict_tags(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[Sequence[str]],
    precision: str = "auto",
    batch_tokens: int = 4096,
) -> list[list[str]]:
    """The BIO tags of sentences that are split into words."""
    tags = [["O"] * len(words) for words in sentences]
    if not any(tags):
        return tags
    device, precision, _ = machine.device_and_precision(precision)
    model.to(device).eval()
    rows, source, opened = encode(tokenizer, sentences, tokenizer.model_max_length)
    for chosen in trainer.TokenBudget([len(row) for row in rows], batch_tokens, None):
        batch = tokenizer.pad({"input_ids": [rows[i] for i in chosen]}, return_tensors="pt").to(device)
        with machine.autocast(device, precision):
            best = model(**batch).logits.argmax(dim=-1).tolist()
        for row, numbers in zip(chosen, best, strict=True):
            for word, number in zip(opened[row], numbers, strict=False):
                if word >= 0:
                    tags[source[row]][word] = model.config.id2label[number]
    return tags


def find(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], precision: str = "auto"
) -> list[list[Entity]]:
    """The companies that the token classifier finds in each text, of any length."""
    places = [[match.span() for match in SPLIT.finditer(text)] for text in texts]
    words = [[text[start:end] for start, end in spots] for text, spots in zip(texts, places, strict=True)]
    tags = predict_tags(model, tokenizer, words, precision)
    return [companies_of(*found) for found in zip(tags, places, texts, strict=True)]


def both(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], precision: str = "auto"
) -> list[list[Entity]]:
    """What rules or the token classifier find in each text; of two that overlap the longer one.

    For texts like those that the classifier learnt from: one of agreements marks common words of lower-cased newswire.
    """
    learnt = find(model, tokenizer, texts, precision)
    return [resolve([*by_rules(text), *others]) for text, others in zip(texts, learnt, strict=True)]


# Evaluation


def score(
    truth: Sequence[Iterable[Entity]], found: Sequence[Iterable[Entity]], kind: str = "company"
) -> dict[str, float]:
    """Precision, recall and F1 of entities with exactly the right place, over all texts; 0 where nothing is right.

    As in CoNLL-2003 (Tjong Kim Sang & De Meulder 2003), for one kind of entity.
    """

    def places(lists: Sequence[Iterable[Entity]]) -> set[tuple[int, int, int]]:
        return {(i, e.start, e.end) for i, entities in enumerate(lists) for e in entities if e.kind == kind}

    true, said = places(truth), places(found)
    right = len(true & said)
    precision, recall = right / max(len(said), 1), right / max(len(true), 1)
    return {"precision": precision, "recall": recall, "f1": 2 * right / max(len(said) + len(true), 1)}


# What a text says about one entity

WINDOW = 20  # words on either side of a mention, where there are no sentences


STOP = re.compile(r"""[.!?]["'”’)\]]*(?=\s+["'“‘(\[]*[A-Z0-9])|\n\s*\n""")


ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|No|vs|Jan|Feb|Aug|Sept|Oct|Nov|Dec|approx|e\.g|i\.e)|\b[A-Z])$")


FORM = re.compile(r"\b(?:Inc|Corp|Co|Ltd|Cos|plc|U\.S|U\.K|S\.A|N\.V)$")


def sentences(text: str) -> list[tuple[int, int]]:
    """The (start, end) of the sentences of a cased text.

    One ends at . ! or ? before a capital or a digit, but not after an abbreviation or an initial; after a legal form
    only before a word that begins sentences ("Nokia Corp. The company", but "Nokia Corp. Chairman").
    """
    ends = []
    for match in STOP.finditer(text):
        before = text[: match.start()]
        next_word = WORD.search(text, match.end())
        if ABBREVIATION.search(before) and text[match.start()] == ".":
            continue
        if FORM.search(before) and next_word and next_word.group().lower() not in FUNCTION:
            continue
        ends.append(match.end())
    cuts = [0, *ends, len(text)]
    stripped = (re.search(r"\S(?:.*\S)?", text[a:b], re.DOTALL) for a, b in itertools.pairwise(cuts))
    return [(a + match.start(), a + match.end()) for a, match in zip(cuts, stripped, strict=False) if match]


def windows(text: str, entities: Iterable[Entity]) -> list[tuple[int, int]]:
    """The (start, end) of `WINDOW` words before and after each mention, those that overlap joined."""
    joined: list[tuple[int, int]] = []
    for entity in sorted(entities, key=lambda e: e.start):
        left = [word.start() for word in re.finditer(r"\S+", text[: entity.start])][-WINDOW:]
        right = [word.end() for word in itertools.islice(re.finditer(r"\S+", text[entity.end :]), WINDOW)][-1:]
        start, end = min([*left, entity.start]), entity.end + sum(right)
        if joined and start <= joined[-1][1]:
            start, end = joined[-1][0], max(end, joined.pop()[1])
        joined.append((start, end))
    return joined


def about(text: str, entities: Sequence[Entity]) -> dict[tuple[str, str], list[str]]:
    """The passages of a text that name an entity: (kind, name) -> passages in order.

    A passage is a sentence where the text is cased; lower-cased newswire has no sentence ends, and there it is a window
    of 20 words on either side. A passage that names two entities is given for both.
    """
    bounds = sentences(text) if is_cased(text) else []
    passages = {}
    for key in dict.fromkeys((entity.kind, entity.name) for entity in entities):
        mentions = [entity for entity in entities if (entity.kind, entity.name) == key]
        places = [(a, b) for a, b in bounds if any(a < m.end and m.start < b for m in mentions)]
        passages[key] = [text[start:end] for start, end in places or windows(text, mentions)]
    return passages
