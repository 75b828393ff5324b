# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine on the CPU, with dummy weights and KV of a real size. Runs in an environment that has vLLM.

Questions come as lines of JSON, and so do answers. A question is {id, tokens, seed, params, xargs} or {cancel: id}; an
answer {id, token, params, at}: the first token, what goes to the router, and when, in monotonic seconds. The first line
is {ready: true}. Imports nothing of mfsd, which this environment has as a client only.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import sys
from dataclasses import dataclass
from time import monotonic
from typing import IO, Any, Final

BLOCK: Final = 32
MODEL: Final = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 32, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 1024,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "torch_dtype": "bfloat16", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Llama-3-8B's KV (32 layers, 8 heads of 128), and next to nothing to compute."""
TOKEN: Final = 2 * 32 * 8 * 128 * 2
"""Bytes of KV per token in bfloat16: 128 KiB."""
ENVIRONMENT: Final = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "UCX_TLS": "tcp", "UCX_LOG_LEVEL": "error",
}  # fmt: skip
IDLE_S: Final = 0.002
"""Between two steps of an engine that waits for the network."""
PROGRESS_US: Final = 200
"""Between two looks of NIXL's progress thread, which otherwise takes a whole processor for itself."""
NICE: Final = 5
"""Computing gives way to daemons and to the transports, as it would on a host with a GPU."""
AMX_TILE_DATA: Final = 18
ARCH_PRCTL: Final = (158, 0x1023)
"""The system call on x86-64, and ARCH_REQ_XCOMP_PERM: vLLM's attention uses AMX tiles without asking for them."""


@dataclass(frozen=True, slots=True)
class Config:
    """Of one engine; goes to it as JSON."""

    model: str
    """Folder with its config.json."""
    role: str
    connector: str
    module: str | None
    """Where the connector is; None: vLLM's own."""
    extra: dict[str, Any]
    """kv_connector_extra_config."""


def build(config: Config) -> Any:
    """Make the engine."""
    from vllm import EngineArgs, LLMEngine  # noqa: PLC0415 - of the other environment
    from vllm.config import KVTransferConfig  # noqa: PLC0415 - as above

    more = {} if config.module is None else {"kv_connector_module_path": config.module}
    transfer = KVTransferConfig(
        kv_connector=config.connector, kv_role=config.role, kv_buffer_device="cpu",
        kv_load_failure_policy="recompute", kv_connector_extra_config=config.extra, **more,
    )  # fmt: skip
    return LLMEngine.from_engine_args(
        EngineArgs(
            model=config.model, load_format="dummy", skip_tokenizer_init=True, enforce_eager=True, block_size=BLOCK,
            max_model_len=4096, dtype="bfloat16", enable_prefix_caching=False, max_num_batched_tokens=4096,
            kv_transfer_config=transfer,
        )
    )  # fmt: skip


def calm() -> None:
    """Let NIXL's progress thread sleep between two looks."""
    from nixl_cu12 import _api  # noqa: PLC0415 - as above

    agent = _api.nixlBind.nixlAgent

    def calmer(name: str, config: Any) -> Any:
        config.pthrDelay = PROGRESS_US
        return agent(name, config)

    _api.nixlBind.nixlAgent = calmer


def prompt(tokens: int, seed: int) -> list[int]:
    """Token ids."""
    return [(i * 7 + seed * 131) % 1000 + 3 for i in range(tokens)]


class Served:
    """Questions in, answers out, steps in between."""

    def __init__(self, engine: Any, out: IO[str]) -> None:
        self.engine, self.out = engine, out
        self.ids: dict[str, str] = {}
        """vLLM's own, by ours."""

    def run(self) -> None:
        """Until there are no questions any more."""
        self.say(ready=True)
        busy, rest = False, b""
        while True:
            if select.select([0], [], [], 0 if busy else IDLE_S)[0]:
                read = os.read(0, 1 << 20)
                if not read:
                    return
                *lines, rest = (rest + read).split(b"\n")
                for line in lines:
                    self.ask(json.loads(line))
            # A prefill engine that nobody asks must step too: it learns there that its KV has been fetched.
            outputs = self.engine.step()
            busy = bool(outputs)
            for one in outputs:
                self.answer(one)

    def ask(self, question: dict[str, Any]) -> None:
        """One question."""
        if "cancel" in question:
            found = self.ids.pop(question["cancel"], None)
            if found is not None:
                self.engine.abort_request([found], internal=True)
            return
        from vllm import SamplingParams  # noqa: PLC0415 - of the other environment

        extra = {**question["xargs"], "kv_transfer_params": question["params"]}
        sampling = SamplingParams(max_tokens=1, temperature=0, detokenize=False, ignore_eos=True, extra_args=extra)
        ids = prompt(question["tokens"], question["seed"])
        self.ids[question["id"]] = self.engine.add_request(question["id"], {"prompt_token_ids": ids}, sampling)

    def answer(self, output: Any) -> None:
        """What has come of one."""
        if output.finished and self.ids.pop(output.request_id, None) is not None:
            token = next(iter(output.outputs[0].token_ids), None)
            self.say(id=output.request_id, token=token, params=output.kv_transfer_params, at=monotonic())

    def say(self, **words: Any) -> None:
        """One line."""
        print(json.dumps(words, default=list), file=self.out, flush=True)


def main() -> None:
    """See the module."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    os.nice(NICE)
    os.environ.update(ENVIRONMENT)
    ctypes.CDLL(None).syscall(*ARCH_PRCTL, AMX_TILE_DATA)
    calm()
    Served(build(Config(**json.loads(sys.argv[1]))), out).run()


if __name__ == "__main__":
    main()
