"""How long, when, and along which directions RL after SFT costs SFT loss: three ideas of the paper's second version.

The paper's v2 adds an optimal duration of RL, a threshold at which RL improves SFT, and a bound on the misalignment of
the two gradients. They are known here from its abstract only; what is tested is our reconstruction, and none of its
verdicts is the paper's. Rules were written when the gradients of one replication had been seen (seed 0, at `base`,
`sft` and `sft-rl`) and the runs that G3 restates were known, and G4 and G6 changed after a whole trial on seed 100,
which is not reported.

Losses (nats over the two labels) and rewards are in expectation over annotators where q(x) is known, else on the labels
as given. L* is the least loss there is, the mean of H(q(x)).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression

from nondecoupling.analysis import theory
from nondecoupling.analysis.claims import (
    Claim,
    claim_row,
    corrected_family,
    judged,
    not_run,
    verdict_of_amount,
)
from nondecoupling.analysis.measures import halves
from nondecoupling.analysis.predictions import agreement_of, label_log_odds
from nondecoupling.analysis.statistics import mean_interval, over_seeds
from nondecoupling.analysis.verdicts import interval_text, shown
from nondecoupling.study.contracts import (
    ClaimRow,
    Duration,
    GeometryFile,
    OverSeeds,
    PolicyGeometry,
    Threshold,
)
from nondecoupling.study.plan import ALONG_SFT, MAKES, starts
from nondecoupling.study.results import Results
from nondecoupling.study.study import Study

FREE = 0.01  # nats of SFT loss that nobody would miss
EARLY = 0.05  # nats of rise, by the second-order prediction, at which it is judged
VACUOUS = 0.99  # a bound on a cosine from which on it says nothing
RATES = np.geomspace(0.3, 10, 40)  # exchange rates: what a nat of SFT loss is worth, in reward
PREDICTIONS = ("truth", "own_belief", "refitted_belief")  # of where RL ends (`ideal_rl`)
PATHS = {"plain": "gradient ascent", "adam": "Adam"}

SECOND_ORDER = Claim(
    "G1",
    "(ours) The SFT policy says, to second order, what RL's first gain costs",
    "rise of L where 0.05 is predicted",
    "sft",
    "",
    +1,
)
CLAIMS = [
    Claim(
        "G2",
        "(ours) Half of RL's gain costs less than 0.01 nats of SFT loss",
        "share of the gain",
        "sft",
        "",
        +1,
        than=0.5,
    ),
    Claim("G3", "(ours) RL lowers the SFT loss of the base", "loss", "rl", "base", -1),
    Claim(
        "G4",
        "(ours) A start's refitted belief says whether RL will help SFT or hurt it",
        "share of starts and betas with the predicted sign",
        "sft-rl",
        "",
        +1,
        than=0.8,
    ),
    Claim("G5", "(ours) At the base, SFT and RL pull the same way", "cosine of -grad L and grad J", "base", "", +1),
    Claim("G6", "(ours) At the end of SFT, RL's first step raises the SFT loss", "slope s", "sft", "", +1),
    Claim(
        "G7",
        "(literature) RL's gradient lies off the principal directions in which SFT's lies",
        "share in the top 10, grad L - grad J",
        "base",
        "",
        +1,
    ),
]


# Gradients


def geometry_of(results: Results, policy: str) -> pd.DataFrame:
    """The rows of gradients.csv of one policy, indexed by seed; ``cosine_split`` is nan where noise left none."""
    table = results.gradients.assign(cosine_split=results.gradients.get("cosine_split", np.nan))
    return table[table["policy"] == policy].set_index("seed")


def policy_geometry(results: Results) -> list[PolicyGeometry]:
    """The geometry of each policy that was measured, means over seeds: along SFT, then what RL was part of.

    A cosine that noise hides in most seeds has no mean: the others would be those in which it came out large.
    """
    measured, found = set(results.gradients["policy"]), []
    for name in (*ALONG_SFT, "sft-rl", "rl", "rl-sft"):
        if name in measured:
            rows = geometry_of(results, name).drop(columns=["run", "policy", "n"])
            known = int(rows["cosine_split"].notna().sum())
            hidden = ["cosine_split"] if 2 * known <= len(rows) else []
            quantities = means_of(rows.drop(columns=hidden))
            found.append(PolicyGeometry(policy=name, quantities=quantities, cosines=known))
    return found


def means_of(rows: pd.DataFrame) -> Any:
    """`over_seeds` of every column that has a value in some seed, by name."""
    return {str(name): over_seeds(values.dropna()) for name, values in rows.items() if values.notna().any()}


# How long


def ascent(results: Results, path: str, seed: int) -> pd.DataFrame:
    """One ascent from a seed's SFT policy, mean of both ways round, by step: changes of L and J since its start.

    Columns ``tau, loss, reward``, measured, and ``loss_second, reward_second, loss_linear, reward_linear``.
    """
    table = results.paths
    rows = table[(table["path"] == path) & (table["seed"] == seed)].drop(columns=["run", "seed", "path"])
    mean = rows.groupby("step").mean().drop(columns="paid")
    changes = [column for column in mean if column != "tau"]
    start = {column: mean[column.partition("_")[0]].iloc[0] for column in changes}
    return mean.assign(**{column: mean[column] - start[column] for column in changes})


def while_rising(path: pd.DataFrame) -> pd.DataFrame:
    """The first part of a path, over which its second order says that the reward still rises."""
    return path.iloc[: int(path["reward_second"].to_numpy().argmax()) + 1]


def value_at(path: pd.DataFrame, column: str, by: str, level: float) -> float:
    """``column`` of a path where ``by`` first reaches ``level``, by interpolation; its last value if it never does."""
    reached = np.flatnonzero(path[by].to_numpy() >= level)
    if not reached.size:
        return float(path[column].iloc[-1])
    after = max(int(reached[0]), 1)
    ends = path.iloc[[after - 1, after]]
    return float(np.interp(level, ends[by], ends[column]))


def gain_of_rl(results: Results) -> pd.Series:
    """RL's gain of J after SFT on the sentences of the gradients, by seed."""
    return geometry_of(results, "sft-rl")["reward"] - geometry_of(results, "sft")["reward"]


