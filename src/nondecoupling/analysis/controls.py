"""Controls and joint training: what each answers, and the rules of its verdict, written before reported seeds were run.

Verdicts follow the rule of `claims`, with Holm's correction over all controls, and over all joint runs. All statements
here are ours; the paper runs no control, and concludes that the two stages should be one joint optimisation without
running it. To add a control, add its claim here and its run to `study.plan`.
"""

import math

import numpy as np
import pandas as pd

from nondecoupling.analysis import predictions, theory
from nondecoupling.analysis.claims import Claim, claim_row, corrected_family, judged_rows, not_run, verdict_of
from nondecoupling.analysis.collapse import is_collapsed
from nondecoupling.analysis.predictions import label_log_odds
from nondecoupling.analysis.statistics import Interval, interval_text, mean_interval, paired_test
from nondecoupling.study.contracts import ClaimRow, Verdict
from nondecoupling.study.plan import SEQUENTIAL
from nondecoupling.study.results import Results
from nondecoupling.study.study import Study

LOSS, REWARD = "sft_loss", "reward_exact"

CONTROLS = [
    Claim("K1", "RL raises the SFT loss more than as many further SFT steps", LOSS, "sft-rl", "sft-sft", +1),
    Claim("K2", "SFT after RL lowers the reward below that of more RL", REWARD, "rl-sft", "rl-rl", -1),
    Claim("K3", "RL raises the SFT loss more than RL paid by a coin", LOSS, "sft-rl", "sft-rl-random", +1),
    Claim("K4", "RL for another wording raises the loss", LOSS, "sft-rl-format", "sft-wordings", +1),
    Claim("K5", "A tenth of the SFT lowers the reward already", REWARD, "rl-sft-short", "rl", -1),
    Claim("K6", "Without disagreement RL lowers the SFT loss", LOSS, "sft-rl-clean", "sft-clean", -1),
    Claim("K8", "SFT after collapsed RL raises the reward", REWARD, "rl-weak-sft", "rl-weak", +1),
    Claim("K9", "RL paid by the proxy earns less true reward", REWARD, "sft-rl-proxy", "sft-rl", -1),
    Claim("K10", "RLOO raises the SFT loss, too", LOSS, "sft-rl-rloo", "sft", +1),
]
# These two are not differences of one metric between two policies.
COLLAPSE = Claim("K7", "RL from a base that knows little collapses to one answer", "collapsed", "rl-weak", "", +1)
STOPPING = Claim("K11", "A quarter of RL has more of its reward than of its loss", "share", "sft-rl", "sft", +1)
OBJECTIONS = {
    "K1": "Is the rise of the loss just drift, which any further training brings?",
    "K2": "Is the fall of the reward just what more training of any kind does?",
    "K3": "Is it the reward that raises the loss, or the noise of RL's updates?",
    "K4": "Does the sign rule hold where RL pays for what the demonstrations do not show?",
    "K5": "Does the fall of the reward need a whole stage of SFT?",
    "K6": "Is the rise a law, or does it come from disagreement, as the theory says?",
    "K7": "Is a reward like the paper's 0.385 a skill?",
    "K8": "Does SFT always lower the reward, or only where RL had learnt something?",
    "K9": "Does a learnt reward change the picture, and is it over-optimised?",
    "K10": "Is it GRPO, or any policy gradient?",
    "K11": "Must one pay the whole rise of the loss to get the reward?",
}
TEMPERATURES = np.geomspace(0.2, 5, 200)
EARLY = 0.25  # of RL's steps


def controls_of(study: Study) -> list[Claim]:
    """The controls that the plan of ``study`` has, in order."""
    planned = {"", *(run.name for run in study.runs)}
    possible = [claim for claim in [*CONTROLS, COLLAPSE, STOPPING] if {claim.before, claim.after} <= planned]
    return sorted(possible, key=lambda claim: int(claim.id[1:]))


