# SPDX-License-Identifier: Apache-2.0
"""Whether the default policy does harm: transfers with a deadline beside anybody, against plain TCP.

The experiment is mfsd/lab/noharm.py: real TCP between two network namespaces, htb at 200 Mbit/s, the real daemon. A
transfer is *harmed* when plain TCP has it in time and the default policy hasn't, *helped* when it is the other way
round. What looks like harm is played twice again under both arms, and counts if most of the three say so: one late
wake-up of a busy machine is no harm. ``helped`` is given as share of what plain misses and the same transfer alone on
the link meets.

Besides single transfers there are sets that earliest deadline first would meet with SHARE of the link, and with the
time in hand that the policy wants for ticks, rescues and TCP (``edf_missed``: what the default misses of them).
``collective_slowdown`` compares how long collectives take until the last deadline with what they take under two-class,
where nothing stands above them, in cases in which transfers need no more than half of the link.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import click
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.common import Figure, write
from mfsd.ground import tables, units
from mfsd.lab.hosts.machine import take_precedence
from mfsd.lab.hosts.net import Fabric, LabError
from mfsd.lab.noharm import HOSTS, Arm, Beside, Case, Link, Outcome, Wanted
from mfsd.policy.demand_bound.load import Margin
from mfsd.policy.demand_bound.policy import DemandBound

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FACTORS: Final = (1.5, 3.0, 7.0)
"""Deadlines over the time alone."""
SIZES: Final = (0.001, 0.02, 0.2, 0.8, 2.0)
"""Seconds of the link."""
QUICK: Final = (0.02, 0.2)
SETS: Final = (2, 4, 8, 16)
SET_BESIDE: Final = (Beside.NOBODY, Beside.MARK, Beside.BURSTS_50, Beside.BULK_1)
SHARE: Final = 0.75
"""What a set needs of the link at most: the floors of all others keep a fifth of it."""
NONE: Final = Margin(0.0, 0.0)
HALF: Final = 0.5
AGAIN: Final = 2
"""So often again is played what looks like harm."""


@dataclass(slots=True)
class Row:
    """One case and what came of it."""

    case: Case
    alone: list[bool]
    """Each of its transfers would be in time if it were alone."""
    outcomes: dict[Arm, list[Outcome]] = field(default_factory=dict)

    def add(self, arm: Arm, outcome: Outcome) -> None:
        self.outcomes.setdefault(arm, []).append(outcome)

    def met(self, arm: Arm) -> list[bool]:
        """By transfer: in time, in most of the times that it was played."""
        return [sum(each) * 2 > len(each) for each in zip(*(o.met for o in self.outcomes[arm]), strict=True)]

    def missed(self, by: Arm, met_by: Arm = Arm.PLAIN) -> int:
        """Transfers that one arm misses and another has in time."""
        if by not in self.outcomes:
            return 0
        return sum(there and not here for here, there in zip(self.met(by), self.met(met_by), strict=True))

    @property
    def need(self) -> float:
        """Share of the link that meets all of it."""
        return demand(self.case.transfers)

    @property
    def slowdown(self) -> float | None:
        """Mean time of a collective over two-class's; None: there are none."""
        means = [mean(self.outcomes.get(arm, [])) for arm in (Arm.DEFAULT, Arm.TWO_CLASS)]
        return means[0] / means[1] if means[0] and means[1] else None


def mean(outcomes: Sequence[Outcome]) -> float:
    """Of all exchanges, seconds; 0 if there are none."""
    return statistics.fmean(e for o in outcomes for e in o.exchanges) if any(o.exchanges for o in outcomes) else 0.0


def demand(transfers: Sequence[Wanted], margin: Margin = NONE) -> float:
    """Share of the link that meets all in order of deadline, with some time in hand."""
    order = sorted(transfers, key=lambda t: t.due)
    work = np.cumsum([t.alone for t in order])
    return float((work / margin.leave(np.array([t.due for t in order]))).max())


def drawn(rng: np.random.Generator, count: int) -> tuple[Wanted, ...]:
    """A set of transfers that needs SHARE of the link with the margin of the default policy."""
    due = np.exp(rng.uniform(np.log(0.1), np.log(2.5), count))
    work = due * np.exp(rng.normal(-1.5, 1.0, count))
    some = [Wanted(w, d) for w, d in zip(work.tolist(), due.tolist(), strict=True)]
    factor = SHARE / demand(some, DemandBound(name="").margin)
    return tuple(Wanted(t.alone * factor, t.due) for t in some)


