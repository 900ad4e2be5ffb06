"""Replies: sentences of passages, or a small generator whose sentences are checked against the passages."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from llmprod import artifacts, machine, models, segment
from llmprod.customer_service import phrases
from llmprod.customer_service.desk import SENTENCE_END, Passage
from llmprod.finetune import loop

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
NEGATION = re.compile(
    r"\b(?:no|not|nothing|never|none|nor|neither|without|cannot|except|unless)\b|n['’]t\b|[不没无未非别]", re.IGNORECASE
)
QUANTITY = re.compile(
    rf"({NUMBER.pattern})[ -]?(?:(%|(?:percent|(?:working )?days?|weeks?|months?|years?|hours?|minutes?|euros?|eur)\b)|"
    r"个?(工作日|天|周|星期|月|年|小时|分钟|欧元?))",
    re.IGNORECASE,
)
ALIKE = {"eur": "euro", "percent": "%", "工作日": "天", "星期": "周", "欧": "欧元"}  # units that are compared as one


@dataclass(frozen=True)
class Sentence:
    """A sentence of a reply with the id of the passage behind it; "" for fixed words of ours."""

    text: str
    passage: str = ""


# Extractive: what is said is what an article says


def extract(
    question: str,
    passages: Sequence[Passage],
    rank: Callable[[str, Sequence[str]], np.ndarray],
    most: int = 2,
    margin: float = 2.0,
) -> list[Sentence]:
    """The sentences of passages that answer best, at most `most`, in the order of the passages.

    `rank` gives the logit of each text that it answers the question; further sentences are those within `margin` of
    the best one.
    """
    every = [(sentence, passage) for passage in passages for sentence in passage.sentences()]
    if not every:
        return []
    scores = rank(question, [f"{passage.title}: {sentence}" for sentence, passage in every])
    best = [n for n in np.argsort(-scores, kind="stable")[:most] if scores[n] >= scores.max() - margin]
    return [Sentence(every[n][0], every[n][1].id) for n in sorted(best)]


def contradicted(question: str, reply: str) -> bool:
    """Whether the question names a quantity (90 days) of a kind for which the reply has only others (30 days)."""

    def quantities(text: str) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for number, *units in QUANTITY.findall(text):
            unit = max(units).lower().removeprefix("working ").rstrip("s")
            found.setdefault(ALIKE.get(unit, unit), set()).add(number)
        return found

    said = quantities(reply)
    return any(unit in said and not numbers & said[unit] for unit, numbers in quantities(question).items())


# Generated: what is said is checked


@dataclass
class Generator:
    """A causal language model that writes replies, deterministically."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, name: str) -> "Generator":
        """A registered model (its GGUF file, turned into float32) or a folder with safetensors. Raises ModelError."""
        device, _, _ = machine.device_and_precision("fp32")
        registered = name in artifacts.registry()
        folder = artifacts.fetch(name) if registered else models.model_folder(name)
        gguf = next((path.name for path in Path(folder).glob("*.gguf")), None)
        settings = {"gguf_file": gguf} if gguf else {}
        model = models.read(AutoModelForCausalLM, folder, **settings)
        tokenizer = models.read_tokenizer(folder, model.config.vocab_size, padding_side="left", **settings)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return cls(model.to(device).eval(), tokenizer)

    def prompt(self, question: str, passages: Sequence[Passage]) -> str:
        """The chat up to the reply; the pages and the question are quoted as data."""
        pages = "\n".join(f"- {passage.indexed}" for passage in passages)
        words = phrases.of(segment.language_of([pages])).prompt
        said = [
            {"role": "system", "content": words["system"]},
            {"role": "user", "content": f"{words['pages']}\n{pages}\n\n{words['question']} {question}"},
        ]
        return self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)

    @torch.inference_mode()
    def write(
        self, questions: Sequence[str], passages: Sequence[Sequence[Passage]], tokens: int = 64, batch_size: int = 8
    ) -> list[str]:
        """A reply to each question from its passages: greedy decoding, at most `tokens` tokens."""
        prompts, replies = [self.prompt(*one) for one in zip(questions, passages, strict=True)], []
        for start in range(0, len(prompts), batch_size):
            batch = self.tokenizer(
                prompts[start : start + batch_size], return_tensors="pt", padding=True, truncation=True, max_length=1024
            )
            batch = batch.to(self.model.device)
            found = self.model.generate(
                **batch, max_new_tokens=tokens, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
            )
            replies += self.tokenizer.batch_decode(found[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [reply.strip() for reply in replies]


def tune(
    generator: Generator,
    questions: Sequence[str],
    passages: Sequence[Sequence[Passage]],
    answers: Sequence[str],
    steps: int = 40,
    batch_size: int = 4,
    learning_rate: float = 5e-4,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Fine-tunes a generator with LoRA, in place, to write the answers that people gave; returns the loss of each step.

    The loss counts the answer's tokens alone. LoRA: Hu et al. 2021; library `peft`.
    """
    machine.seed_everything(seed)
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    generator.model = get_peft_model(generator.model, settings)
    tokenizer, rows = generator.tokenizer, []
    for question, some, answer in zip(questions, passages, answers, strict=True):
        before = tokenizer(generator.prompt(question, some))["input_ids"][-640:]
        after = [*tokenizer(answer)["input_ids"][:120], tokenizer.eos_token_id]
        rows.append((before, after))
    random = np.random.default_rng(seed)

    def loss(chosen: np.ndarray) -> torch.Tensor:
        longest = max(len(rows[n][0]) + len(rows[n][1]) for n in chosen)
        ids = torch.full((len(chosen), longest), tokenizer.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, n in enumerate(chosen):
            before, after = rows[n]
            size = len(before) + len(after)
            ids[row, :size], mask[row, :size] = torch.tensor(before + after), 1
            labels[row, len(before) : size] = torch.tensor(after)
        device = generator.model.device
        return generator.model(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)).loss

    batches = (random.choice(len(rows), min(batch_size, len(rows)), replace=False) for _ in range(steps))
    losses = loop.train(generator.model, batches, loss, steps, learning_rate, progress="training" if progress else "")
    generator.model = generator.model.merge_and_unload().eval()
    return losses


def content(text: str) -> set[str]:
    """The words of a text that carry meaning, cut to six letters, so that *refunded* and *refund* are one.

    Of scripts without spaces, pairs of characters.
    """
    return {word.lower()[:6] for word in WORD.findall(segment.pairs(text)) if word.lower() not in ENGLISH_STOP_WORDS}


def support(sentence: str, passages: Sequence[Passage], overlap: float = 0.6) -> str:
    """The id of the passage that supports a sentence, or "": a literal check, since overlap alone takes 60 for 30 days.

    The passage's nearest sentence, with its neighbours, must hold `overlap` of the content words and all numbers and
    dates, and be negated if and only if the sentence is.
    """
    words, numbers = content(sentence), set(NUMBER.findall(sentence))
    for passage in passages if words else ():
        parts = passage.sentences()
        best = max(range(len(parts)), key=lambda n: len(words & content(parts[n])))
        near = " ".join(parts[max(0, best - 1) : best + 2])
        shared = len(words & content(f"{passage.title} {near}")) / len(words)
        same_sense = bool(NEGATION.search(sentence)) == bool(NEGATION.search(parts[best]))
        if shared >= overlap and numbers <= set(NUMBER.findall(near)) and same_sense:
            return passage.id
    return ""


def checked(reply: str, passages: Sequence[Passage]) -> tuple[list[Sentence], list[str]]:
    """The sentences of a generated reply that a passage supports, each with its passage, and those dropped."""
    kept, dropped, refusals = [], [], [phrases.of(language).prompt["unknown"] for language in phrases.LANGUAGES]
    for sentence in (part.strip() for part in SENTENCE_END.split(reply) if part.strip()):
        refused = any(words in sentence.lower().replace("’", "'") for words in refusals)
        behind = "" if refused else support(sentence, passages)
        if behind:
            kept.append(Sentence(sentence, behind))
        else:
            dropped.append(sentence)
    return kept, dropped
