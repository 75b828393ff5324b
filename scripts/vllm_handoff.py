# SPDX-License-Identifier: Apache-2.0
"""Two real vLLM engines on this machine's CPU hand KV over by a connector of mfsd.integrations.vllm.

    sh scripts/vllm_env.sh build/venv-vllm
    python scripts/vllm_handoff.py --python build/venv-vllm/bin/python [--connector MfsdNixlPushConnector] [--case CASE]

No GPU, no root, no model: the engines are those of the vLLM experiment (mfsd/lab/vllm/engine.py), on loopback. In all
cases it is checked that decode goes on from prefill's token, and that no hint is rejected. The cases:

    handoff     each transfer is seen to arrive by its bytes
    kill, hang  the daemon goes after the first request, and the others do not notice
    cancel      a request is aborted while its KV comes; nothing of it is left at the daemon, the next one is served
    express     a tight read that is asked for later comes before a loose one that has begun (mfsd_express)
    hold        a loose read waits until a tight one is over (mfsd_hold)
    held        a request is aborted while its read waits; its blocks are free again
    give-up     reads are given up before they start, and decode computes what it does not load (mfsd_recompute)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, Final

from mfsd.client.introduction import introduced
from mfsd.lab.vllm.engine import MODEL, Config
from mfsd.v1 import control_pb2 as pb
from mfsd.v1 import control_pb2_grpc as rpc

ROOT: Final = Path(__file__).resolve().parent.parent
TOKENS: Final = 1000
MANY: Final = 3000
SHORT: Final = 200
SLO_MS: Final = 5000
SIDE_CHANNEL: Final = {"kv_producer": "5600", "kv_consumer": "5700"}
PORTS: Final = {"kv_producer": "20000-20099", "kv_consumer": "21000-21099"}
CASES: Final = ("handoff", "kill", "hang", "cancel", "express", "hold", "held", "give-up")


def __getattr__(name: str) -> Any:
    """A connector that gives every read up, for vLLM, which finds it here."""
    if name != "GivesUp":
        raise AttributeError(name)
    from mfsd.integrations.vllm import MfsdNixlConnector
    from mfsd.integrations.vllm.hold import Hold, Read

    class Nothing(Hold):
        def _choose(self, now: float) -> tuple[dict[str, Read], dict[str, Read]]:
            del now
            return {}, {**self.waiting, **self.aborted}

    class GivesUp(MfsdNixlConnector):  # type: ignore[misc]
        def _mfsd(self) -> Any:
            hints = super()._mfsd()
            if not isinstance(hints.hold, Nothing):
                hints.hold = Nothing()
            return hints

    return GivesUp


class Engine:
    """One engine in its process."""

    def __init__(self, python: str, role: str, connector: str, extra: dict[str, Any], folder: Path) -> None:
        module = "vllm_handoff" if connector == "GivesUp" else "mfsd.integrations.vllm"
        config = Config(str(folder / "model"), role, connector, module, {"num_threads": 0, **extra})
        env = os.environ | {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": SIDE_CHANNEL[role],
            "UCX_NET_DEVICES": "lo", "UCX_TCP_PORT_RANGE": PORTS[role], "PYTHONPATH": f"{ROOT}:{ROOT}/scripts",
        }  # fmt: skip
        self.log = folder / f"{role}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, "-m", "mfsd.lab.vllm.engine", json.dumps(dataclasses.asdict(config))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env,
            )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        """The next one."""
        line = _pipe(self.process.stdout).readline()
        if not line:
            sys.exit(f"an engine has ended; its log:\n{self.log.read_text()[-3000:]}")
        told: dict[str, Any] = json.loads(line)
        return told

    def ask(self, **question: Any) -> None:
        """One question."""
        pipe = _pipe(self.process.stdin)
        pipe.write(json.dumps(question) + "\n")
        pipe.flush()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None  # noqa: S101 - both were asked for
    return pipe


class Pair:
    """Prefill and decode."""

    def __init__(self, python: str, connector: str, extra: dict[str, Any], folder: Path) -> None:
        self.engines = [Engine(python, role, connector, extra, folder) for role in ("kv_producer", "kv_consumer")]
        self.prefill, self.decode = self.engines
        self.firsts: dict[str, int] = {}
        self.problems: list[str] = []

    def prefilled(self, name: str, tokens: int, slo_ms: float = SLO_MS) -> dict[str, Any]:
        """Let prefill compute; the question for decode."""
        xargs = {"mfsd_ttft_slo_ms": slo_ms}
        params = {"do_remote_decode": True, "do_remote_prefill": False}
        self.prefill.ask(id=name, tokens=tokens, seed=len(self.firsts), params=params, xargs=xargs)
        told = self.prefill.answer()
        if "mfsd_deadline_unix_ms" not in told["params"]:
            self.problems.append(f"{name}: the deadline was not passed on")
        question = {"id": name, "tokens": tokens, "seed": len(self.firsts), "params": told["params"], "xargs": xargs}
        self.firsts[name] = told["token"]
        return question

    def decoded(self) -> str:
        """Wait for decode's next token; whose it is."""
        told = self.decode.answer()
        print(f"{told['id']}: prefill {self.firsts[told['id']]}, decode {told['token']}")
        if told["token"] != self.firsts[told["id"]]:
            self.problems.append(f"{told['id']}: decode does not go on from prefill's token")
        return str(told["id"])

    def hand_over(self, name: str, tokens: int = TOKENS) -> None:
        """One request through both."""
        self.decode.ask(**self.prefilled(name, tokens))
        self.decoded()

    def check(self, right: bool, what: str) -> None:  # noqa: FBT001 - what is checked
        """Note what is not as it should be."""
        if not right:
            self.problems.append(what)


