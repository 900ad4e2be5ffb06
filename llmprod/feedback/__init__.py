"""06_feedback: answers and what people say of them, reviews, learning without forgetting, promotion."""
