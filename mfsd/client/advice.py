# SPDX-License-Identifier: Apache-2.0
"""What paths can bear, asked of the daemon in the background, so that nobody who wants to know has to wait."""

from __future__ import annotations

import contextlib
import ipaddress
import math
import threading
import time
from dataclasses import dataclass
from typing import Final

import grpc

from mfsd.client.complaints import Complaints
from mfsd.client.introduction import Introduction
from mfsd.ground.wire import PATHS_MAX, TOKEN
from mfsd.v1 import hints_pb2, hints_pb2_grpc

REFRESH_S: Final = 0.05
"""How often paths are asked for."""
WANTED_S: Final = 5.0
"""A path that nobody has wanted for so long is not asked for any more."""
STALE_S: Final = 1.0
"""What is older than this is not told."""
TIMEOUT_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Advice:
    """One path, from the host that sends to ``dst``. Rates in bytes/s, sizes in bytes."""

    dst: str
    source: str
    rate: float
    """What the path gives alone."""
    spare: float
    """What of the sending device's rate nobody took lately."""
    queued: float
    """Announced to ``dst`` and not delivered."""
    device_queued: float
    """By the same device to anybody."""
    guaranteed: float = 0.0
    """Of the sending device's rate, to KV that would be late without it."""

    def least_s(self, size: float) -> float:
        """Seconds that so many bytes take if nothing goes before them."""
        return size / self.rate if self.rate else math.inf

    def expected_s(self, size: float) -> float:
        """Seconds that they take behind all that is announced on the device."""
        return (self.device_queued + size) / self.rate if self.rate else math.inf


def _no_address(text: object) -> str:
    """What stands for an address and is none; empty: it is one."""
    try:
        ipaddress.ip_address(text if isinstance(text, str) else "")
    except ValueError:
        return str(text) or "(nothing)"
    return ""


class Advisor:
    """Keeps answers for the paths that somebody asks for. Thread-safe."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._lock = threading.RLock()  # may be taken again, by a signal's handler
        self._complaints = Complaints()
        self._wanted: dict[tuple[str, str], float] = {}
        self._known: dict[tuple[str, str], tuple[float, Advice]] = {}
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None

    def get(self, dst: str, source: str) -> Advice | None:
        """The latest answer; None: there is none yet, or none any more."""
        now, path = time.monotonic(), (dst, source)
        with self._lock:
            new = path not in self._wanted
            if new and (wrong := _no_address(dst) or (source and _no_address(source))):
                self._complaints.once("address", "no advice about %r: it is no IP address", wrong)
                return None
            if new and len(self._wanted) >= PATHS_MAX:
                return None
            self._wanted[path] = now
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name="mfsd-advice", daemon=True)
                self._thread.start()
            at, advice = self._known.get(path, (-math.inf, None))
        if new:
            self._wake.set()
        return advice if now - at < STALE_S else None

    def close(self) -> None:
        """Idempotent."""
        self._closing = True
        self._wake.set()

    def _run(self) -> None:
        introduction = Introduction(self._target)
        try:
            with grpc.insecure_channel(self._target, options=[("grpc.enable_http_proxy", 0)]) as channel:
                stub = hints_pb2_grpc.HintsStub(channel)
                while not self._closing:
                    paths = self._paths()
                    # A daemon that is gone, hangs or is too old has nothing to say.
                    with contextlib.suppress(OSError, grpc.RpcError):
                        if paths:
                            self._ask(stub, paths, introduction.token())
                    self._wake.wait(REFRESH_S if paths else None)
                    self._wake.clear()
        finally:
            introduction.close()

    def _paths(self) -> list[tuple[str, str]]:
        """What somebody wants to know still."""
        now = time.monotonic()
        with self._lock:
            for path in [p for p, at in self._wanted.items() if now - at > WANTED_S]:
                del self._wanted[path]
                self._known.pop(path, None)
            return list(self._wanted)

    def _ask(self, stub: hints_pb2_grpc.HintsStub, paths: list[tuple[str, str]], token: str) -> None:
        request = hints_pb2.AdviseRequest(paths=[hints_pb2.Path(dst=dst, src=src) for dst, src in paths])
        reply = stub.Advise(request, timeout=TIMEOUT_S, metadata=((TOKEN, token),) if token else ())
        now = time.monotonic()
        with self._lock:
            for (dst, src), a in zip(paths, reply.advice, strict=False):
                if a.known:
                    advice = Advice(
                        dst, src, a.rate_bytes_per_s, a.spare_bytes_per_s, a.queued_bytes, a.device_queued_bytes,
                        a.guaranteed_bytes_per_s,
                    )  # fmt: skip
                    self._known[dst, src] = now, advice
