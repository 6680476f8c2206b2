"""What results are called where people read them: a column's name in files, and its words in tables and figures."""

from typing import Any

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

WORDS = {
    # of a policy
    "n": "sentences",
    "sft_loss": "SFT loss",
    "label_mass": "p(either answer)",
    "reward_exact": "reward, sampled",
    "reward_sampled": "reward, one sample",
    "reward_sampled_strict": "reward, one sample, strict",
    "reward_greedy": "reward, greedy",
    "majority_reward": "majority answer",
    "majority_share": "says it to",
    "balanced_accuracy": "balanced accuracy",
    "mcc": "MCC",
    "auroc": "AUROC",
    "temperature": "best temperature",
    "predicted_acceptable_rate": "says acceptable to",
    "kl_to_parent": "KL to the start",
    # of a corpus
    "share_acceptable": "share acceptable",
    # of a step of training
    "kl": "KL to the start",
    "frac_reward_zero_std": "groups all alike",
    "grad_norm": "gradient norm",
    "rewards/off_format/mean": "off format",
    # of a reward model
    "majority": "majority label",
    "margin": "mean margin",
    "pair_loss": "loss of a pair",
    # of gradients
    "loss": "SFT loss",
    "best_loss": "least SFT loss",
    "loss_gradient": "length of ∇L",
    "reward_gradient": "length of ∇J",
    "cosine_split": "cosine, split",
    "cosine_shuffled": "cosine, shuffled",
}
COUNTS = ("n", "step", "sentences", "acceptable")


def for_reading(table: pd.DataFrame, name: str, digits: int = 3) -> Styler:
    """``table`` with columns and index in words: numbers to ``digits``, counts whole, text at the left, no NaN.

    ``name`` is that of the table on its page.
    """
    counts = [column for column in table if column in COUNTS]
    text = [place for place, column in enumerate(table) if table[column].dropna().map(type).eq(str).all()]
    styled = table.style.format(precision=digits, na_rep="–")
    styled = styled.format("{:,.0f}", subset=counts, na_rep="–") if counts else styled
    styled = styled.format_index(in_words, axis=0).format_index(in_words, axis=1)
    at_the_left = ", ".join(["th.row_heading", *(f".col{place}" for place in text)])
    return styled.set_table_styles([{"selector": at_the_left, "props": "text-align: left"}]).set_uuid(name)


def in_words(name: Any) -> str:
    """What readers call the column ``name``; itself if it has no other name."""
    return WORDS.get(name, str(name))


def cost_of_training(training: dict[str, Any]) -> pd.DataFrame:
    """A stage's cost for reading: steps, seconds, memory, and what was trained, as text."""
    words = {
        "steps": f"{training['steps']:,}",
        "seconds": f"{training['wall_seconds']:.1f}, {training['evaluation_seconds']:.1f} of them for measurements",
        "samples per second": f"{training['samples_per_second']:.0f}",
        "peak memory": f"{training['peak_memory_bytes'] / 2**30:.2f} GiB",
        "trained parameters": f"{training['trained_parameters']:,} of {training['parameters']:,}",
    }
    if not np.isnan(silent := training.get("silent_group_share", np.nan)):
        words["groups whose answers earned all the same"] = f"{silent:.0%}"
    return pd.Series(words, name="training").to_frame()
