# SPDX-License-Identifier: Apache-2.0
"""TCA_OPTIONS of the qdiscs that mfsd makes or puts back, as the kernel lays them out (htb, tbf, drr, ets)."""

from __future__ import annotations

import struct
from typing import Final

from mfsd.host import netlink as nl

# include/uapi/linux/pkt_sched.h
TCA_HTB_PARMS: Final = 1
TCA_HTB_INIT: Final = 2
TCA_HTB_RATE64: Final = 6
TCA_HTB_CEIL64: Final = 7
TCA_HTB_OFFLOAD: Final = 9
TCA_TBF_PARMS: Final = 1
TCA_TBF_RATE64: Final = 4
TCA_DRR_QUANTUM: Final = 1
TCA_ETS_NBANDS: Final = 1
TCA_ETS_NSTRICT: Final = 2
TCA_ETS_QUANTA: Final = 3
TCA_ETS_QUANTA_BAND: Final = 4
TCA_ETS_PRIOMAP: Final = 5
TCA_ETS_PRIOMAP_BAND: Final = 6
RATESPEC: Final = struct.Struct("=BBHhHI")
"""struct tc_ratespec: cell_log, linklayer, overhead, cell_align, mpu, rate."""
HTB_GLOB: Final = struct.Struct("=IIIII")
"""struct tc_htb_glob: version, rate2quantum, defcls, debug, direct_pkts."""
HTB_VERSION: Final = 3
"""Of requests; dumps say 0x30011 (HTB_VER, net/sched/sch_htb.c)."""
HTB_OPT: Final = struct.Struct("=12s12sIIIII")
"""struct tc_htb_opt: rate, ceil, buffer, cbuffer, quantum, level, prio."""
TBF_QOPT: Final = struct.Struct("=12s12sIII")
"""struct tc_tbf_qopt: rate, peakrate, limit, buffer, mtu."""
LINKLAYER_ETHERNET: Final = 1
U32_MAX: Final = 0xFFFFFFFF

_TICK_NS: Final = 64
"""One psched tick (PSCHED_SHIFT, include/net/pkt_sched.h)."""


def ticks(size: int, rate: int) -> int:
    """Time to send ``size`` bytes at ``rate`` bytes/s in psched ticks, rounded up as tc does (tc_calc_xmittime)."""
    return min(-(-size * 1_000_000_000 // (rate * _TICK_NS)), U32_MAX)


def ratespec(rate: int) -> bytes:
    """A struct tc_ratespec for a rate in bytes/s; what is beyond 32 bits goes to a RATE64 attribute beside it."""
    return RATESPEC.pack(0, LINKLAYER_ETHERNET, 0, 0, 0, min(rate, U32_MAX))


def wide(kind: int, rate: int) -> bytes:
    """That attribute; nothing where 32 bits are enough."""
    return nl.attr(kind, struct.pack("=Q", rate)) if rate > U32_MAX else b""


def settings(kind: str, of: str, options: bytes | None) -> dict[str, int | bytes]:
    """What can be compared of TCA_OPTIONS, by name; rates in bytes/s, buffers in psched ticks."""
    raw = options or b""
    if kind == "htb":
        found = nl.attrs(raw)
        return _htb_class(found) if of == "class" else _htb_qdisc(found)
    if kind == "tbf" and of == "qdisc":
        return _tbf(nl.attrs(raw))
    if kind == "drr" and of == "class":
        return {"quantum": struct.unpack("=I", nl.attrs(raw)[TCA_DRR_QUANTUM])[0]}
    if kind == "ets":
        return _ets_class(nl.attrs(raw)) if of == "class" else _ets_qdisc(nl.attrs(raw))
    return {"options": raw} if raw and kind == "prio" else {}


def _htb_qdisc(found: dict[int, bytes]) -> dict[str, int | bytes]:
    if TCA_HTB_INIT not in found:
        return {}
    _, r2q, default, _, _ = HTB_GLOB.unpack_from(found[TCA_HTB_INIT])
    return {"r2q": r2q, "default": default}


def _htb_class(found: dict[int, bytes]) -> dict[str, int | bytes]:
    if TCA_HTB_PARMS not in found:
        return {}
    rate, ceil, buffer, cbuffer, quantum, _, prio = HTB_OPT.unpack_from(found[TCA_HTB_PARMS])
    return {
        "rate": _rate(rate, found.get(TCA_HTB_RATE64)),
        "ceil": _rate(ceil, found.get(TCA_HTB_CEIL64)),
        "buffer": buffer,
        "cbuffer": cbuffer,
        "quantum": quantum,
        "prio": prio,
    }


def _tbf(found: dict[int, bytes]) -> dict[str, int | bytes]:
    if TCA_TBF_PARMS not in found:
        return {}
    rate, _, limit, buffer, _ = TBF_QOPT.unpack_from(found[TCA_TBF_PARMS])
    return {"rate": _rate(rate, found.get(TCA_TBF_RATE64)), "limit": limit, "buffer": buffer}


def _ets_qdisc(found: dict[int, bytes]) -> dict[str, int | bytes]:
    if TCA_ETS_NBANDS not in found:
        return {}
    return {  # the weights are looked at in the classes
        "bands": found[TCA_ETS_NBANDS][0],
        "strict": found.get(TCA_ETS_NSTRICT, b"\0")[0],
        "priomap": bytes(band[0] for band in nl.listed(found.get(TCA_ETS_PRIOMAP, b""))),
    }


def _ets_class(found: dict[int, bytes]) -> dict[str, int | bytes]:
    quantum = found.get(TCA_ETS_QUANTA_BAND)
    return {} if quantum is None else {"quantum": struct.unpack("=I", quantum)[0]}


def _rate(spec: bytes, wide: bytes | None) -> int:
    narrow = int(RATESPEC.unpack(spec)[5])
    return max(narrow, struct.unpack("=Q", wide)[0]) if wide else narrow
