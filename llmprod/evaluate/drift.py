"""Data drift: does the input still look like the training data?"""

import numpy as np
import pandas as pd
from scipy.stats import chi2_contingency, false_discovery_control, ks_2samp

from llmprod import LLMProdError


def drift(reference: pd.DataFrame, current: pd.DataFrame, level: float = 0.05, least: float = 0.1) -> pd.DataFrame:
    """Tests for data drift: one for each column that both tables share, documents in rows.

    Numbers: Kolmogorov and Smirnov's test, whose effect is the largest distance between the distributions (0 to 1).
    Other columns: chi², with the values of fewer than 10 documents joined into one; the effect is Cramér's V (0 to 1).
    `drifted` needs an effect of at least `least`, because with many documents everything is significant, and a false
    discovery rate (Benjamini & Hochberg 1995) of at most `level` over all columns.

    Returns test, effect, p, `adjusted p` and drifted, by column. Raises LLMProdError where there is nothing to compare.
    """
    rows, names = {}, reference.columns.intersection(current.columns)
    if names.empty:
        raise LLMProdError("The two tables share no column.")
    for name in names:
        old, new = reference[name].dropna(), current[name].dropna()
        if old.empty or new.empty:
            raise LLMProdError(f"The column '{name}' has no values in one of the tables; leave it out.")
        if pd.api.types.is_numeric_dtype(old) and not pd.api.types.is_bool_dtype(old):
            effect, p = ks_2samp(old, new, method="asymp")
            rows[name] = ("Kolmogorov-Smirnov", float(effect), float(p))
            continue
        values = pd.concat([old, new]).astype(str)
        values = values.where(values.map(values.value_counts()) >= 10, "(rare)")
        counts = pd.crosstab(values.to_numpy(), np.repeat([0, 1], [len(old), len(new)]))
        chi2, p, *_ = chi2_contingency(counts, correction=False)
        rows[name] = ("chi²", float(np.sqrt(chi2 / len(values))), float(p))
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["test", "effect", "p"])
    table["adjusted p"] = false_discovery_control(table["p"])
    return table.assign(drifted=(table["adjusted p"] <= level) & (table["effect"] >= least))
