"""Where RL was to land and where it did, what decoding gets without it, and theory.json, which says both."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq, minimize_scalar
from scipy.special import expit, logit

from nondecoupling.analysis import theory
from nondecoupling.analysis.identities import identity_gaps
from nondecoupling.analysis.predictions import label_log_odds
from nondecoupling.analysis.statistics import over_seeds
from nondecoupling.analysis.sweep import summarise_sweep
from nondecoupling.study.contracts import Decoding, Landing, Point, TheoryFile
from nondecoupling.study.plan import STATES
from nondecoupling.study.profile import Profile
from nondecoupling.study.results import Results

EXAMPLE_Q, EXAMPLE_BETA = 0.9, 0.5  # shown where a study's own q is unknown or its beta is 0

Decoder = Callable[[np.ndarray], np.ndarray]  # log-odds of the policy to log-odds of its answers

SAMPLED: Decoder = np.asarray
GREEDY: Decoder = partial(theory.tempered_log_odds, temperature=0)


def point_of(log_odds: np.ndarray, labels: pd.Series) -> Point:
    """A policy's loss and reward on the labels as given."""
    return {
        "loss": theory.loss_on_labels(log_odds, labels),
        "reward": theory.reward_on_labels(log_odds, labels),
    }


def landings(results: Results) -> list[Landing]:
    """One entry per seed for `sft-rl`, which starts from the measured `sft`, and for `rl`, from the measured base."""
    records = []
    q = results.study.profile.data.agreement
    for name in ("sft-rl", "rl"):
        run = results.study.run(name)
        beta, parent = results.study.settings_of(run).rl.beta, str(run.parent)
        for seed in results.seeds:
            start, end = (results.answers_of(policy, seed) for policy in (parent, name))
            before, labels = label_log_odds(start), start["label"]
            knows = q is not None and beta > 0
            tilted = theory.tilted_log_odds(before, start["truth"].astype(int), 1 - (q or 1), beta) if knows else None
            believed = theory.self_tilted_log_odds(before, beta) if beta > 0 else None
            record: Landing = {
                "run": name,
                "seed": seed,
                "parent": parent,
                "beta": beta,
                "tilted": None if tilted is None else point_of(tilted, labels),
                "self_tilted": None if believed is None else point_of(believed, labels),
                "start": point_of(before, labels),
                "measured": point_of(label_log_odds(end), end["label"]),
            }
            records.append(record)
    return records


def landed(results: Results) -> pd.DataFrame:
    """``run, seed, loss, reward, greedy`` of the policies of both experiments, on the dev labels as given."""
    rows = []
    for run in STATES:
        for seed in results.seeds:
            answers = results.answers_of(run, seed)
            log_odds, labels = label_log_odds(answers), answers["label"]
            greedy = theory.reward_on_labels(GREEDY(log_odds), labels)
            rows.append({"run": run, "seed": seed, **point_of(log_odds, labels), "greedy": greedy})
    return pd.DataFrame(rows)


def train_against_dev(results: Results) -> dict[str, np.ndarray]:
    """Change of L from `sft` to `sft-rl`, (seeds,): as measured on each side, and for the same SFT policies on dev what
    ideal RL would do if it predicts labels (own belief) and if it remembers every label that it was paid for."""
    found, beta = {}, results.study.profile.rl.beta
    for split in results.study.profile.evaluation.splits:
        ends = (results.final(run, split=split).set_index("seed")["label_loss"] for run in ("sft-rl", "sft"))
        found[f"measured on {split}"] = np.subtract(*ends)
    predicts, remembers = [], []
    for seed in results.seeds if beta > 0 else []:
        answers = results.answers_of("sft", seed)
        before, labels = label_log_odds(answers), answers["label"]
        start = theory.loss_on_labels(before, labels)
        predicts.append(theory.loss_on_labels(theory.self_tilted_log_odds(before, beta), labels) - start)
        remembers.append(theory.loss_on_labels(theory.tilted_log_odds(before, labels, 0.0, beta), labels) - start)
    ideal = {"ideal, predicts": np.array(predicts), "ideal, remembers": np.array(remembers)}
    return {name: np.asarray(change) for name, change in (found | ideal).items() if len(change)}


def beta_at(q: float, loss: float) -> float | None:
    """The beta at which ideal RL from the calibrated policy has this SFT loss; None where no beta brings it there."""
    if not theory.calibrated_loss(q) + 1e-3 <= loss <= theory.rl_loss(q, 1e-3):
        return None
    return float(np.exp(brentq(lambda x: theory.rl_loss(q, np.exp(x)) - loss, np.log(1e-3), np.log(1e3))))


# Test time


def decoded_rewards(results: Results, run: str, decode: Decoder = SAMPLED) -> np.ndarray:
    """J of each seed's policy on dev with its answers given by ``decode``, (seeds,)."""
    policies = [results.answers_of(run, seed) for seed in results.seeds]
    return np.array([theory.reward_on_labels(decode(label_log_odds(a)), a["label"]) for a in policies])


def losses(results: Results, run: str) -> np.ndarray:
    """L of each seed's policy on dev, (seeds,); no decoder changes it."""
    policies = [results.answers_of(run, seed) for seed in results.seeds]
    return np.array([theory.loss_on_labels(label_log_odds(a), a["label"]) for a in policies])


