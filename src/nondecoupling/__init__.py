"""Reproduction of arXiv 2601.07389: why supervised fine-tuning and RL after pre-training do not decouple.

Six rooms, each of which imports only from those before it: ``study`` (what is run, and where its results are), ``task``
(sentences, questions, answers), ``training`` (a file per stage) and ``analysis`` (tables in, rows out), ``pages`` (what
a reader sees), ``workflow`` (make, kernels, clusters).
"""
