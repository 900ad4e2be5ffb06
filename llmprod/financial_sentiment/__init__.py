"""12_financial_sentiment: the sentiment of sentences, with and without labels."""