def sharpening(log_odds: np.ndarray, labels: pd.Series, loss: float) -> tuple[float, float]:
    """The temperature of least loss of a policy, and the lower one at which it has ``loss`` (nan if there is none)."""

    def excess(log_t: float) -> float:
        return theory.loss_on_labels(theory.tempered_log_odds(log_odds, np.exp(log_t)), labels) - loss

    best = minimize_scalar(excess, bounds=(-3, 3), method="bounded")
    crossed = best.fun < 0 < excess(-9)
    return float(np.exp(best.x)), float(np.exp(brentq(excess, -9, best.x))) if crossed else np.nan


def sharpened_alike(results: Results) -> pd.DataFrame:
    """By seed: the SFT policy made as sharp, by one temperature, as costs the loss that RL ended with, beside RL.

    Columns "T of least L", "T at RL's L", "L", "J, SFT at T", "J, RL" and their "difference" (nan where RL's loss lies
    below all that any temperature gives).
    """
    rows = []
    ends = losses(results, "sft-rl"), decoded_rewards(results, "sft-rl")
    for seed, loss, reward in zip(results.seeds, *ends, strict=True):
        answers = results.answers_of("sft", seed)
        log_odds, labels = label_log_odds(answers), answers["label"]
        least, t = sharpening(log_odds, labels, loss)
        on_curve = np.nan if np.isnan(t) else theory.reward_on_labels(log_odds / t, labels)
        found = {"T of least L": least, "T at RL's L": t, "L": loss, "J, SFT at T": on_curve, "J, RL": reward}
        rows.append({"seed": seed, **found, "difference": reward - on_curve})
    return pd.DataFrame(rows).set_index("seed")


def decoding(results: Results) -> Decoding:
    """What decoding gets from the SFT policy, next to what RL gets by training it."""
    sampled, greedy = decoded_rewards(results, "sft"), decoded_rewards(results, "sft", GREEDY)
    gain = decoded_rewards(results, "sft-rl") - sampled
    decoders = {"greedy": GREEDY} | {
        f"majority of {k}": partial(theory.majority_log_odds, samples=k) for k in (3, 9, 33)
    }
    gained = gain.min() > 0
    by_seed = {
        name: (decoded_rewards(results, "sft", decode) - sampled) / gain for name, decode in decoders.items() if gained
    }
    difference = sharpened_alike(results)["difference"]
    return {
        "gain_of_reward": over_seeds(gain),
        "rise_of_loss": over_seeds(np.subtract(losses(results, "sft-rl"), losses(results, "sft"))),
        "shares": {name: {"seeds": share.tolist(), **over_seeds(share)} for name, share in by_seed.items()},
        "gain_of_greedy_reward": over_seeds(decoded_rewards(results, "sft-rl", GREEDY) - greedy),
        "above_temperature_curve": over_seeds(difference) if difference.notna().all() else None,
    }


# theory.json


def example_values(profile: Profile) -> tuple[float, float]:
    """q and beta to illustrate with: the study's own where q is known and beta is not 0, else an example's."""
    return profile.data.agreement or EXAMPLE_Q, profile.rl.beta or EXAMPLE_BETA


def fixed_points(profile: Profile) -> dict[str, Any]:
    """Where ideal RL, and each variant of GRPO, comes to rest from the calibrated policy."""
    (q, beta), answers = example_values(profile), profile.rl.answers_per_prompt
    q = min(q, 0.99)  # a certain label has no finite log-odds
    scaled = beta * (answers - 1) / answers
    variants: dict[str, tuple[float, dict[str, bool]]] = {
        "ideal RL; normalisation: none": (scaled, {}),
        "(i) beta as it is": (beta, {}),
        "(i), (ii); normalisation: group": (beta, {"normalised": True}),
        "(iii), with (i) undone": (scaled, {"corrected": False}),
        "(i), (ii), (iii)": (beta, {"normalised": True, "corrected": False}),
    }
    found = {}
    for name, (given, options) in variants.items():
        odds = float(theory.grpo_log_odds(logit(q), q, given, answers, **options))
        loss = theory.expected_loss([odds], [1], 1 - q)
        found[name] = {
            "log-odds": odds,
            "p": float(expit(odds)),
            "effective beta": 2 * (2 * q - 1) / (odds - float(logit(q))),
            "L": loss,
            "rise of L": loss - float(theory.calibrated_loss(q)),
            "J": theory.expected_reward_of_odds([odds], [1], 1 - q),
        }
    return {"q": q, "beta": beta, "answers": answers, "variants": found}


def theory_file(results: Results, per_seed: pd.DataFrame | None) -> TheoryFile:
    """The content of theory.json; ``per_seed`` is `sweep.confront_sweep`'s table, None where there is no sweep."""
    profile = results.study.profile
    q, beta = profile.data.agreement, profile.rl.beta
    rl = None if q is None or beta == 0 else (float(theory.rl_loss(q, beta)), float(theory.rl_reward(q, beta)))
    calibrated_loss = None if q is None else float(theory.calibrated_loss(q))
    return {
        "q": q,
        "beta": beta,
        "calibrated_loss": calibrated_loss,
        "calibrated_reward": None if q is None else float(theory.calibrated_reward(q)),
        "sharp_reward": None if q is None else float(theory.sharp_reward(q)),
        "rl_loss": rl[0] if rl else None,
        "rl_reward": rl[1] if rl else None,
        "c1": rl[0] - calibrated_loss if rl and calibrated_loss is not None else None,
        "runs": landings(results),
        "identity_gaps": identity_gaps(example_values(profile)[0], profile.rl.answers_per_prompt),
        "test_time": decoding(results),
        "fixed_points": fixed_points(profile),
        "sweep": None if per_seed is None else summarise_sweep(results, per_seed),
    }
