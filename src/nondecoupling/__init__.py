"""Reproduction of arXiv 2601.07389: why supervised fine-tuning and RL after pre-training do not decouple."""

import gc
import logging
import os
import warnings

# What the pinned libraries say on every import or start, about nothing that is used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # kernels for 4-bit weights are missing
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func may change in later versions of trl
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)  # trl uses the old name

# Importing torch, transformers and trl makes 600,000 objects that stay. Looking for garbage among them after every 700
# new ones, which is the default, takes a fifth of the import's time.
gc.set_threshold(100_000)
