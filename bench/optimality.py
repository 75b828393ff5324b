# SPDX-License-Identifier: Apache-2.0
"""Attainment of every policy on random single-link cases, against clairvoyant LLF and brute force.

Exact fluid link (mfsd/lab/sim/singlelink.py), policies asked every 10 ms and at every event. Three kinds of cases, each
five load classes: many batches with first tokens after tens of milliseconds; the same ten times slower; and small ones
(at most six transfers) on which all fixed orders are tried. All policies see the same cases. Rivals run with as many
levels as the best equipped qdisc has (13) and, where that is defined, with one level per distinct key, which no qdisc
could do; the better of the two counts.

The optimum of a case is the most that clairvoyant LLF, or on small cases any fixed order, meets. LLF with give-up,
which is stronger under overload, stands beside it. Ours is the default policy with its default parameters.
"""

from __future__ import annotations

import dataclasses
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from bench.common import Figure, parser, write
from mfsd.ground import tables
from mfsd.lab.sim.cases import LOADS, SMALL, Shape, brute_force, draw
from mfsd.lab.sim.decide import simulate
from mfsd.policy.registry import DEFAULT, make_policy

if TYPE_CHECKING:
    from mfsd.policy.base import Policy

PERIOD_S: Final = 0.010
EXACT_LEVELS: Final = 4096
SEED: Final = 20260318

FAST: Final = Shape()
SLOW: Final = dataclasses.replace(FAST, rate=FAST.rate / 10, compute=(FAST.compute[0] * 10, FAST.compute[1] * 10))


@dataclass(frozen=True)
class Kind:
    """A family of cases."""

    shape: Shape
    cases: int
    """Per load class."""
    limit: int = 0
    """Most transfers; with a limit brute force is tried."""


LADDER: Final = "deadline-ladder"
KINDS: Final = {"fast": Kind(FAST, 10), "slow": Kind(SLOW, 6), "small": Kind(SMALL, 40, 6)}

OURS: Final[dict[str, tuple[str, int | None, dict[str, float | int | bool | str]]]] = {
    DEFAULT: (DEFAULT, None, {}),
    f"{DEFAULT} 13 levels": (DEFAULT, 13, {}),
    LADDER: (LADDER, None, {}),
    f"{LADDER} 13 levels": (LADDER, 13, {}),
    f"{LADDER} kv=rli": (LADDER, 13, {"kv": "rli", "early_levels": 6}),
    f"{LADDER} no give-up": (LADDER, None, {"give_up": False}),
    f"{LADDER} no promotion": (LADDER, None, {"promotion": False}),
    "mfs": ("mfs", 13, {}),
    "mfs 8 levels": ("mfs", 8, {}),
    "mfs-nop1": ("mfs-nop1", 13, {}),
    "mfs-giveup": ("mfs-giveup", 13, {}),
    **{f"mfs no {switch}": ("mfs", 13, {switch: False}) for switch in ("rli", "mlu", "red", "pruning", "promotion")},
    "mfs size=transfer": ("mfs", 13, {"size": "transfer"}),
    "mfs origin=0": ("mfs", 13, {"origin": 0}),
    "mfs rho=above": ("mfs", 13, {"rho": "above"}),
    "mfs arbitration=level": ("mfs", 13, {"arbitration": "level"}),
}
RIVALS: Final[dict[str, tuple[tuple[str, int | None, dict[str, float | int | bool | str]], ...]]] = {
    "fair": (("fair", None, {}),),
    "two-class": (("two-class", None, {}),),
    "sjf": (("sjf", 13, {}), ("sjf", EXACT_LEVELS, {"exact": True})),
    "srpt": (("srpt", 13, {}), ("srpt", EXACT_LEVELS, {"exact": True})),
    "edf": (("edf", 13, {}), ("edf", EXACT_LEVELS, {"exact": True})),
    "edf-all": (("edf-all", 13, {}), ("edf-all", EXACT_LEVELS, {"exact": True})),
    "karuna": (("karuna", 13, {}),),
    "pias": (("pias", 13, {}),),
    "sincronia": (("sincronia", 13, {}), ("sincronia", EXACT_LEVELS, {})),
}


def contestants() -> dict[str, Policy]:
    """All policies by the name under which they are counted; variants of one rival are told apart by a number."""
    out = {label: make_policy(*spec) for label, spec in OURS.items()}
    out |= {f"{label}#{i}": make_policy(*spec) for label, specs in RIVALS.items() for i, spec in enumerate(specs)}
    return out | {"llf": make_policy("llf"), "llf give-up": make_policy("llf", None, {"give_up": True})}