def groups(*, quick: bool) -> Iterator[list[Case]]:
    """Cases, each list beside the same competitor."""
    for beside in Beside:
        if beside is Beside.NOBODY:
            continue
        if quick:
            yield [Case.one(beside, QUICK[0], 3.0), *(Case.one(beside, QUICK[1], f) for f in FACTORS)]
        else:
            yield [Case.one(beside, size, f) for size in SIZES for f in FACTORS]
    rng = np.random.default_rng(13)
    counts = SETS[1:3] if quick else SETS
    for beside in SET_BESIDE[1:2] if quick else SET_BESIDE:
        yield [Case(beside, drawn(rng, count)) for count in counts]


class Suite:
    """Plays cases under all arms that have a say in them."""

    def __init__(self, fabric: Fabric, progress: Progress, *, quick: bool, yields: bool = False) -> None:
        """``yields``: with network.yield, for all arms with a daemon."""
        self.fabric, self.quick, self._yields = fabric, quick, yields
        self.groups = list(groups(quick=quick))
        self.rows: list[Row] = []
        """Of groups that all arms have played."""
        self._alone: dict[Wanted, bool] = {}
        self._progress = progress
        self._task = progress.add_task("", total=sum(len(g) * len(self.arms(g)) for g in self.groups))

    def arms(self, group: Sequence[Case]) -> list[Arm]:
        """Who plays a group: two-class is there for the time of collectives only."""
        out = [Arm.PLAIN, Arm.DEFAULT] if self.quick else [Arm.PLAIN, Arm.DEFAULT, Arm.MFS]
        return [*out, Arm.TWO_CLASS] if group[0].beside.collective else out

    def run(self) -> None:
        """Play everything. Raises LabError."""
        wanted = sorted({t for g in self.groups for c in g if len(c.transfers) == 1 for t in c.transfers},
                        key=lambda t: (t.alone, t.due))  # fmt: skip
        with Link(self.fabric, Arm.PLAIN) as link:
            for t in wanted:
                self._progress.update(self._task, description="alone")
                self._alone[t] = link.play(Case(Beside.NOBODY, (t,))).met[0]
        for group in self.groups:
            rows = [Row(case, [self._alone.get(t, t.alone < t.due) for t in case.transfers]) for case in group]
            for arm in self.arms(group):
                self._play(arm, rows)
            for _ in range(AGAIN):
                doubtful = [row for row in rows if any(self._harm(row))]
                for arm in (Arm.PLAIN, Arm.DEFAULT) if doubtful else ():
                    self._play(arm, doubtful, again=True)
            self.rows += rows

    def _harm(self, row: Row) -> list[bool]:
        """By transfer: it looked like harm at first."""
        plain, default = (row.outcomes[arm][0].met for arm in (Arm.PLAIN, Arm.DEFAULT))
        return [p and not d for p, d in zip(plain, default, strict=True)]

    def _play(self, arm: Arm, rows: Sequence[Row], *, again: bool = False) -> None:
        with Link(self.fabric, arm, yields=self._yields) as link:
            for row in rows:
                self._progress.update(self._task, description=f"{row.case.beside.value}, {arm.value}")
                half = row.case.beside.collective and row.need <= HALF
                row.add(arm, link.play(row.case, whole=half and arm in (Arm.DEFAULT, Arm.TWO_CLASS)))
                self._progress.advance(self._task, 0 if again else 1)


# --- what is said of it -----------------------------------------------------------------------------------------------

