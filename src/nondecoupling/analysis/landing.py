"""Where RL was to land and where it did, what decoding gets without it, and theory.json, which says both."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.special import expit, log_expit, log_softmax, logit

from nondecoupling.analysis import theory
from nondecoupling.analysis.identities import identity_gaps
from nondecoupling.analysis.measures import best_temperature, temperature_of_least_loss
from nondecoupling.analysis.predictions import (
    agreement_of,
    known_agreement,
    label_log_odds,
    levels,
    policies_of,
    where_loss_is,
)
from nondecoupling.analysis.statistics import over_seeds
from nondecoupling.analysis.sweep import change_over_seeds, crossing, slope_of_shift, summarise_sweep
from nondecoupling.study.contracts import (
    Agreement,
    Decoding,
    Landing,
    OverSeeds,
    Payer,
    Point,
    TheoryFile,
    Tilt,
    TiltBin,
    Uninformed,
)
from nondecoupling.study.plan import STATES
from nondecoupling.study.profile import Profile
from nondecoupling.study.results import Results

EXAMPLE_Q, EXAMPLE_BETA = 0.9, 0.5  # of examples; a study's own beta instead, where it is not 0
P_EDGES = (0, 0.1, 0.3, 0.5, 0.7, 0.9, 1)  # bins of the probability that the start gives to the label

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
    for name in ("sft-rl", "rl"):
        run = results.study.run(name)
        beta, parent = results.study.settings_of(run).rl.beta, str(run.parent)
        for seed in results.seeds:
            start, end = (results.answers_of(policy, seed) for policy in (parent, name))
            before, labels, q = label_log_odds(start), start["label"], agreement_of(start)
            believed = theory.self_tilted_log_odds(before, beta) if beta > 0 else None
            tilted = None
            if q is not None and beta > 0:
                tilted = theory.tilted_log_odds(before, start["truth"].astype(int), 1 - q, beta)
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


# Sentence by sentence


def moves(results: Results, name: str) -> pd.DataFrame:
    """What RL did to every sentence of every seed, next to its closed form by own belief: a row for each.

    ``seed``, ``q`` (nan where unknown), ``p`` (of the label, before RL), the shifts of the label's log-odds ``ideal``
    and ``measured``, and the rises of its loss ``loss`` and ``loss, own belief`` (nats).
    """
    run, tables = results.study.run(name), []
    beta = results.study.settings_of(run).rl.beta
    for seed in results.seeds:
        start, end = (results.answers_of(policy, seed) for policy in (str(run.parent), name))
        side = np.where(start["label"] == 1, 1, -1)
        before, after = (side * label_log_odds(answers) for answers in (start, end))
        ideal = theory.self_tilted_log_odds(before, beta)
        loss = {"loss": after, "loss, own belief": ideal}
        columns = {"q": start["agreement"], "p": expit(before), "ideal": ideal - before, "measured": after - before}
        columns |= {what: log_expit(before) - log_expit(odds) for what, odds in loss.items()}
        tables.append(pd.DataFrame({"seed": seed, **columns}))
    return pd.concat(tables, ignore_index=True)


def who_pays(results: Results) -> list[Payer]:
    """The rise of the SFT loss by RL after SFT for the sentences of each q(x), by falling q, on the labels as given.

    Empty where q(x) is unknown or beta is 0.
    """
    beta = results.study.profile.rl.beta
    if known_agreement(results) is None or beta == 0:
        return []
    table = moves(results, "sft-rl")
    table["loss, perfect learner"] = theory.rl_loss(table["q"], beta) - theory.calibrated_loss(table["q"])
    return [
        Payer(**change_over_seeds(part.groupby("seed").mean(), "loss"), q=float(q), share=len(part) / len(table))  # type: ignore[arg-type]
        for q, part in table.groupby("q", sort=True)
    ][::-1]


def tilt_calibration(results: Results) -> list[Tilt]:
    """How far `sft-rl` and `rl` moved each sentence, against its closed form by own belief; empty where beta is 0.

    The loss can agree on average while sentences that the start has wrong move too little and others too much: the bins
    are of the probability that the start gives to the label. Means over the seeds that have sentences in a bin.
    """
    found: list[Tilt] = []
    for name in ("sft-rl", "rl") if results.study.profile.rl.beta > 0 else ():
        table = moves(results, name)
        fits = [
            (slope_of_shift(x, y), float(x @ y / np.sqrt((x @ x) * (y @ y))))
            for x, y in ((part["ideal"].to_numpy(), part["measured"].to_numpy()) for _, part in table.groupby("seed"))
        ]
        slopes, cosines = zip(*fits, strict=True)
        bins = pd.cut(table["p"], P_EDGES, labels=False, include_lowest=True)
        found.append(
            {
                "run": name,
                "slope": over_seeds(slopes),
                "cosine": over_seeds(cosines),
                "bins": [tilt_bin(int(place), part, len(table)) for place, part in table.groupby(bins)],  # type: ignore[call-overload]
            }
        )
    return found


def tilt_bin(place: int, part: pd.DataFrame, sentences: int) -> TiltBin:
    """The entry of one bin of `tilt_calibration` from its part of `moves`."""
    means = part.groupby("seed").mean()
    return TiltBin(
        **change_over_seeds(means, "loss"),
        low=P_EDGES[place],
        high=P_EDGES[place + 1],
        share=len(part) / sentences,
        ideal_shift=float(means["ideal"].mean()),
        measured_shift=over_seeds(means["measured"]),
    )


def uninformed_rl(results: Results) -> Uninformed | None:
    """Where RL from the base ended, beside ideal RL from there of one who cannot tell sentences apart (ours).

    Such a learner knows no more than how often each answer is right, a share a of "acceptable": the base's two answers
    are tilted by 1 - 2a and 2a - 1, and whatever else it says by -1 (`theory.tilt`). None where beta is 0.
    """
    beta, ends = results.study.settings_of(results.study.run("rl")).rl.beta, []
    if beta == 0:
        return None
    for seed in results.seeds:
        base, after = (results.answers_of(run, seed) for run in ("base", "rl"))
        labels, share = base["label"].to_numpy(), base["label"].mean()
        said, ended = (table[["logp_unacceptable", "logp_acceptable"]].to_numpy(dtype=float) for table in (base, after))
        rest = np.log(np.clip(1 - np.exp(said).sum(1), np.finfo(float).tiny, None))
        policy = log_softmax(np.column_stack([said, rest]), axis=1)
        ideal = theory.tilt(policy, np.broadcast_to([1 - 2 * share, 2 * share - 1, -1], policy.shape), beta)
        of_label, of_ideal = (logp[np.arange(len(labels)), labels] for logp in (ended, ideal))
        ends.append(
            {
                "loss": -of_label.mean(),
                "reward": (2 * np.exp(of_label) - 1).mean(),
                "loss_uninformed": -of_ideal.mean(),
                "reward_uninformed": (2 * np.exp(of_ideal) - 1).mean(),
            }
        )
    table = pd.DataFrame(ends)
    return Uninformed(**{name: over_seeds(table[name]) for name in table})  # type: ignore[typeddict-item]


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


# Test time


def decoded_rewards(results: Results, run: str, decode: Decoder = SAMPLED) -> np.ndarray:
    """J of each seed's policy on dev with its answers given by ``decode``, (seeds,)."""
    return np.array([theory.reward_on_labels(decode(odds), a["label"]) for odds, a in policies_of(results, run)])


