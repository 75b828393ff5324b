# SPDX-License-Identifier: Apache-2.0
"""Mooncake's transfer engine and Store over TCP, by the wrappers of mfsd.integrations.mooncake, with a real daemon.

    python scripts/mooncake_check.py --python VENV/bin/python        (make e2e-mooncake)

VENV has mooncake-transfer-engine-non-cuda and mfsd[client]'s dependencies; scripts/vllm_env.sh makes such a one. Two
processes on loopback: one holds memory and a segment of the Store, the other writes, reads, puts and gets. No root.
What is checked: the bytes are right, no hint is rejected, hints name the connections that the bytes take (each transfer
is seen to arrive), and all of it works when the daemon is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).resolve().parent.parent
HOST: Final = "127.0.0.1"
SIZE: Final = 8 << 20
ROUNDS: Final = 3
MOVES: Final = 5
"""Transfers of a round that are announced for a request: a write, a read, a batch, and two blocks of the Store."""
PORTS: Final = {"hold": (15000, 15099), "ask": (15100, 15199)}
STORE_PORTS: Final = (17001, 17999)
SEGMENT: Final = 256 << 20
MASTER: Final = "50071"
ANSWER_S: Final = 60.0


def need(status: Any, what: str) -> None:
    """End where Mooncake's status is not 0."""
    if status:
        sys.exit(f"{what}: status {status}")


def memory(engine: Any, size: int) -> tuple[Any, int]:
    """Registered memory, zero, and its address. Runs in the other environment, as all that follows to ``main``."""
    import numpy as np

    data = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
    need(engine.register_memory(int(data.ctypes.data), size), "register_memory")
    return data, int(data.ctypes.data)


def store() -> Any:
    """The Store, with a segment of its own if it is to hold something."""
    from mooncake.store import MooncakeDistributedStore

    one = MooncakeDistributedStore()
    segment = SEGMENT if sys.argv[2] == "hold" else 0
    failed = one.setup(HOST, "P2PHANDSHAKE", segment, 64 << 20, "tcp", "", f"{HOST}:{MASTER}")
    need(failed, "the Store's setup")
    return one


def hold() -> None:
    """Hold memory and a segment, until there are no questions any more."""
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    need(engine.initialize(HOST, "P2PHANDSHAKE", "tcp", ""), "initialize")
    data, address = memory(engine, SIZE)
    os.environ["MC_MIN_RPC_PORT"], os.environ["MC_MAX_RPC_PORT"] = map(str, STORE_PORTS)
    kept = store()
    tell(session=f"{HOST}:{engine.get_rpc_port()}", address=address)
    for _ in sys.stdin:
        tell(sum=int(data.sum(dtype="int64")), first=int(data[0]))
    del kept


def ask() -> None:
    """Move bytes to and from the other process, with hints."""
    from mooncake.engine import TransferEngine

    from mfsd.client import Client, Stage
    from mfsd.integrations.mooncake import HintedEngine, HintedStore, Owner

    there = json.loads(sys.stdin.readline())
    hints = Client()
    inner = TransferEngine()
    need(inner.initialize(HOST, "P2PHANDSHAKE", "tcp", ""), "initialize")
    data, address = memory(inner, SIZE)
    engine = HintedEngine(inner, hints, PORTS["hold"])
    stored = HintedStore(store(), hints, STORE_PORTS)
    need(stored.register_buffer(address, SIZE), "register_buffer")
    tell(ready=True)
    for line in sys.stdin:
        n = json.loads(line)
        hints.request(f"r{n}", ttft_left_s=30.0)
        late, early = Owner(f"r{n}", Stage.P2D), Owner(f"r{n}", Stage.KV_REUSE)
        data[:] = n
        out = {"write": engine.transfer_sync_write(there["session"], address, there["address"], SIZE, mfsd=late)}
        data[:] = 0
        out["read"] = engine.transfer_sync_read(there["session"], address, there["address"], SIZE, mfsd=early)
        out["read wrong"] = int((data != n).sum())
        half = SIZE // 2
        out["batch"] = engine.batch_transfer_sync_write(
            there["session"], [address, address + half], [there["address"], there["address"] + half], [half, half],
            mfsd=late,
        )  # fmt: skip
        out["put"] = stored.put(f"block {n}", bytes([n]) * SIZE)
        out["get wrong"] = int(stored.get(f"block {n}", mfsd=early) != bytes([n]) * SIZE)
        data[:] = 0
        out["get_into"] = stored.get_into(f"block {n}", address, SIZE, mfsd=early) - SIZE
        out["get_into wrong"] = int((data != n).sum())
        out["rejected"] = hints.stats.rejected
        hints.done(request=f"r{n}")
        tell(**out)
    hints.close()


