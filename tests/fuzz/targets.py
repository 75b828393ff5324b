# SPDX-License-Identifier: Apache-2.0
"""What takes bytes that others made: each target takes any bytes, and raises only what is wrong with mfsd.

``make fuzz`` tries them for minutes (run.py), the tests of this tier the corpus and some hundred more.
"""

from __future__ import annotations

import contextlib
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError
from hypothesis import strategies as st
from support.harness import Host

from mfsd.api import columns
from mfsd.api.decode import Decoder, decode_selector
from mfsd.daemon.config import ConfigError, load, parse, render
from mfsd.datapath import links, tc
from mfsd.datapath.errors import DatapathError
from mfsd.datapath.undo import notes
from mfsd.engine.settings import LimitsConfig
from mfsd.ground.model import HintError
from mfsd.host import inet_diag, netlink
from mfsd.v1 import hints_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

CORPUS: Final = Path(__file__).parent / "corpus"


def hints(raw: bytes) -> None:
    """A message of a worker, decoded and applied; then time passes, and the session ends."""
    try:
        batch = pb.HintBatch.FromString(raw)
    except (DecodeError, UnicodeDecodeError):
        return
    host = Host("demand-bound", slots=64)
    host.socket(1)
    host.socket(2, uid=7)
    decoder = Decoder(LimitsConfig())
    for message in batch.hints:
        with contextlib.suppress(HintError):
            host.engine.apply(host.session, decoder.decode(message, host.now), host.now)
    with contextlib.suppress(HintError):
        decoded, _ = columns.transfers(decoder, batch.transfers, host.now)
        host.engine.transfers(host.session, decoded, host.now)
    with contextlib.suppress(HintError):
        for step in columns.progress(decoder, batch.progress, host.now):
            if not isinstance(step, HintError):
                with contextlib.suppress(HintError):
                    host.engine.apply(host.session, step, host.now)
    host.tick(0.01)
    host.tick(0.2)
    host.engine.end_session(host.session, host.now)
    host.tick(700.0)
    host.tick(700.0)
    assert not host.engine.books.sessions
    assert host.engine.books.everybody.bytes == 0, "something outlives its session"


def selectors(raw: bytes) -> None:
    """What names connections."""
    with contextlib.suppress(DecodeError, UnicodeDecodeError, HintError):
        hash(decode_selector("selector", pb.Selector.FromString(raw)))


def config(raw: bytes) -> None:
    """A configuration: refused with reasons, or it reads back."""
    with tempfile.TemporaryDirectory(prefix="mfsd-fuzz-") as folder:
        path = Path(folder) / "mfsd.toml"
        path.write_bytes(raw)
        with contextlib.suppress(ConfigError):
            found = load(path)
            assert parse(tomllib.loads(render(found))) == found


def note(raw: bytes) -> None:
    """A note of what was on a device: read, or named as unreadable."""
    with tempfile.TemporaryDirectory(prefix="mfsd-fuzz-") as folder:
        path = Path(folder) / "qdisc-eth0.2.1.json"
        path.write_bytes(raw)
        (found,) = notes.every(Path(folder))
        if isinstance(found, notes.Unreadable):
            assert str(found.error)
        else:
            found.before.replay(found.ifindex)


def replies(raw: bytes) -> None:
    """What comes from a netlink socket."""
    for m in netlink.messages(raw):
        for parser in (
            tc.parse_object,
            tc.StatsReader().read,
            links._link,
            inet_diag._answer,
            inet_diag._row,
            lambda m: m.code,
            lambda m: m.note,
        ):
            with contextlib.suppress(netlink.NetlinkError, DatapathError):
                parser(m)


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "hints": hints, "selectors": selectors, "config": config, "note": note, "replies": replies
}  # fmt: skip


def corpus(target: str) -> list[bytes]:
    """Inputs to begin with: what a target takes, and what it once tripped over."""
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


def mutated(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """Seeds with parts cut out, put in, repeated or overwritten."""
    edit = st.tuples(st.integers(0, 1 << 12), st.integers(0, 64), st.binary(max_size=24), st.integers(1, 4))

    def apply(seed: bytes, edits: list[tuple[int, int, bytes, int]]) -> bytes:
        for at, cut, put, times in edits:
            where = at % (len(seed) + 1)
            seed = seed[:where] + put * times + seed[where + cut :]
        return seed

    some = st.builds(apply, st.sampled_from(seeds), st.lists(edit, max_size=8))
    spliced = st.builds(lambda a, b: a[: len(a) // 2] + b[len(b) // 2 :], some, some)
    return st.one_of(some, spliced, st.binary(max_size=512))
