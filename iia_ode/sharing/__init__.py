"""Sharing fitted solvers: reports, notes, the range of guidance scales, model cards, and the Hugging Face hub."""