def free_share(results: Results) -> pd.Series:
    """Share of RL's gain of J that plain ascent has when the loss has risen by `FREE`, by seed; nan without a gain."""
    gain = gain_of_rl(results)
    free = pd.Series({seed: value_at(ascent(results, "plain", seed), "reward", "loss", FREE) for seed in gain.index})
    return (free / gain).where(gain > 0)


def best_stop(path: pd.DataFrame, rate: float, kind: str = "") -> float:
    """The gain of J at the point of a path where J - ``rate`` x L is largest, measured or predicted (``kind``)."""
    worth = path[f"reward{kind}"] - rate * path[f"loss{kind}"]
    return float(path["reward"].loc[worth.idxmax()])


def duration(results: Results) -> Duration:
    """Ascent from the SFT policy: its path, what is free, and where to stop at which exchange rate."""
    seeds = results.seeds
    paths = {name: {seed: ascent(results, name, seed) for seed in seeds} for name in PATHS}
    points: list[Any] = [  # of PathPoint
        {"path": name, "step": int(step), **means_of(rows)}
        for name, by_seed in paths.items()
        for step, rows in pd.concat(by_seed.values()).groupby(level=0)
    ]
    sft = geometry_of(results, "sft")
    free = -2 * sft["slope"] / sft["curvature"]
    share = free_share(results).dropna()
    stops = [
        {
            "rate": float(rate),
            "measured": over_seeds([best_stop(paths["plain"][seed], rate) for seed in seeds]),
            "predicted": over_seeds([best_stop(paths["plain"][seed], rate, "_second") for seed in seeds]),
        }
        for rate in RATES
    ]
    return {
        "points": points,
        "gain_of_rl": over_seeds(gain_of_rl(results)),
        "rise_by_rl": over_seeds(geometry_of(results, "sft-rl")["loss"] - sft["loss"]),
        "free_stretch": over_seeds(free.clip(lower=0)),
        "seeds_with_a_free_stretch": int((free > 0).sum()),
        "free_share": over_seeds(share) if len(share) else None,
        "stops": stops,  # type: ignore[typeddict-item]
    }


# When


