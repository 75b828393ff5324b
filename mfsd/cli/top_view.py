# SPDX-License-Identifier: Apache-2.0
"""What `mfsctl top` shows: lines of a screen from one look at the daemon and what keys have chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from rich.text import Text

from mfsd.cli import output
from mfsd.cli.show import mode_text
from mfsd.ground import tables, units

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from mfsd.ground.tables import Side
    from mfsd.v1 import control_pb2 as pb

SORTS: Final[dict[str, Callable[[Row], tuple[float, ...]]]] = {
    "rate": lambda r: (-r.rate, r.connection.slot),
    "level": lambda r: (_place(r.connection.level), -r.rate, r.connection.slot),
    "left": lambda r: (-r.connection.bytes_left, r.connection.slot),
    "promotions": lambda r: (-r.connection.promotions, -r.connection.rescues, r.connection.slot),
}
"""Orders of connections by name; `s` goes to the next."""
HELP: Final = (
    ("s", "sort connections by the next of " + ", ".join(SORTS)),
    ("/", "show only what contains what is typed; Enter ends, Esc takes it back"),
    ("Tab", "choose among connections, or among deadlines at risk"),
    ("Up Down", "choose one"),
    ("Enter or e", "explain it"),
    ("d", "bands of the next device"),
    ("Space", "hold the picture, or let it go on"),
    ("h or ?", "this page"),
    ("q", "end"),
)
STAGES: Final = {0: "-", 1: "kv", 2: "coll", 3: "p2d", 4: "back"}
"""What a connection is for, in few letters."""
_BAR: Final = 10


def _place(level: int) -> int:
    """Unhinted, background and scavenger behind all levels."""
    return level if level >= 0 else 100 - level


@dataclass(frozen=True, slots=True)
class Row:
    """A connection, and bytes/s on the wire since the look before."""

    connection: pb.Connection
    rate: float

    @property
    def name(self) -> str:
        """Its local port and its peer; the address of this host tells nothing."""
        here, arrow, peer = self.connection.endpoints.partition(" -> ")
        if not arrow:
            return here or f"cookie {self.connection.cookie}"
        return f"{here.rpartition(':')[2]} -> {peer}"


@dataclass(frozen=True, slots=True)
class Look:
    """What the daemon said at one moment."""

    at: float
    """Seconds on any one clock."""
    status: pb.Status
    connections: Sequence[pb.Connection]
    transfers: Sequence[pb.TransferState]

    def rows(self, before: Look | None) -> list[Row]:
        """Connections with their rates; 0 without a look before, or where a slot has another connection now."""
        known: Mapping[tuple[int, int], int] = {}
        seconds = 0.0
        if before is not None and before.status.epoch == self.status.epoch:
            known = {(c.slot, c.cookie): c.bytes_sent for c in before.connections}
            seconds = self.at - before.at
        out = []
        for c in self.connections:
            was = known.get((c.slot, c.cookie), c.bytes_sent)
            out.append(Row(c, max(c.bytes_sent - was, 0) / seconds if seconds > 0 else 0.0))
        return out

    def per_second(self, before: Look | None, counter: str) -> float:
        """How fast a counter of the status grows."""
        if before is None or before.status.epoch != self.status.epoch or self.at <= before.at:
            return 0.0
        grown: int = getattr(self.status.counters, counter) - getattr(before.status.counters, counter)
        return grown / (self.at - before.at)


@dataclass(slots=True)
class Choice:
    """What keys have chosen."""

    sort: str = next(iter(SORTS))
    pane: Literal["connections", "risk"] = "connections"
    cursor: int = 0
    filter: str = ""
    typing: bool = False
    held: bool = False
    device: int = 0
    page: list[str] = field(default_factory=list)
    """Lines of a page that lies over everything: help, or why something is where it is."""

    def press(self, key: str) -> None:
        """Obey a key that needs nothing but this."""
        if key == "s":
            names = list(SORTS)
            self.sort, self.cursor = names[(names.index(self.sort) + 1) % len(names)], 0
        elif key == "/":
            self.typing, self.cursor = True, 0
        elif key == "escape":
            self.filter = ""
        elif key == "tab":
            self.pane, self.cursor = "risk" if self.pane == "connections" else "connections", 0
        elif key == "d":
            self.device += 1
        elif key == " ":
            self.held = not self.held
        elif key in ("h", "?"):
            self.page = ["Keys", "", *(f"  {k:<12}{what}" for k, what in HELP)]


def chosen_rows(look: Look, before: Look | None, choice: Choice) -> list[Row]:
    """Connections in order, as far as the filter lets them through."""
    kept = []
    for r in look.rows(before):
        c = r.connection
        stages = (names.get(c.stage, "") for names in (output.STAGES, STAGES))
        if _passes(choice, c.endpoints, r.name, c.session, c.band, *stages):
            kept.append(r)
    return sorted(kept, key=SORTS[choice.sort])


def at_risk(look: Look, choice: Choice) -> list[pb.TransferState]:
    """Transfers with a deadline, the least time to spare first."""
    timed = [
        t
        for t in look.transfers
        if t.HasField("laxity_s") and _passes(choice, t.id, t.request_id, t.session, output.STAGES.get(t.stage, ""))
    ]
    return sorted(timed, key=lambda t: t.laxity_s)


def _passes(choice: Choice, *texts: str) -> bool:
    return choice.filter.casefold() in " ".join(texts).casefold()


# --- lines ------------------------------------------------------------------------------------------------------------


def screen(look: Look, before: Look | None, choice: Choice, problem: str, width: int, height: int) -> list[Text]:
    """Lines for a terminal of this size: at most ``height`` of at most ``width`` columns."""
    if choice.page:
        lines = [Text(tables.printable(line)) for line in choice.page]
    else:
        lines = [*_head(look, before, width), *_bands(look, choice, width)]
        room = max(height - len(lines) - 3, 2)
        risk = at_risk(look, choice)
        for_risk = min(len(risk) + 1, max(room // 3, 2)) if risk else 0
        lines += _connections(look, before, choice, width, room - for_risk)
        lines += _risk(risk, choice, width, for_risk)
    lines = lines[: height - 1]
    lines += [Text()] * (height - 1 - len(lines)) + [_foot(choice, problem)]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines


def _head(look: Look, before: Look | None, width: int) -> list[Text]:
    s, c = look.status, look.status.counters
    late = sum(t.laxity_s < 0 for t in look.transfers if t.HasField("laxity_s"))
    first = f"mfsd {s.version}  {mode_text(s)}  {s.policy}  up {units.duration(s.uptime_s)}"
    more = f" (first {len(look.connections)})" if len(look.connections) < s.connections else ""
    second = (
        f"{units.of(s.connections, 'connection')}{more}  {units.of(s.transfers, 'transfer')}, {late} can't be in time  "
        f"met {units.count(c.deadlines_met)}  missed {units.count(c.deadlines_missed)}"
    )
    third = (
        f"promotions {units.count(c.promotions)} ({look.per_second(before, 'promotions'):.1f}/s)  "
        f"rescues {units.count(c.rescues)} ({look.per_second(before, 'rescues'):.1f}/s)  "
        f"tick p99 {s.tick_p99_ms:.2f} ms"
    )
    lines = [Text(first, "bold"), Text(second, "red" if late else ""), Text(third)]
    if s.notices:
        more = f"  (and {len(s.notices) - 1} more)" if len(s.notices) > 1 else ""
        lines.append(Text(tables.printable(f"! {s.notices[0]}{more}"), "yellow"))
    for line in lines:
        line.truncate(width)
    return lines


def _bands(look: Look, choice: Choice, width: int) -> list[Text]:
    devices = look.status.devices
    if not devices:
        return []
    d = devices[choice.device % len(devices)]
    which = f"  ({choice.device % len(devices) + 1} of {len(devices)})" if len(devices) > 1 else ""
    out = [
        Text(
            f"{d.name}{which}: {d.backend or 'observed only'}  rate {units.rate(d.rate_bytes_per_s)}  "
            f"measured {units.rate(d.measured_bytes_per_s)}  busy {d.utilisation:.0%}",
            "bold",
        )
    ]
    heads: list[tuple[str, Side, int]] = [
        ("band", "left", 10), ("conns", "right", 5), ("queued", "right", 7), ("guaranteed", "right", 11),
        ("got", "right", 11), ("", "left", _BAR),
    ]  # fmt: skip
    whole = d.rate_bytes_per_s or d.measured_bytes_per_s
    rows = []
    for b in d.bands:
        share = min(b.got_bytes_per_s / whole, 1.0) if whole else 0.0
        given = b.guaranteed_bytes_per_s or b.standing_bytes_per_s or b.floor_bytes_per_s
        rows.append(
            [b.name, str(b.connections), units.size(b.backlog_bytes), units.rate(given), units.rate(b.got_bytes_per_s),
             "#" * round(share * _BAR)]
        )  # fmt: skip
    return out + _table(heads, rows, width)


def _connections(look: Look, before: Look | None, choice: Choice, width: int, room: int) -> list[Text]:
    rows = chosen_rows(look, before, choice)
    heads: list[tuple[str, Side, int]] = [
        ("slot", "right", 5), (f"connections by {choice.sort}", "left", 0), ("for", "left", 4), ("band", "left", 10),
        ("rate", "right", 11), ("left", "right", 7), ("pro/res", "right", 7),
    ]  # fmt: skip
    cells = [
        [
            str(r.connection.slot), r.name, STAGES.get(r.connection.stage, "?"), r.connection.band or "-",
            units.rate(r.rate), units.size(r.connection.bytes_left),
            f"{r.connection.promotions}/{r.connection.rescues}",
        ]
        for r in rows
    ]  # fmt: skip
    return _table(heads, cells, width, room, choice.cursor if choice.pane == "connections" else -1)


def _risk(risk: Sequence[pb.TransferState], choice: Choice, width: int, room: int) -> list[Text]:
    if not room:
        return []
    heads: list[tuple[str, Side, int]] = [
        ("slot", "right", 5), ("least time to spare", "left", 0), ("request", "left", 12),
        ("left", "right", 7), ("due", "right", 8), ("spare", "right", 8), ("level", "right", 10),
    ]  # fmt: skip
    cells = [
        [
            str(t.slot) if t.slot >= 0 else "-", t.id, t.request_id, units.size(t.bytes_left),
            units.duration(t.deadline_us / 1e6), units.duration(t.laxity_s), output.level(t.level),
        ]
        for t in risk
    ]  # fmt: skip
    return _table(heads, cells, width, room, choice.cursor if choice.pane == "risk" else -1)


def _table(
    heads: Sequence[tuple[str, Side, int]],
    rows: Sequence[Sequence[str]],
    width: int,
    room: int | None = None,
    cursor: int = -1,
) -> list[Text]:
    """A table of this width; the column of width 0 gets what is left. ``room``: lines, the head included."""
    taken = sum(w for _, _, w in heads) + len(heads) - 1
    widths = [w or max(width - taken, 8) for _, _, w in heads]
    sides = [side for _, side, _ in heads]
    begin = 0
    if room is not None:
        begin = max(cursor - (room - 2), 0)
        rows = rows[begin : begin + max(room - 1, 0)]
    out = [Text(_line([head for head, _, _ in heads], sides, widths), "dim")]
    for n, row in enumerate(rows, begin):
        out.append(Text(_line(row, sides, widths), "reverse" if n == cursor else ""))
    return out


def _line(cells: Iterable[str], sides: Iterable[Side], widths: Iterable[int]) -> str:
    out = []
    for cell, side, width in zip(cells, sides, widths, strict=True):
        text = Text(tables.printable(cell))
        if text.cell_len > width and cell.endswith(tuple("0123456789")):  # ends of addresses and names tell more
            text = Text("…") + text[-(width - 1) :]
        text.truncate(width, overflow="ellipsis")
        text.align("right" if side == "right" else "left", width)
        out.append(text.plain)
    return " ".join(out)


def _foot(choice: Choice, problem: str) -> Text:
    if problem:
        return Text(f"! {tables.printable(problem)}", "red")
    if choice.typing:
        return Text(f"/{choice.filter}_")
    if choice.page:
        return Text("any key: back", "dim")
    words = "q end  s sort  / filter  Tab pane  Enter explain  h help"
    marks = [f"only {choice.filter!r}"] if choice.filter else []
    marks += ["held"] if choice.held else []
    return Text("  ".join([*marks, words]), "bold" if marks else "dim")