def losses(results: Results, run: str) -> np.ndarray:
    """L of each seed's policy on dev, (seeds,); no decoder changes it."""
    return np.array([theory.loss_on_labels(odds, a["label"]) for odds, a in policies_of(results, run)])


def calibration(results: Results) -> dict[str, OverSeeds]:
    """`measures.best_temperature` of each policy of the two experiments: above 1 it is overconfident."""
    return {
        run: over_seeds([temperature_of_least_loss(table) for _, table in policies_of(results, run)]) for run in STATES
    }


def sharpening(log_odds: np.ndarray, labels: pd.Series, loss: float) -> tuple[float, float | None]:
    """The temperature of least loss of a policy, and the lower one at which it has ``loss`` (None if there is none)."""

    def loss_at(temperature: float) -> float:
        return theory.loss_on_labels(theory.tempered_log_odds(log_odds, temperature), labels)

    best = best_temperature(theory.two_label_policy(log_odds), theory.certain(labels, 2))
    return best, where_loss_is(loss, loss_at, np.exp(-9), best)


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
        on_curve = np.nan if t is None else theory.reward_on_labels(log_odds / t, labels)
        found = {"T of least L": least, "T at RL's L": t, "L": loss, "J, SFT at T": on_curve, "J, RL": reward}
        rows.append({"seed": seed, **found, "difference": reward - on_curve})
    return pd.DataFrame(rows).set_index("seed").astype(float)


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


# Outcomes in words


def side(found: OverSeeds, than: float) -> Literal["above", "below", "not told apart from"]:
    """On which side of a number the whole 95 % interval lies; one seed, or an interval that includes it, tells none."""
    low, high = found["ci95"] or (-np.inf, np.inf)
    return "above" if low > than else "below" if high < than else "not told apart from"


def sides_in_words(gaps: dict[str, OverSeeds]) -> str:
    """Where measured minus predicted is above or below zero, and where it cannot be told apart from it, in a sentence.

    ``gaps`` maps a name for each place to its gap.
    """
    places: dict[str, list[str]] = {}
    for name, gap in gaps.items():
        places.setdefault(side(gap, 0.0), []).append(name)
    words = {"above": "more than predicted", "below": "less", "not told apart from": "not told apart from it"}
    return "; ".join(f"{words[kind]}: {', '.join(places[kind])}" for kind in words if kind in places) + "."


# theory.json


def example_beta(profile: Profile) -> float:
    """beta to illustrate with: the study's own unless it is 0."""
    return profile.rl.beta or EXAMPLE_BETA


def fixed_points(profile: Profile) -> dict[str, Any]:
    """Where ideal RL, and each variant of GRPO, comes to rest from the calibrated policy, for `EXAMPLE_Q`."""
    q, beta, answers = EXAMPLE_Q, example_beta(profile), profile.rl.answers_per_prompt
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


def distinct(q: np.ndarray | None) -> list[Agreement] | None:
    """The values of q(x) and the share of sentences of each, by falling q; None where q(x) is unknown."""
    if q is None:
        return None
    values, counts = np.unique(q, return_counts=True)
    return [{"q": float(v), "share": float(n / q.size)} for v, n in zip(values[::-1], counts[::-1], strict=True)]


def theory_file(results: Results, per_seed: pd.DataFrame | None) -> TheoryFile:
    """The content of theory.json; ``per_seed`` is `sweep.confront_sweep`'s table, None where there is no sweep."""
    profile = results.study.profile
    return {
        "agreement": distinct(known_agreement(results)),
        "beta": profile.rl.beta,
        "levels": levels(results),
        "temperatures": calibration(results),
        "runs": landings(results),
        "uninformed": uninformed_rl(results),
        "who_pays": who_pays(results),
        "tilts": tilt_calibration(results),
        "identity_gaps": identity_gaps(EXAMPLE_Q, profile.rl.answers_per_prompt),
        "test_time": decoding(results),
        "fixed_points": fixed_points(profile),
        "sweep": None if per_seed is None else summarise_sweep(results, per_seed),
        "crossing": crossing(results),
    }