def tell(**words: Any) -> None:
    """One line."""
    print("@" + json.dumps(words), flush=True)


# --- this environment -------------------------------------------------------------------------------------------------


class Worker:
    """One of the two."""

    def __init__(self, python: str, role: str, target: str, log: Path) -> None:
        low, high = PORTS[role]
        env = os.environ | {
            "MC_MIN_RPC_PORT": str(low), "MC_MAX_RPC_PORT": str(high), "MC_STORE_MEMCPY": "0", "MC_LOG_LEVEL": "ERROR",
            "MFSD_TARGET": target, "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        self.log = log
        with log.open("w") as sink:
            self.process = subprocess.Popen(
                [python, __file__, "--role", role], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink,
                text=True, env=env,
            )  # fmt: skip

    def hear(self) -> dict[str, Any]:
        """Its next word; Mooncake's own lines are not its."""
        for line in self.process.stdout or ():
            if line.startswith("@"):
                told: dict[str, Any] = json.loads(line[1:])
                return told
        sys.exit(f"a worker has ended; its log:\n{self.log.read_text()[-3000:]}")

    def say(self, word: Any) -> None:
        """One line."""
        pipe = self.process.stdin
        if pipe is not None:
            pipe.write(json.dumps(word) + "\n")
            pipe.flush()


@contextlib.contextmanager
def running(*command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block."""
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def check(python: str, folder: Path) -> list[str]:
    """What went wrong."""
    from mfsd.client.introduction import introduced
    from mfsd.v1 import control_pb2 as pb
    from mfsd.v1 import control_pb2_grpc as rpc

    target, problems = f"unix:{folder}/mfsd.sock", []
    config = folder / "mfsd.toml"
    config.write_text(f'[daemon]\nsocket = "{folder}/mfsd.sock"\nstate_dir = "{folder}"\nsockets = "listing"\n')
    master = (str(Path(python).parent / "mooncake_master"), f"--rpc_port={MASTER}", "--metrics_port=50072")
    daemon = (sys.executable, "-m", "mfsd.daemon", "--config", str(config))
    with running(*master, log=folder / "master.log"), running(*daemon, log=folder / "mfsd.log") as mfsd:
        until = time.monotonic() + ANSWER_S
        while not (folder / "mfsd.sock").exists() and time.monotonic() < until:
            time.sleep(0.1)
        workers = [Worker(python, role, target, folder / f"{role}.log") for role in PORTS]
        try:
            holds, asks = workers
            asks.say(holds.hear())
            asks.hear()
            for n in range(1, 2 * ROUNDS + 1):
                asks.say(n)
                told = asks.hear()
                holds.say("what is there?")
                there = holds.hear()
                print(f"round {n}: {told if any(told.values()) else 'all calls succeeded, all bytes are right'}")
                problems += [f"round {n}: {what} is {value}" for what, value in told.items() if value]
                if there != {"sum": n * SIZE, "first": n}:
                    problems.append(f"round {n}: {there} was written")
                if n == ROUNDS:
                    with introduced(target) as channel:
                        counters = rpc.ControlStub(channel).GetStatus(pb.GetStatusRequest(), timeout=10).counters
                    print(f"hints accepted {counters.hints_accepted}, rejected {counters.hints_rejected}; "
                          f"transfers completed {counters.transfers_completed}")  # fmt: skip
                    if counters.hints_rejected or counters.transfers_completed != MOVES * ROUNDS:
                        problems.append(f"not {MOVES * ROUNDS} transfers were seen to arrive, or hints were rejected")
                    mfsd.kill()
        finally:
            for one in workers:
                one.process.kill()
                one.process.wait()
    return problems


def main() -> None:
    """Start everything and look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of the environment that has Mooncake")
    with tempfile.TemporaryDirectory() as name:
        problems = check(parser.parse_args().python, Path(name))
    sys.exit("\n".join(problems) or None)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--role"]:
        {"hold": hold, "ask": ask}[sys.argv[2]]()
    else:
        main()