def joint_runs(study: Study) -> list[str]:
    """The runs of joint training in the plan of ``study``."""
    return [run.name for run in study.runs if run.stage == "joint"]


def joint_claims(study: Study, rival: str) -> list[Claim]:
    """J1 and J2 of each joint run; ``rival`` is the better of the sequential policies with greedy answers."""
    claims = []
    for run in joint_runs(study):
        words = f"'{run}' earns more than sequential training at its SFT loss"
        claims.append(Claim(f"J1-{run}", words, "reward", run, "best sequential policy at any temperature", +1))
        claims.append(Claim(f"J2-{run}", f"'{run}' earns more with greedy answers", "reward_greedy", run, rival, +1))
    return claims


def controls_not_run(study: Study) -> list[ClaimRow]:
    """The rows of controls and joint training of a study that has run none."""
    return [not_run(claim, "make controls") for claim in [*controls_of(study), *joint_claims(study, "sequential")]]


def judge_controls(results: Results, claims: list[ClaimRow]) -> list[ClaimRow]:
    """One row per control that the plan has; ``claims`` are the judged claims of the same study.

    K7 is *reproduced* if the policy has collapsed in every seed, *not reproduced* if in none, else *inconclusive*.
    K11's quantity is, per seed, the share of RL's gain of reward minus the share of its rise of loss that are there
    after a quarter of its steps.
    """
    metrics, planned = results.final(), controls_of(results.study)
    predicted = predictions.of_controls(results, claims)
    judged = judged_rows(metrics, [claim for claim in planned if claim in CONTROLS], *predicted)
    if COLLAPSE in planned:
        fallen = is_collapsed(metrics[metrics["run"] == COLLAPSE.after])
        share, n = float(fallen.mean()), len(fallen)
        verdict: Verdict = "inconclusive"
        if n > 1 and share in (0, 1):
            verdict = "reproduced" if share else "not reproduced"
        counted = Interval(share, math.nan, math.nan, n)
        quantity = "share of seeds that collapsed"
        judged.append(claim_row(COLLAPSE, counted, verdict, "count of seeds", quantity=quantity))
    shares = early_shares(results.trajectories)
    ahead = (shares["reward"] - shares["loss"]).to_numpy()
    interval, quantity = mean_interval(ahead), "share of reward - share of loss"
    verdict = verdict_of(interval.low, interval.high, +1)
    judged.append(claim_row(STOPPING, interval, verdict, paired_test(ahead), quantity=quantity))
    return corrected_family(sorted(judged, key=lambda row: int(row["id"][1:])))


def early_shares(trajectories: pd.DataFrame) -> pd.DataFrame:
    """By seed, the shares of RL's whole change of ``reward`` and ``loss`` that are there after a quarter of its steps.

    Taken at the measurement that is nearest to a quarter; ``step`` says which.
    """
    found = []
    for seed, path in trajectories[trajectories["run"] == "sft-rl"].groupby("seed"):
        path = path.set_index("step")[["reward_exact", "sft_loss"]]
        step = min(path.index, key=lambda at: abs(at - EARLY * path.index[-1]))
        share = (path.loc[step] - path.iloc[0]) / (path.iloc[-1] - path.iloc[0])
        found.append({"seed": seed, "step": step, "reward": share["reward_exact"], "loss": share["sft_loss"]})
    return pd.DataFrame(found).set_index("seed")


def reward_per_nat(results: Results) -> pd.DataFrame:
    """`early_shares`, and how much reward RL after SFT buys for a nat of SFT loss up to there and after it, by seed."""
    shares = early_shares(results.trajectories)
    after, before = (results.final(run).set_index("seed")[[REWARD, LOSS]] for run in ("sft-rl", "sft"))
    change = after - before
    early = change[REWARD] * shares["reward"] / (change[LOSS] * shares["loss"])
    late = change[REWARD] * (1 - shares["reward"]) / (change[LOSS] * (1 - shares["loss"]))
    return shares.assign(**{"reward per nat, early": early, "reward per nat, late": late})