def run(job: tuple[str, str, int]) -> dict[str, int]:
    """Requests in time by contestant for one case; "requests", "optimum" and "strict optimum" besides."""
    name, load, seed = job
    kind = KINDS[name]
    rng = np.random.default_rng([SEED, list(KINDS).index(name), list(LOADS).index(load), seed])
    case = draw(rng, LOADS[load], kind.shape, kind.limit)
    met = {label: simulate(case, policy, PERIOD_S).count for label, policy in contestants().items()}
    best = max(met["llf"], brute_force(case)) if kind.limit else met["llf"]
    return met | {"requests": case.requests, "optimum": best, "strict optimum": max(best, met["llf give-up"])}


Counts = dict[str, dict[tuple[str, str], int]]
"""Label -> (kind, load class) -> requests in time."""


def measure() -> Counts:
    """All cases, on all cores."""
    jobs = [(kind, load, i) for kind in KINDS for load in LOADS for i in range(KINDS[kind].cases)]
    counts: Counts = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for (kind, load, _), met in zip(jobs, pool.map(run, jobs, chunksize=4), strict=True):
            for label, n in met.items():
                cell = counts.setdefault(label, {})
                cell[kind, load] = cell.get((kind, load), 0) + n
    for label, specs in RIVALS.items():
        variants = [counts.pop(f"{label}#{i}") for i in range(len(specs))]
        counts[label] = {key: max(v[key] for v in variants) for key in variants[0]}
    return counts


def share(counts: Counts, label: str, kinds: tuple[str, ...], load: str, of: str = "requests") -> float:
    """Requests of ``label`` in time over those of ``of``, in one load class of some kinds."""
    return sum(counts[label][k, load] for k in kinds) / sum(counts[of][k, load] for k in kinds)


def table(counts: Counts, kinds: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Attainment per label and load class, with the mean over the classes."""
    out = {}
    for label in [*OURS, *RIVALS, "llf", "llf give-up", "optimum", "strict optimum"]:
        row = {load: share(counts, label, kinds, load) for load in LOADS}
        out[label] = row | {"mean": sum(row.values()) / len(row)}
    return out


def figures(counts: Counts) -> list[Figure]:
    """The figures; ratios are over the sums of requests."""
    every, large = tuple(KINDS), tuple(k for k in KINDS if not KINDS[k].limit)

    def total(label: str, kinds: tuple[str, ...] = every) -> int:
        return sum(counts[label][k, load] for k in kinds for load in LOADS)

    def best_rival(load: str) -> float:
        return max(share(counts, rival, every, load) for rival in RIVALS)

    over_rival = {load: share(counts, DEFAULT, every, load) / best_rival(load) for load in LOADS}
    optimum = total(DEFAULT) / total("optimum")
    out = [
        Figure.against("best_over_optimum", optimum, "ratio", target=0.95, want="at least"),
        Figure.against("best_over_best_rival", min(over_rival.values()), "ratio", target=1.0, want="at least"),
        Figure("mfs_over_two_class", total("mfs") / total("two-class"), "ratio"),
        Figure("mfs_over_two_class_large", total("mfs", large) / total("two-class", large), "ratio"),
        Figure("best_over_ladder", total(DEFAULT) / total(LADDER), "ratio"),
        Figure("best_over_mfs", total(DEFAULT) / total("mfs"), "ratio"),
        Figure("best_over_strict_optimum", total(DEFAULT) / total("strict optimum"), "ratio"),
        Figure("best_over_optimum_small", total(DEFAULT, ("small",)) / total("optimum", ("small",)), "ratio"),
        Figure("best_over_optimum_large", total(DEFAULT, large) / total("optimum", large), "ratio"),
    ]
    for load in LOADS:
        ours, rival = share(counts, DEFAULT, every, load), best_rival(load)
        out.append(Figure(f"best_over_optimum_{load}", share(counts, DEFAULT, every, load, "optimum"), "ratio"))
        out.append(Figure(f"attainment_{load}", ours, "share", baseline=rival, ratio=ours / rival))
    return out


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Print an attainment table."""
    heads: list[tuple[str, tables.Side]] = [("policy", "left"), *((load, "right") for load in [*LOADS, "mean"])]
    cells = ([label, *(f"{x:.3f}" for x in row.values())] for label, row in rows.items())
    tables.console().print(tables.table(heads, cells, title))


def main() -> None:
    """Measure and report."""
    parser(__doc__).parse_args()
    counts = measure()
    shares = {kind: table(counts, (kind,)) for kind in KINDS}
    for kind, rows in shares.items():
        requests = sum(counts["requests"][kind, load] for load in LOADS)
        show(f"{kind}: share of {requests} requests in time", rows)
    path = write("optimality", figures(counts))
    report = json.loads(path.read_text()) | {"attainment": shares}
    path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
