# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV connectors with hints (docs/integrations/vllm.md).

    --kv-transfer-config '{"kv_connector": "MfsdNixlConnector", "kv_role": "kv_consumer",
                           "kv_connector_module_path": "mfsd.integrations.vllm"}'

Importing this needs no vLLM; asking for a connector does.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

from mfsd.integrations.vllm.mixin import MfsdConnector

__all__ = ["MfsdConnector", "MfsdMooncakeConnector", "MfsdNixlConnector", "MfsdNixlPushConnector"]

_V1: Final = "vllm.distributed.kv_transfer.kv_connector.v1"
_CONNECTORS: Final = {
    "MfsdNixlConnector": (
        ("nixl", "NixlPullConnector"),
        ("nixl", "NixlConnector"),
        ("nixl_connector", "NixlConnector"),
    ),
    "MfsdNixlPushConnector": (("nixl", "NixlPushConnector"),),
    "MfsdMooncakeConnector": (
        ("mooncake.mooncake_connector", "MooncakeConnector"),
        ("mooncake_connector", "MooncakeConnector"),
    ),
}
"""Where each one's parent is, in the versions of vLLM that were looked at, the newest first."""
_TRAITS: Final[dict[str, dict[str, Any]]] = {
    "MfsdNixlPushConnector": {"mfsd_push": True},
    "MfsdMooncakeConnector": {"mfsd_push": True, "mfsd_mooncake": True},
}


def __getattr__(name: str) -> Any:
    """Make a connector when vLLM asks for it."""
    if name not in _CONNECTORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = type(
        name, (MfsdConnector, _parent(name)), {"__module__": __name__} | _TRAITS.get(name, {})
    )
    return made


def _parent(name: str) -> type:
    for module, parent in _CONNECTORS[name]:
        try:
            found = getattr(importlib.import_module(f"{_V1}.{module}"), parent, None)
        except ModuleNotFoundError as e:
            if not (e.name or "").startswith("vllm.distributed.kv_transfer"):
                raise  # vLLM itself is missing, or something that it needs
            continue
        if isinstance(found, type):
            return found
    places = " or ".join(f"{module}.{parent}" for module, parent in _CONNECTORS[name])
    raise ImportError(f"{name}: this vLLM has no {places} in {_V1}; see docs/integrations/vllm.md for versions")