# Joint training


def temperature_curve(log_odds: np.ndarray, labels: pd.Series) -> pd.DataFrame:
    """``sft_loss, reward`` on the given labels of a two-label policy at `TEMPERATURES`, from cold to hot."""
    tempered = [theory.tempered_log_odds(log_odds, temperature) for temperature in TEMPERATURES]
    return pd.DataFrame(
        {
            "sft_loss": [theory.loss_on_labels(odds, labels) for odds in tempered],
            "reward": [theory.reward_on_labels(odds, labels) for odds in tempered],
        }
    )


def temperature_curves(results: Results, run: str) -> list[pd.DataFrame]:
    """`temperature_curve` of a run's policy, for each seed."""
    policies = [results.answers_of(run, seed) for seed in results.seeds]
    return [temperature_curve(label_log_odds(answers), answers["label"]) for answers in policies]


def best_reward_at(curves: list[pd.DataFrame], loss: float) -> float:
    """Largest reward on ``curves`` among points with at most that SFT loss (or the least loss there is)."""
    points = pd.concat(curves)
    return float(points.loc[points["sft_loss"] <= max(loss, points["sft_loss"].min()), "reward"].max())


def judge_joint(results: Results) -> list[ClaimRow]:
    """Does joint training beat doing one stage after the other, at equal cost? Two rows per joint run.

    J1: its sampled reward minus the best that `SEQUENTIAL`'s policies of the same seed earn at no larger SFT loss, each
    at whatever temperature suits it best on these very sentences (which favours them). J2: its greedy reward minus that
    of the better of the two, by the mean over seeds.
    """
    greedy = results.final().pivot(index="seed", columns="run", values="reward_greedy")
    rival = max(SEQUENTIAL, key=lambda run: greedy[run].mean())
    curves = list(zip(*(temperature_curves(results, run) for run in SEQUENTIAL), strict=True))
    judged = []
    for claim in joint_claims(results.study, rival):
        if claim.metric == "reward_greedy":
            gains = (greedy[claim.after] - greedy[rival]).to_numpy()
        else:
            gains = np.array([above_curves(results.answers_of(claim.after, seed), list(of_seed))
                              for seed, of_seed in zip(results.seeds, curves, strict=True)])  # fmt: skip
        interval = mean_interval(gains)
        verdict = verdict_of(interval.low, interval.high, claim.sign)
        judged.append(claim_row(claim, interval, verdict, paired_test(gains)))
    return corrected_family(judged)


def above_curves(answers: pd.DataFrame, curves: list[pd.DataFrame]) -> float:
    """A policy's sampled reward minus the best on ``curves`` at no larger SFT loss."""
    log_odds, labels = label_log_odds(answers), answers["label"]
    best = best_reward_at(curves, theory.loss_on_labels(log_odds, labels))
    return theory.reward_on_labels(log_odds, labels) - best


def joint_answer(rows: list[ClaimRow]) -> str:
    """The answer to "does joint training beat sequential training at equal cost?" in one paragraph, with numbers."""

    def summary(letter: str, what: str) -> str:
        family = [row for row in rows if row["id"].startswith(letter)]
        best = max(family, key=lambda row: row["estimate"] or -math.inf)
        better, worse = (
            sum(row["verdict"] == verdict for row in family) for verdict in ("reproduced", "not reproduced")
        )
        return (
            f"{what}, {better} of {len(family)} joint runs are better and {worse} worse; the best is "
            f"{best['id'].partition('-')[2]} with {interval_text(best['estimate'], best['ci95'])}"
        )

    sampled = summary("J1", "In sampled reward at equal SFT loss")
    greedy = summary("J2", "In greedy reward")
    return f"{sampled}. {greedy}. (Means over {rows[0]['seeds']} seeds with 95 % intervals; Holm's correction.)"
