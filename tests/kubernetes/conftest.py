# SPDX-License-Identifier: Apache-2.0
"""Tests of what is for Kubernetes, collected where `make test-kubernetes` has installed Helm's code and the schemas."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("helm_python") is None or find_spec("kubernetes_validate") is None:
    collect_ignore_glob = ["test_*.py"]
