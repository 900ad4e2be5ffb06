"""13_recommendation: text-aware recommendation."""
