"""03_evaluate: metrics, robustness, explanation, drift, active learning."""
