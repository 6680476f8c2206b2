"""Intervals and verdicts in words, wherever they are read; without libraries, so that a terminal has them at once."""

import textwrap
from collections.abc import Sequence

from nondecoupling.study.contracts import ClaimRow, OverSeeds

SIGNIFICANT = 0.05  # largest p, after Holm's correction, of a verdict other than inconclusive


def interval_text(mean: float | None, bounds: Sequence[float] | None, digits: str = "+z.3f") -> str:
    """An estimate and its bounds as text, "+0.210 [+0.182, +0.238]", or what there is of them; "-" for nothing.

    What rounds to zero has no sign of its own, which would differ between machines.
    """
    if mean is None:
        return "-"
    low_and_high = [format(bound, digits) for bound in bounds or []]
    return format(mean, digits) + (f" [{low_and_high[0]}, {low_and_high[1]}]" if low_and_high else "")


def shown(interval: OverSeeds | None, digits: str = "+z.3f") -> str:
    """`interval_text` of a mean over seeds; "-" for None."""
    return interval_text(interval["mean"], interval["ci95"], digits) if interval else "-"


def rows_of(rows: list[ClaimRow], families: str) -> list[ClaimRow]:
    """The rows of claims.json whose id begins with one of the letters ``families``.

    A, B: the paper's claims; O: ours beside them; T: the theory's statements; K: controls; J: joint training;
    G: geometry; M: more than two answers.
    """
    return [row for row in rows if row["id"][0] in families]


def withdrawn(row: ClaimRow) -> str:
    """Why a claim is inconclusive whose own test is not: Holm's correction has withdrawn its verdict. Else empty."""
    p, corrected = row["p_value"], row["p_holm"]
    if row["verdict"] != "inconclusive" or p is None or corrected is None or not p < SIGNIFICANT <= corrected:
        return ""
    return f"p {p:.2g}, but {corrected:.2g} after Holm's correction"


def remarks(row: ClaimRow) -> str:
    """What there is to say beside a verdict."""
    return "; ".join(filter(None, [withdrawn(row), row["note"]]))


def outcome_sentence(row: ClaimRow) -> str:
    """What was found of a claim, in a sentence with its numbers; the words follow from the verdict."""
    margin = "" if row["margin"] is None else f" (±{row['margin']:g})"
    claim = f"{row['id']}: {row['statement'].removeprefix('(ours) ')}{margin}"
    if row["verdict"] == "not run":
        return f"{claim}: not run ({row['note']})."
    found = f"{interval_text(row['estimate'], row['ci95'])}, {row['seeds']} seed{'s' if row['seeds'] > 1 else ''}"
    words = "these seeds do not decide it" if row["verdict"] == "inconclusive" else row["verdict"]
    return f"{claim}: {words} ({'; '.join(filter(None, [found, remarks(row)]))})."


def outcomes(rows: list[ClaimRow]) -> str:
    """`outcome_sentence` of each row, as a list in Markdown."""
    return "\n".join(f"* {outcome_sentence(row)}" for row in rows)


def answer_clause(row: ClaimRow, found: str, ways: tuple[str, str], question: str, unit: str = "") -> str:
    """What a verdict of the paper's claims says, and no more.

    ``found`` takes one of ``ways``, that of *reproduced* or that of *not reproduced*, and how much it was, without the
    sign that the way says already. Else it is the ``question``, that it is open, and the change with its sign.
    """
    if row["verdict"] == "not run":
        return f"{question} was not measured"
    decided = row["verdict"] in ("reproduced", "not reproduced")
    bounds, digits = row["ci95"] or [], "z.3f" if decided else "+z.3f"
    shown_bounds = sorted(map(abs, bounds)) if decided else bounds
    mean = abs(row["estimate"] or 0.0) if decided else row["estimate"]
    number, _, interval = interval_text(mean, shown_bounds, digits).partition(" ")
    amount = " ".join(filter(None, [f"{number}{unit}", interval]))
    if decided:
        return found.format(ways[row["verdict"] == "not reproduced"], amount)
    return f"{question} is not decided ({'; '.join(filter(None, [amount, withdrawn(row)]))})"


def answer_sentences(rows: list[ClaimRow]) -> list[str]:
    """What both experiments found, a sentence each, from the verdicts of A1, A2, B2 and B3."""
    row = {claim["id"]: claim for claim in rows}
    rise = answer_clause(
        row["A1"],
        "RL after SFT {} the SFT loss by {}",
        ("raised", "lowered"),
        "whether RL after SFT raises the SFT loss",
        " nats",
    )
    end = answer_clause(
        row["A2"],
        "it ends {1} {0} the base model's",
        ("above", "below"),
        "whether it ends above the base model's",
        " nats",
    )
    sampled = answer_clause(
        row["B2"],
        "SFT after RL {} the reward of sampled answers by {}",
        ("lowered", "raised"),
        "whether SFT after RL lowers the reward of sampled answers",
    )
    greedy = answer_clause(
        row["B3"],
        "it {} that of the likelier answer by {}",
        ("lowered", "raised"),
        "whether it lowers that of the likelier answer",
    )
    return [f"{one[0].upper()}{one[1:]}; {two}." for one, two in ((rise, end), (sampled, greedy))]


def claims_text(rows: list[ClaimRow]) -> str:
    """The claims for a terminal of 80 columns: what was measured, its interval and the verdict, with remarks below."""
    lines = [f"{'claim':38}{'measured':>8}  {'95 % interval':16}  verdict"]
    for row in rows:
        margin = "" if row["margin"] is None else f" (±{row['margin']:g})"
        first, *more = textwrap.wrap(row["statement"] + margin, 32)
        mean, _, interval = interval_text(row["estimate"], row["ci95"]).partition(" ")
        name = row["id"].partition("-")[0]  # of joint training: the statement says which run it is about
        lines.append(f"{name:5} {first:32}{mean:>8}  {interval:16}  {row['verdict']}")
        lines += [f"{'':6}{line}" for line in more]
        lines += textwrap.wrap(remarks(row), 78, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
