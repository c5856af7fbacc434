"""Subsets of a scenario's names: two halves for held-out evaluation, and names matched by their length in tokens.

Here belongs the choice of names; what is done with the answers of the chosen ones is `evaluation` and `comparisons`.
A mask made from a name's answers may fit that very name, so masks and judgement can use different halves. One group's
names may also be longer in tokens than the other's (method, A3): a matched subset rules that out as a gap's cause.
"""

import hashlib

import polars as pl

from excise.errors import ExciseError

ATTRIBUTION, EVALUATION, BOTH = "attribution", "evaluation", "both"
"""Values of the column `split`: names that masks are made from, names they are judged on, no names held out."""
SPLIT_SCHEMA = {"group": pl.String, "subject": pl.String, "split": pl.String}


def halves(prompts: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Each group's names in two halves: frame with group, subject and split ("attribution" or "evaluation").

    prompts: the table of that name (group, subject, gender); only its distinct names matter, so every scenario with the
    same subjects gets the same halves, whatever its variations. Genders are balanced: the halves of a group differ by
    one name at most, in every gender and altogether, and an odd name goes to the evaluation. Ordered by group and name.

    Raises ExciseError for a group of fewer than two names: one of its halves would be empty.
    """
    names = prompts.select("group", "subject", "gender").unique(["group", "subject"]).sort("group", "subject")
    rows = []
    for (group,), members in names.partition_by("group", as_dict=True, maintain_order=True).items():
        if len(members) < 2:
            raise ExciseError(f"group {group!r} has one name only: held-out names need two in each group, or turn "
                              "held-out names off")  # fmt: skip
        order = sorted(
            zip(members["gender"].fill_null(""), members["subject"], strict=True),
            key=lambda name: (name[0], _lot(seed, group, name[1])),
        )
        rows += [(group, subject, ATTRIBUTION if place % 2 else EVALUATION) for place, (_, subject) in enumerate(order)]
    return pl.DataFrame(rows, schema=SPLIT_SCHEMA, orient="row").sort("group", "subject")


def token_matched(completions: pl.DataFrame) -> set[str]:
    """The largest set of names with equally many names of every group for every number of name tokens (method, A3).

    completions: group, subject and name_tokens; all groups in it are matched. A name counts as long as it is in its
    prompts: where it has different numbers of tokens in different prompts, it is matched with names that have the same.
    Names without a number of tokens are left out. Which names of a too large group are kept does not depend on their
    alphabetical order. Empty where no length is shared.
    """
    lengths = (
        completions.drop_nulls("name_tokens")
        .group_by("group", "subject")
        .agg(pl.col("name_tokens").unique().sort().alias("lengths"))
        .sort("group", "subject")
    )
    groups = completions["group"].unique().to_list()
    found: dict[tuple[int, ...], dict[str, list[str]]] = {}
    for group, subject, length in lengths.iter_rows():
        found.setdefault(tuple(length), {}).setdefault(group, []).append(subject)
    chosen: set[str] = set()
    for by_group in found.values():
        count = min(len(by_group.get(group, ())) for group in groups)
        for group, subjects in by_group.items():
            chosen.update(sorted(subjects, key=lambda subject: _lot(0, group, subject))[:count])
    return chosen


def _lot(seed: int, group: str, subject: str) -> bytes:
    """A name's place in a random order that depends on nothing but the seed, its group and itself."""
    return hashlib.sha256(f"{int(seed)}|{group}|{subject}".encode()).digest()
