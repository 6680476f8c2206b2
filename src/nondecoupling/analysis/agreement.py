"""Could fresh replications come from the reference's? Every number of a study that is judged, compared seed by seed.

Nothing that is trained equals itself on another processor, so a reference is a distribution. **The rule**, for each
quantity:

* Where both sides have the same seeds and none differs by more than `TOLERANCE`, there is nothing to test.
* What is the same in all of the reference's replications (a published model, measured once) must be the same here, to
  `TOLERANCE`.
* Else it is tested whether the fresh values are further draws of what the reference's are draws of, and where seeds are
  the same, and with them the sentences, also seed by seed (`statistics.further_draws_test`), with Holm's correction
  over all quantities that are tested: if both sides are alike, the chance that any fails is at most `FAMILYWISE`.
  Holm's correction holds for quantities that hang together, as differences of others do here, and overlooks less than
  Bonferroni's.
"""

import textwrap

import numpy as np
import pandas as pd

from nondecoupling.analysis.claims import CLAIMS, change_of
from nondecoupling.analysis.statistics import ROUNDING, further_draws_test, holm
from nondecoupling.study.plan import MAKES, STATES
from nondecoupling.study.results import Results

TOLERANCE = 1e-3  # nats of loss, or reward
FAMILYWISE = 0.01
WIDTH = 80  # of what is printed
FAIL = "FAIL"
ALIKE = {"bit-identical": "bit-identical", "to 1e-3": "the same to 1e-3", "statistically": "statistically the same"}


def quantities(results: Results) -> pd.DataFrame:
    """``quantity, seed, value``: SFT loss and rewards on dev of every finished policy, and the claims' differences.

    Greedy rewards are only of the two experiments' policies, which alone are judged by them.
    """
    metrics, tables = results.final(), []
    for run, of_run in metrics.groupby("run", sort=False):
        for metric in ("sft_loss", "reward_exact", *(["reward_greedy"] if run in STATES else [])):
            tables.append(of_run[["seed"]].assign(quantity=f"{run}: {metric}", value=of_run[metric]))
    for claim in [claim for claim in CLAIMS if claim.metric in metrics]:  # the others need more than final metrics
        difference = change_of(results, claim).rename("value").reset_index()
        tables.append(difference.assign(quantity=f"{claim.id} {claim.quantity}"))
    return pd.concat(tables, ignore_index=True)[["quantity", "seed", "value"]]


def compare(fresh: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """A row per quantity that both tables of `quantities` have, with the verdict of the module's rule.

    ``fresh`` and ``reference`` are means; ``deviation`` of the means, and ``farthest`` of the one fresh replication
    that is farthest away, are in standard deviations of one replication of the reference (nan where it has none);
    ``p`` is after Holm's correction (nan where nothing was tested); ``result`` is `FAIL` or a key of `ALIKE`. Raises
    ValueError where a value is not finite, or the reference has one replication and hence no spread.
    """
    new_by_name, old_by_name = (
        {name: values.set_index("seed")["value"] for name, values in side.groupby("quantity", sort=False)}
        for side in (fresh, reference)
    )
    rows: list[dict[str, object]] = []
    p_values: list[float | None] = []
    for name, new in new_by_name.items():
        if name not in old_by_name:
            continue
        old, gap = old_by_name[name], np.inf
        constant = len(old) > 1 and np.ptp(old) <= ROUNDING
        partners = new.index.isin(old.index).all()  # replications of the same sentences
        if constant or partners:
            gap = (new - (old.iloc[0] if constant else old[new.index])).abs().max(skipna=False)
        if gap <= TOLERANCE:
            p_values.append(None)
        else:
            changes = new - old[new.index] if partners else None
            p_values.append(0.0 if constant else further_draws_test(new, old, changes).p_value)
        spread = np.nan if constant else old.std()
        rows.append(
            {
                "quantity": name,
                "fresh": new.mean(),
                "reference": old.mean(),
                "deviation": (new.mean() - old.mean()) / spread,
                "farthest": (new - old.mean()).abs().max() / spread,
                "result": "bit-identical" if gap == 0 else "to 1e-3" if gap <= TOLERANCE else "statistically",
            }
        )
    table = pd.DataFrame(rows).assign(p=pd.Series(holm(p_values), dtype=float))
    return table.assign(result=table["result"].where(~(table["p"] < FAMILYWISE), FAIL))


def verdict_sentence(table: pd.DataFrame, replications: int, of_reference: int) -> str:
    """The result of `compare` in a sentence that begins with PASS or FAIL."""
    failed = table[table["result"] == FAIL]
    counts = table["result"].value_counts()
    alike = ", ".join(f"{counts[name]} {words}" for name, words in ALIKE.items() if name in counts)
    these = f"{replications} replication{'s' * (replications > 1)}"
    if len(failed):
        said = f"FAIL: {len(failed)} of {len(table)} quantities of {these} could not come from the reference's "
        said += f"{of_reference}" + f"; of the others {alike}" * bool(alike)
    else:
        said = f"PASS: {len(table)} quantities of {these} could come from the reference's {of_reference}: {alike}"
    return f"{said} (at {FAMILYWISE:.0%} over all of them)."


def comparison_text(table: pd.DataFrame, replications: int, of_reference: int) -> str:
    """The result of `compare` for reading: a sentence, what failed, and a line per quantity; at most 80 columns."""
    failed = table[table["result"] == FAIL]
    lines = wrapped(verdict_sentence(table, replications, of_reference))
    for row in failed.to_dict("records"):
        lines += wrapped(failure(row, replications), "* ")
    lines += ["", f"{'quantity':37}{'here':>8}{'refer.':>8}{'SDs':>6}{'p':>7} alike"]
    for row in table.to_dict("records"):
        means = f"{row['quantity']:37}{row['fresh']:+8.3f}{row['reference']:+8.3f}"
        lines.append(f"{means}{number(row['deviation'], '+z.1f'):>6}{number(row['p'], '.1g'):>7} {row['result']}")
    return "\n".join(lines)


def wrapped(text: str, bullet: str = "") -> list[str]:
    """``text`` as lines that fit."""
    after = " " * len(bullet)
    return textwrap.wrap(text, WIDTH, initial_indent=bullet, subsequent_indent=after, break_on_hyphens=False)


def failure(row: dict, replications: int) -> str:
    """What a row of `compare` that failed has to say."""
    means = f"{row['quantity']} is {row['fresh']:+.3f} here and {row['reference']:+.3f} in the reference"
    if np.isnan(row["deviation"]):
        return f"{means}, where it is the same in all replications."
    side = "above" if row["deviation"] > 0 else "below"
    away = f"{means}, {abs(row['deviation']):.1f} standard deviations of one replication {side} it"
    return away + f", the farthest one {row['farthest']:.1f}" * (replications > 1) + f" (p = {row['p']:.1g})."


def number(value: float, digits: str) -> str:
    """A number as text, "-" where there is none."""
    return "-" if np.isnan(value) else format(value, digits)


def not_compared(fresh: Results, reference: Results) -> str:
    """One line on the runs that only one side has; empty if there is none."""
    runs = [set(side.final()["run"]) for side in (fresh, reference)]
    groups = [reference.study.run(name).group for name in runs[1] - runs[0]]
    missing = ", ".join(f"{groups.count(group)} ({MAKES[group]})" for group in sorted(set(groups)))
    more = len(runs[0] - runs[1])
    said = [f"Runs of the reference that are not here: {missing}." if missing else ""]
    return " ".join(filter(None, [*said, f"Not in the reference: {more}." if more else ""]))