def play(case: str, pair: Pair, daemon: subprocess.Popen[bytes], requests: int) -> int:
    """One case; how many transfers must have been seen to arrive, -1: nobody knows."""
    pair.hand_over("first")
    if case in ("kill", "hang"):
        daemon.send_signal(signal.SIGKILL if case == "kill" else signal.SIGSTOP)
    elif case == "cancel":
        pair.decode.ask(**pair.prefilled("aborted", MANY))
        time.sleep(0.1)
        pair.decode.ask(cancel="aborted")
        time.sleep(2.0)
    elif case == "express":
        loose, tight = pair.prefilled("loose", MANY, 60_000), pair.prefilled("tight", SHORT)
        pair.decode.ask(**loose)
        time.sleep(0.05)
        pair.decode.ask(**tight)
        order = [pair.decoded() for _ in range(2)]
        pair.check(order == ["tight", "loose"], f"the tokens came in this order: {', '.join(order)}")
    elif case in ("hold", "held"):
        tight, loose = pair.prefilled("tight", MANY), pair.prefilled("loose", TOKENS, 60_000)
        pair.decode.ask(**tight)
        pair.decode.ask(**loose)
        if case == "held":
            time.sleep(0.05)
            pair.decode.ask(cancel="loose")
        order = [pair.decoded() for _ in range(1 if case == "held" else 2)]
        pair.check(order == ["tight", "loose"][: len(order)], f"the tokens came in this order: {', '.join(order)}")
    for n in range(requests):
        pair.hand_over(f"request {n}", MANY if n % 2 else TOKENS)
    known = {"handoff": 1, "express": 3, "hold": 3, "held": 2}
    return known[case] + requests if case in known else 0 if case == "give-up" else -1


def status(target: str) -> pb.Status:
    """Of the daemon."""
    with introduced(target) as channel:
        return rpc.ControlStub(channel).GetStatus(pb.GetStatusRequest(), timeout=10)


def left(target: str) -> list[str]:
    """Transfers that the daemon still waits for."""
    with introduced(target) as channel:
        found = rpc.ControlStub(channel).ListTransfers(pb.ListTransfersRequest(), timeout=10).transfers
        return [t.id for t in found]


def run(options: argparse.Namespace, folder: Path, daemon: subprocess.Popen[bytes]) -> list[str]:
    """Play a case; what went wrong."""
    target = f"unix:{folder}/mfsd.sock"
    extra = {"mfsd_target": target, "mfsd_hold": options.case in ("hold", "held", "give-up")}
    extra["mfsd_express"] = options.case == "express"
    extra["mfsd_recompute"] = options.case == "give-up"
    pair = Pair(options.python, "GivesUp" if options.case == "give-up" else options.connector, extra, folder)
    try:
        for one in pair.engines:
            one.answer()
        arrived = play(options.case, pair, daemon, options.requests)
        if options.case not in ("kill", "hang"):
            time.sleep(1.0)
            counters = status(target).counters
            print(f"hints accepted {counters.hints_accepted}, rejected {counters.hints_rejected}; "
                  f"transfers completed {counters.transfers_completed}")  # fmt: skip
            pair.check(not counters.hints_rejected, "hints were rejected")
            pair.check(arrived in (-1, counters.transfers_completed), f"not {arrived} transfers were seen to arrive")
            pair.check(not left(target), f"the daemon still waits for {', '.join(left(target))}")
    finally:
        for one in pair.engines:
            one.process.kill()
            one.process.wait()
    return pair.problems


def main() -> None:
    """Start a daemon and two engines, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of the environment that has vLLM")
    parser.add_argument("--connector", default="MfsdNixlConnector")
    parser.add_argument("--requests", type=int, default=3, help="after what is special of the case")
    parser.add_argument("--case", choices=CASES, default=CASES[0])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps(MODEL))
        config = folder / "mfsd.toml"
        config.write_text(f'[daemon]\nsocket = "{name}/mfsd.sock"\nstate_dir = "{name}"\nsockets = "listing"\n')
        daemon = subprocess.Popen(
            [sys.executable, "-m", "mfsd.daemon", "--config", str(config)], stdout=subprocess.DEVNULL
        )
        try:
            while not (folder / "mfsd.sock").exists():
                if daemon.poll() is not None:
                    sys.exit("the daemon has ended")
                time.sleep(0.1)
            problems = run(options, folder, daemon)
        finally:
            daemon.send_signal(signal.SIGCONT)
            daemon.terminate()
            daemon.wait()
    sys.exit("\n".join(problems) or None)


if __name__ == "__main__":
    main()