def known_or_labels(answers: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """(truth, disagreement) of a policy's sentences; where nobody knows them the labels, which nobody contradicts."""
    q = agreement_of(answers)
    if q is None:
        return answers["label"].to_numpy(), np.zeros(len(answers))
    return answers["truth"].astype(int).to_numpy(), 1 - q


def loss_in_expectation(log_odds: np.ndarray, answers: pd.DataFrame) -> float:
    """L of ``log_odds`` on the sentences of ``answers``."""
    return theory.expected_loss(log_odds, *known_or_labels(answers))


def least_loss(answers: pd.DataFrame) -> float:
    """L*, the mean of H(q(x)); 0 where q(x) is unknown."""
    q = agreement_of(answers)
    return 0.0 if q is None else float(np.mean(theory.calibrated_loss(q)))


def refitted(answers: pd.DataFrame) -> np.ndarray:
    """A policy's log-odds, with one temperature and one bias fitted to the labels of the other half, (sentences,)."""
    log_odds, labels = label_log_odds(answers), answers["label"].to_numpy()
    found = np.empty_like(log_odds)
    for fit, use in halves(len(labels)):
        scaled = LogisticRegression(C=np.inf).fit(log_odds[fit, None], labels[fit])
        found[use] = scaled.decision_function(log_odds[use, None])
    return found


def ideal_rl(answers: pd.DataFrame) -> dict[str, Callable[[float], np.ndarray]]:
    """Log-odds of ideal RL from a policy at a given beta, by each of `PREDICTIONS`.

    Paid by annotators, the sign rule's; by the policy's own belief; and by that belief once it is `refitted`.
    """
    log_odds, corrected = label_log_odds(answers), refitted(answers)
    return {
        "truth": partial(theory.tilted_log_odds, log_odds, *known_or_labels(answers)),
        "own_belief": partial(theory.self_tilted_log_odds, log_odds),
        "refitted_belief": lambda beta: log_odds + theory.self_tilted_log_odds(corrected, beta) - corrected,
    }


def changes_by_start(results: Results) -> pd.DataFrame | None:
    """RL from every start, at every beta and in every seed: ``start, beta, seed, distance`` (L - L* before RL),
    ``measured`` change of L, and the change by each of `PREDICTIONS`. None where RL has no starts between base and SFT.
    """
    if not results.study.profile.pretrains:
        return None
    rows = []
    for start, runs in starts(results.study.profile).items():
        for seed in results.seeds:
            answers = results.answers_of(start, seed)
            before, ideal = loss_in_expectation(label_log_odds(answers), answers), ideal_rl(answers)
            for beta, run in runs.items():
                after = loss_in_expectation(label_log_odds(results.answers_of(run, seed)), answers)
                said = {name: loss_in_expectation(ideal[name](beta), answers) - before for name in PREDICTIONS}
                known = {"start": start, "beta": beta, "seed": seed, "distance": before - least_loss(answers)}
                rows.append(known | {"measured": after - before} | said)
    return pd.DataFrame(rows)


def zero_of(distance: np.ndarray, change: np.ndarray) -> float:
    """The smallest L - L* above which ``change`` is negative, linear between starts; nan where it does not turn."""
    order = np.argsort(distance)
    x, y = distance[order], change[order]
    turns = np.flatnonzero((y[:-1] > 0) & (y[1:] <= 0))
    if not turns.size:
        return np.nan
    low = turns[0]
    return float(x[low] + (x[low + 1] - x[low]) * y[low] / (y[low] - y[low + 1]))


def zeros(rows: pd.DataFrame, change: str) -> pd.Series:
    """`zero_of` the column ``change`` against ``distance``, by seed."""
    return rows.groupby("seed").apply(
        lambda seed: zero_of(seed["distance"].to_numpy(), seed[change].to_numpy()), include_groups=False
    )


def zeros_of_cosine(results: Results) -> pd.Series:
    """L - L* at which the cosine of -grad L and grad J turns from positive to negative, by seed."""
    table = pd.concat(geometry_of(results, policy).reset_index() for policy in ALONG_SFT)
    cosine = table["cosine_split"].fillna(table["cosine"])
    return zeros(table.assign(distance=table["loss"] - table["best_loss"], opposed=-cosine), "opposed")


def mean_or_none(values: pd.Series) -> OverSeeds | None:
    """Mean over the seeds that have a value; None where none has."""
    found = values.dropna()
    return over_seeds(found) if len(found) else None


def threshold(results: Results, changes: pd.DataFrame) -> Threshold:
    """Change of L by RL against how far SFT had come, and the distance at which it changes its sign."""
    points: list[Any] = [  # of StartPoint
        {"start": str(start), "beta": float(beta), **means_of(rows[["distance", "measured", *PREDICTIONS]])}
        for (start, beta), rows in changes.groupby(["start", "beta"], sort=False)
    ]
    found: list[Any] = []  # of Zero
    for beta, rows in changes.groupby("beta", sort=False):
        turns = {kind: zeros(rows, kind) for kind in ("measured", *PREDICTIONS)}
        means = {kind: mean_or_none(values) for kind, values in turns.items()}
        found.append({"beta": float(beta), "turning": int(turns["measured"].notna().sum()), **means})  # type: ignore[arg-type]
    return {"points": points, "zeros": found, "zero_of_cosine": mean_or_none(zeros_of_cosine(results))}


def lojasiewicz(results: Results) -> pd.Series:
    """mu of the Polyak-Lojasiewicz inequality L - L* <= |grad L|^2 / (2 mu) along SFT, by seed: the largest that holds.

    From the base, the starts and the end of SFT; L* is the least loss of any policy, not of this network.
    """
    rows = results.gradients[results.gradients["policy"].isin(ALONG_SFT)]
    each = rows["loss_gradient"] ** 2 / (2 * (rows["loss"] - rows["best_loss"]))
    return each.groupby(rows["seed"]).min()


# The chapter's file and its verdicts


def values_of_geometry(results: Results, changes: pd.DataFrame | None) -> dict[str, pd.Series]:
    """The quantity of each claim by seed; only the claims whose runs are there. ``changes`` are `changes_by_start`."""
    base = geometry_of(results, "base")
    early = {seed: value_at(ascent(results, "plain", seed), "loss", "loss_second", EARLY) for seed in results.seeds}
    found = {
        "G1": pd.Series(early),
        "G2": free_share(results),
        "G5": base["cosine_split"],
        "G6": geometry_of(results, "sft")["slope"],
        "G7": base["loss_top_10"] - base["reward_top_10"],
    }
    if changes is None:
        return found
    own = results.study.profile.rl.beta
    of_base = changes[(changes["start"] == "base") & (changes["beta"] == own)].set_index("seed")["measured"]
    right = np.sign(changes["measured"]) == np.sign(changes["refitted_belief"])
    return found | {"G3": of_base, "G4": right.groupby(changes["seed"]).mean()}


def judge_geometry(results: Results, changes: pd.DataFrame | None) -> list[ClaimRow]:
    """The rows of the chapter's claims, with `changes_by_start`; G1 is an amount, judged as T2 is."""
    values = values_of_geometry(results, changes)
    gap = mean_interval(values["G1"] - EARLY)
    first = claim_row(
        SECOND_ORDER, mean_interval(values["G1"]), verdict_of_amount(gap, EARLY), predicted_from_policies=EARLY
    )
    why = "only studies with a base of their own begin RL between base and SFT"
    shuffled = geometry_of(results, "base")["cosine_shuffled"].mean()
    notes = {"G5": [f"{shuffled:+.2f} with labels shuffled among sentences"]}
    notes |= {} if changes is None else {"G4": [constant_note(changes)]}
    rows = [
        judged(claim, values[claim.id], notes.get(claim.id, ())) if claim.id in values else not_run(claim, why)
        for claim in CLAIMS
    ]
    return corrected_family([first, *rows])


def constant_note(changes: pd.DataFrame) -> str:
    """How often the sign of G4 would be foretold by one who always says the same."""
    hurts = (changes["measured"] > 0).mean()
    always = "hurts" if hurts >= 0.5 else "helps"
    return f"who always says that it {always} is right about {max(hurts, 1 - hurts):.3f}"


def geometry_not_run(study: Study) -> list[ClaimRow]:
    """The rows of a study that has not run the chapter; empty where its plan has no runs of it."""
    if not study.runs_of("geometry"):
        return []
    return [not_run(claim, MAKES["geometry"]) for claim in (SECOND_ORDER, *CLAIMS)]


def geometry_file(results: Results) -> GeometryFile:
    """The content of geometry.json."""
    changes = changes_by_start(results)
    return {
        "policies": policy_geometry(results),
        "duration": duration(results),
        "threshold": None if changes is None else threshold(results, changes),
        "lojasiewicz": None if changes is None else over_seeds(lojasiewicz(results)),
        "claims": judge_geometry(results, changes),
    }


# In words


def duration_sentence(content: GeometryFile) -> str:
    """What a first gain of reward costs on the way of plain ascent, beside GRPO, and until where the start knew it."""
    duration, [first] = content["duration"], [row for row in content["claims"] if row["id"] == "G1"]
    free, gain = duration["free_share"], duration["gain_of_rl"]["mean"]
    if free is None:
        return "RL gained no reward here, so that nothing is to be said of its price."
    said = {
        "confirmed": "The SFT policy alone knew what such a start costs",
        "refuted": "The SFT policy alone did not know what such a start costs",
    }.get(first["verdict"], "Whether the SFT policy alone knew what such a start costs is undecided")
    return (
        f"**How long:** along plain ascent on the exact reward, {shown(free, '.0%')} of GRPO's gain of reward"
        f" ({gain:+.3f}) cost {FREE:g} nats of SFT loss; all that GRPO gained came with"
        f" {shown(duration['rise_by_rl'])}. {said}: where it predicts a rise of {EARLY:g} nats, the loss had risen by"
        f" {interval_text(first['estimate'], first['ci95'], '.3f')}. GRPO itself, with samples, large steps and a price"
        f" of the KL, is another way: what a shorter one buys is K11's question (chapter 8)."
    )


def threshold_sentence(content: GeometryFile) -> str:
    """When RL helps SFT and when it hurts, with numbers; empty where it was not asked."""
    if content["threshold"] is None:
        return ""
    parts = []
    for zero in content["threshold"]["zeros"]:
        points = [point for point in content["threshold"]["points"] if point["beta"] == zero["beta"]]
        ends = f"{shown(points[0]['measured'])} from the base, {shown(points[-1]['measured'])} from the end of SFT"
        turn = "does not turn"
        if zero["measured"]:
            of_all = f"{zero['turning']} of {content['claims'][0]['seeds']} seeds"
            turn = f"turns, by a straight line between starts, at L - L* = {shown(zero['measured'], '.3f')} in {of_all}"
        known = f" (refitted belief: {shown(zero['refitted_belief'], '.3f')})" if zero["refitted_belief"] else ""
        parts.append(f"* β = {zero['beta']:g}: RL changes the SFT loss by {ends}; its sign {turn}{known}.")
    return "\n".join(parts)


def alignment_sentence(content: GeometryFile) -> str:
    """How the cosine goes from base to RL, and whether the bound says anything."""
    found, cosines = {entry["policy"]: entry for entry in content["policies"]}, []
    seeds = content["claims"][0]["seeds"]
    for policy, words in (("base", "the base"), ("sft", "SFT's end"), ("sft-rl", "RL's end")):
        if entry := found.get(policy):
            mean, known = entry["quantities"].get("cosine_split"), entry["cosines"]
            said = shown(mean, "+.2f") if mean else "hidden by noise"
            few = f"known in {known} of {seeds} seeds, " if known < seeds else ""
            shuffled = entry["quantities"]["cosine_shuffled"]["mean"]
            cosines.append(f"{said} at {words} ({few}{shuffled:+.2f} with labels shuffled)")
    bounds = [entry["quantities"]["bound"]["mean"] for entry in found.values()]
    says = sum(bound < VACUOUS for bound in bounds)
    some = f"says something (is below {VACUOUS:g}) for {says} of {len(bounds)} policies"
    vacuous = f"is vacuous for all policies ({VACUOUS:g} or more)"
    bound = f"The bound by spectral concentration {some if says else vacuous}."
    return f"The cosine of -∇L and ∇J is {', '.join(cosines)}. {bound}"
