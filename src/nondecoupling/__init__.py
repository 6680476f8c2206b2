"""Reproduction of arXiv 2601.07389: why supervised fine-tuning and RL after pre-training do not decouple."""

import logging
import os
import warnings

# What the pinned libraries say on every import or start, about nothing that is used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # kernels for 4-bit weights are missing
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func may change in later versions of trl
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)  # trl uses the old name
