"""Reproduction of arXiv 2601.07389: why supervised fine-tuning and RL after pre-training do not decouple."""
