"""Explanations: token attributions and their faithfulness."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from captum.attr import LayerIntegratedGradients
from scipy.special import softmax

from llmprod import segment
from llmprod.models import Predictor


def attribute(predictor: Predictor, text: str, target: int, steps: int = 32) -> tuple[list[str], np.ndarray, float]:
    """Integrated gradients of a class's logit with respect to the token embeddings (Sundararajan et al. 2017).

    The path runs from [PAD] in every place (first and last token kept) to the text, in `steps` steps; the attribution
    of a token is the sum over its dimensions.

    Returns the tokens without the first and last, their attributions, and the completeness error: the sum of all
    attributions less the difference in the logit between both ends of the path.
    """
    classifier, tokenizer = predictor.model.to(predictor.device).eval(), predictor.tokenizer
    ids = tokenizer(text, truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt")["input_ids"]
    ids = ids.to(predictor.device)
    baseline = ids.clone()
    baseline[:, 1:-1] = tokenizer.pad_token_id
    mask = torch.ones_like(ids)

    def logits(numbers: torch.Tensor) -> torch.Tensor:
        return classifier(input_ids=numbers, attention_mask=mask.expand(len(numbers), -1)).logits

    method = LayerIntegratedGradients(logits, classifier.encoder.embeddings)
    found, error = method.attribute(
        ids, baseline, target=target, n_steps=steps, internal_batch_size=steps, return_convergence_delta=True
    )
    scores = found.sum(dim=-1)[0, 1:-1].detach().cpu().numpy()
    return tokenizer.convert_ids_to_tokens(ids[0, 1:-1].tolist()), scores, float(error)


def coloured(tokens: Sequence[str], scores: np.ndarray) -> str:
    """The text as HTML: blue tokens speak for the class, orange ones against it, white ones do not matter."""
    largest = np.abs(scores).max(initial=0) or 1.0
    parts = []
    for token, score in zip(tokens, scores, strict=True):
        colour = "11,110,153" if score > 0 else "224,122,31"
        gap, word = ("", token[2:]) if token.startswith("##") else (" ", token)
        style = f"background:rgba({colour},{0.75 * abs(score) / largest:.2f});padding:1px 0"
        parts.append(f'{gap}<span style="{style}" title="{score:+.3f}">{html.escape(word)}</span>')
    return f'<div style="line-height:1.8">{"".join(parts).strip()}</div>'


def faithfulness(
    predictor: Predictor,
    tokens: Sequence[Sequence[str]],
    rankings: Sequence[np.ndarray],
    targets: Sequence[int],
    share: float = 0.2,
) -> tuple[np.ndarray, np.ndarray]:
    """Comprehensiveness and sufficiency of rankings of tokens, one value a text (DeYoung et al. 2020).

    Args:
        tokens: the tokens of each text, as `attribute` gives them
        rankings: a score for each token; the `share` with the highest is the explanation
        targets: the class explained

    Comprehensiveness is how much of the class's probability is lost when the explanation is left out (more is better),
    sufficiency how much is lost when only the explanation is kept (less is better). Compare with random rankings.
    """
    join = predictor.tokenizer.convert_tokens_to_string
    whole, without, only = [], [], []
    for words, scores in zip(tokens, rankings, strict=True):
        top = set(np.argsort(-np.asarray(scores), kind="stable")[: max(1, round(share * len(words)))].tolist())
        whole.append(join(list(words)))
        without.append(join([w for i, w in enumerate(words) if i not in top]))
        only.append(join([w for i, w in enumerate(words) if i in top]))
    logits = replace(predictor, precision="fp32").predict([*whole, *without, *only])
    probabilities = softmax(logits.astype(float), axis=1)
    full, removed, kept = (p[np.arange(len(targets)), targets] for p in np.split(probabilities, 3))
    return full - removed, full - kept


def strongest_words(
    tokens: Sequence[Sequence[str]], attributions: Sequence[np.ndarray], targets: Sequence[int], count: int = 5
) -> dict[int, list[str]]:
    """For each class explained the `count` words that speak most for it; no entry where its texts have no word.

    A word has more than two letters, or is a character of a script without spaces; where a class has none, any is one.
    """
    found: dict[int, list[tuple[float, str]]] = {}
    for words, values, target in zip(tokens, attributions, targets, strict=True):
        said = [(float(value), word) for value, word in zip(values, words, strict=True) if word.isalpha()]
        found.setdefault(int(target), []).extend(said)
    strongest = {}
    for target, said in found.items():
        long = [(value, word) for value, word in said if len(word) > 2 or segment.CHARACTER.match(word)]
        if said:
            strongest[target] = list(dict.fromkeys(word for _, word in sorted(long or said, reverse=True)))[:count]
    return strongest


def counterfactuals(
    tokens: Sequence[Sequence[str]],
    rankings: Sequence[np.ndarray],
    targets: Sequence[int],
    strongest: Mapping[int, Sequence[str]],
) -> tuple[list[list[str]], list[int]]:
    """Each text once for every other class, its first fifth by ranking (or more) replaced by that class's words.

    `strongest` are the words of each class, as `strongest_words` finds them. Returns the tokens of the edited texts and
    the classes that they should now belong to.
    """
    edited, wanted = [], []
    for words, ranking, target in zip(tokens, rankings, targets, strict=True):
        for other in (k for k in strongest if k != target):
            places = np.argsort(-ranking, kind="stable")[: max(len(strongest[other]), len(words) // 5)]
            swapped = list(words)
            for turn, place in enumerate(places):
                swapped[place] = strongest[other][turn % len(strongest[other])]
            edited.append(swapped)
            wanted.append(other)
    return edited, wanted
