"""Sentences and labels, questions and answers, and where models and data come from."""