HEADS: Final[tuple[tuple[str, tables.Side], ...]] = (
    ("beside", "left"), ("alone", "right"), ("due", "right"), *((arm.value, "right") for arm in Arm),
    ("collectives", "right"), ("verdict", "left"),
)  # fmt: skip


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Times of single transfers, and how many of a set are in time."""
    return [
        [
            row.case.beside.value,
            *_case(row.case),
            *(_words(row, arm) for arm in Arm),
            "" if row.slowdown is None else f"x{row.slowdown:.2f}",
            _verdict(row),
        ]
        for row in rows
    ]


def _case(case: Case) -> tuple[str, str]:
    if _set(case):
        return f"{len(case.transfers)} transfers", units.duration(case.last)
    return units.duration(case.transfers[0].alone), units.duration(case.last)


def _set(case: Case) -> bool:
    return len(set(case.transfers)) > 1


def _words(row: Row, arm: Arm) -> str:
    outcomes = row.outcomes.get(arm)
    if not outcomes:
        return ""
    if _set(row.case):
        return f"{sum(row.met(arm))} in time"
    times = [t for o in outcomes for t in o.took]
    seen = [t for t in times if t is not None]
    late = "" if all(row.met(arm)) else " late"
    return f"{units.duration(statistics.median(seen))}{late}" if len(seen) * 2 > len(times) else "not seen"


def _verdict(row: Row) -> str:
    harmed, helped = row.missed(Arm.DEFAULT), row.missed(Arm.PLAIN, Arm.DEFAULT)
    words = [f"HARMED {harmed}" if harmed else "", f"helped {helped}" if helped else ""]
    if not any(words):
        met = sum(row.met(Arm.DEFAULT))
        words = ["both in time" if met == len(row.case.transfers) else "both late" if not met else "the same"]
    return ", ".join(w for w in words if w)


def figures(rows: Sequence[Row]) -> list[Figure]:
    """All figures."""
    single = [row for row in rows if not _set(row.case)]
    sets = [row for row in rows if _set(row.case)]
    able = sum(alone and not met for row in single for alone, met in zip(row.alone, row.met(Arm.PLAIN), strict=True))
    helped = sum(row.missed(Arm.PLAIN, Arm.DEFAULT) for row in single)
    transfers = sum(len(row.case.transfers) for row in rows)
    met = sum(sum(row.met(Arm.PLAIN)) for row in rows)
    bursts = [row for row in rows if row.slowdown and row.need <= HALF and row.case.beside is not Beside.MARK]
    out = [
        Figure.against("harmed", sum(row.missed(Arm.DEFAULT) for row in rows), "transfers", target=0, want="at most",
                       baseline=met),
        Figure.against("helped", helped, "transfers", target=able / 3, want="at least", baseline=able,
                       ratio=helped / able if able else None),
        Figure.against("edf_missed", sum(not m for row in sets for m in row.met(Arm.DEFAULT)), "transfers", target=0,
                       want="at most", baseline=sum(len(row.case.transfers) for row in sets)),
    ]  # fmt: skip
    if bursts:
        default, alone = (mean([o for row in bursts for o in row.outcomes[a]]) for a in (Arm.DEFAULT, Arm.TWO_CLASS))
        worst = max(row.slowdown or 0.0 for row in bursts)
        out += [
            Figure.against("collective_slowdown", default / alone, "x", target=1.35, want="at most"),
            Figure("collective_slowdown_worst", worst, "x"),
        ]
    if any(Arm.MFS in row.outcomes for row in rows):
        out += [
            Figure("mfs_harmed", sum(row.missed(Arm.MFS) for row in rows), "transfers", baseline=met),
            Figure("mfs_helped", sum(row.missed(Arm.PLAIN, Arm.MFS) for row in single if Arm.MFS in row.outcomes),
                   "transfers", baseline=able),
        ]  # fmt: skip
    return [*out, Figure("cases", len(rows), "cases"), Figure("transfers", transfers, "transfers")]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="A fifth of the cases, without mfs: under three minutes instead of thirty.")
@click.option("--yield", "yields", is_flag=True, help="With network.yield: build/bench/noharm-yield.json.")
def main(*, quick: bool, yields: bool) -> None:
    """Benchmark whether the default policy does harm: build/bench/noharm.json."""
    name = "noharm-yield" if yields else "noharm"
    rows: list[Row] = []
    columns = (TextColumn("{task.description:38}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    interrupted = False
    try:
        take_precedence()
        with Progress(*columns, transient=True) as progress, Fabric(HOSTS) as fabric:
            suite = Suite(fabric, progress, quick=quick, yields=yields)
            rows = suite.rows
            suite.run()
    except LabError as e:
        sys.exit(f"bench noharm: {e}")
    except KeyboardInterrupt:
        interrupted = True
    if rows:
        title = f"{name}, as far as it came" if interrupted else name
        tables.console().print(tables.table(HEADS, table(rows), title))
    if interrupted:
        sys.exit("bench noharm: interrupted; no figures")
    write(name, figures(rows))


if __name__ == "__main__":
    main()
