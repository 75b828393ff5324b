# SPDX-License-Identifier: Apache-2.0
"""The engines as the experiment sees them: processes that are asked and answer, in their namespaces."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import threading
from typing import IO, TYPE_CHECKING, Any, Final, Self

from mfsd.lab.hosts.governor import ROOT, environment, python
from mfsd.lab.hosts.net import DEVICE, LabError
from mfsd.lab.vllm.engine import MODEL, Config
from mfsd.lab.vllm.hosts import DECODE, PREFILL, UCX_PORTS, Arm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mfsd.lab.hosts.governor import Governor
    from mfsd.lab.hosts.net import Host

START_S: Final = 240.0
END_S: Final = 10.0
SIDE_CHANNEL: Final = "5600"
NEEDS: Final = "import vllm, nixl_cu12, grpc, google.protobuf"


def check(interpreter: Path) -> None:
    """Raise LabError when an environment has not what an engine needs."""
    try:
        done = subprocess.run([interpreter, "-c", NEEDS], capture_output=True, text=True, check=False)
    except OSError as e:
        raise LabError(f"{interpreter}: {e.strerror}; make e2e-vllm makes such an environment") from e
    if done.returncode:
        complaint = done.stderr.strip().rpartition("\n")[2]
        raise LabError(f"{interpreter}: {complaint}; make e2e-vllm makes an environment that has everything")


class Engine:
    """One engine. ``on_answer`` is called from a thread of its own."""

    def __init__(self, interpreter: Path, host: Host, config: Config, log: Path) -> None:
        self.log, self.name = log, host.name
        self.on_answer: Callable[[dict[str, Any]], None] = lambda _: None
        self.ready = threading.Event()
        enter = [*python("mfsd.lab.hosts.enter"), host.namespace, str(os.getpid())]
        words = [str(interpreter), "-m", "mfsd.lab.vllm.engine", json.dumps(dataclasses.asdict(config))]
        env = environment() | {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": host.address,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": SIDE_CHANNEL,
            "UCX_NET_DEVICES": DEVICE,
            "UCX_TCP_PORT_RANGE": UCX_PORTS,
        }
        with log.open("ab") as sink:
            # A session of its own, so that what vLLM starts can be ended with it.
            self._process = subprocess.Popen(
                [*enter, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True, env=env,
                cwd=ROOT, start_new_session=True,
            )  # fmt: skip
        self._thread = threading.Thread(target=self._read, name=f"engine {host.name}", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in _pipe(self._process.stdout):
            answer = json.loads(line)
            if "ready" in answer:
                self.ready.set()
            else:
                self.on_answer(answer)

    def wait(self) -> None:
        """Until it serves. Raises LabError with the end of its log."""
        for _ in range(int(START_S)):
            if self.ready.wait(1.0):
                return
            self.check()
        raise LabError(f"vLLM in {self.name} has not started within {START_S:.0f} s: {self.log}")

    def check(self) -> None:
        """Raise LabError when it has ended."""
        if self._process.poll() is not None:
            end = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise LabError(f"vLLM in {self.name} has ended; the end of its log:\n{end}")

    def ask(self, **question: Any) -> None:
        """One question; from any thread."""
        pipe = _pipe(self._process.stdin)
        try:
            pipe.write(json.dumps(question) + "\n")
            pipe.flush()
        except OSError:
            self.check()
            raise

    def close(self) -> None:
        """End it and what it has started."""
        _pipe(self._process.stdin).close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._thread.join()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None  # noqa: S101 - both were asked for
    return pipe


class Pair:
    """A prefill and a decode engine. A context manager: entering waits until both serve. Raises LabError."""

    def __init__(
        self, interpreter: Path, hosts: dict[str, Host], governors: dict[str, Governor], arm: Arm, folder: Path
    ) -> None:
        self._interpreter, self._hosts, self._governors, self._folder = interpreter, hosts, governors, folder
        self._hinted = arm is Arm.CONNECTOR
        self._engines: list[Engine] = []

    def __enter__(self) -> Self:
        model = self._folder / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
        try:
            for name, role in ((PREFILL, "kv_producer"), (DECODE, "kv_consumer")):
                # One connection instead of five: each has a thread, and there are two processors.
                extra: dict[str, Any] = {"num_threads": 0}
                if self._hinted:
                    extra |= {"mfsd_target": self._governors[name].target, "mfsd_express": True}
                config = Config(
                    str(model), role, "MfsdNixlConnector" if self._hinted else "NixlConnector",
                    "mfsd.integrations.vllm" if self._hinted else None, extra,
                )  # fmt: skip
                log = self._folder / f"vllm-{name}.log"
                self._engines.append(Engine(self._interpreter, self._hosts[name], config, log))
            for engine in self._engines:
                engine.wait()
        except BaseException:
            self.close()
            raise
        self.prefill, self.decode = self._engines
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End both."""
        for engine in self._engines:
            engine.close()
        self._engines = []
