# SPDX-License-Identifier: Apache-2.0
"""The chart, rendered by Helm's own code, and checked against Kubernetes' schemas; and what it asks for."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Final

import helm_python
import kubernetes_validate
import pytest
import yaml

import mfsd
from mfsd.daemon import config as configuration

FOLDER: Final = Path(__file__).resolve().parents[2] / "packaging" / "kubernetes"
TLS: Final = {"metrics": {"tlsSecret": "metrics", "port": 9999}, "ptrace": True, "socketGroup": 3_000_000,
              "nodeSelector": {"gpu": "yes"},
              "tolerations": [{"operator": "Exists"}], "imagePullSecrets": [{"name": "mine"}]}  # fmt: skip
VERSIONS: Final = ("1.29", "1.33", "1.36")


def render(values: dict[str, Any] | None = None) -> str:
    with helm_python.Chart.load(FOLDER / "chart") as chart:
        chart.validate_schema(values or {})
        (text,) = chart.render(values or {}, name="mfsd", namespace="mfsd").values()
    return str(text)


def objects(text: str) -> dict[str, Any]:
    return {o["kind"]: o for o in yaml.safe_load_all(text)}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("values", [{}, TLS], ids=["default", "tls"])
def test_what_the_chart_makes_is_valid(values: dict[str, Any], version: str) -> None:
    for made in objects(render(values)).values():
        kubernetes_validate.validate(made, version, strict=True)


def test_the_check_would_notice() -> None:
    made = objects(render())["DaemonSet"]
    made["spec"]["template"]["spec"]["hostNetwrok"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(made, VERSIONS[-1], strict=True)


def test_the_plain_daemonset_is_what_the_chart_makes() -> None:
    plain = (FOLDER / "mfsd.yaml").read_text()
    assert objects(plain) == objects(render())


def test_it_asks_for_the_hosts_network_and_two_capabilities() -> None:
    spec = objects(render())["DaemonSet"]["spec"]["template"]["spec"]
    assert spec["hostNetwork"] is True
    (container,) = spec["containers"]
    security = container["securityContext"]
    assert (security["privileged"], security["allowPrivilegeEscalation"]) == (False, False)
    assert security["capabilities"] == {"drop": ["ALL"], "add": ["BPF", "NET_ADMIN"]}
    assert container["image"] == f"mfsd:{mfsd.__version__}"


@pytest.mark.parametrize(("values", "group"), [({}, 0), (TLS, 3_000_000)], ids=["default", "tls"])
def test_the_socket_is_for_the_group_of_the_workers(values: dict[str, Any], group: int) -> None:
    """It is made with the daemon's own, which without CAP_CHOWN may give it to no other one."""
    (container,) = objects(render(values))["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    assert container["securityContext"]["runAsGroup"] == group


def test_mfsd_takes_the_configuration(tmp_path: Path) -> None:
    for values in ({}, TLS):
        data = objects(render(values))["ConfigMap"]["data"]
        path = tmp_path / "mfsd.toml"
        path.write_text(data["mfsd.toml"])
        (tmp_path / "conf.d").mkdir(exist_ok=True)
        for name in data.keys() - {"mfsd.toml"}:
            (tmp_path / "conf.d" / name).write_text(data[name])
        config = configuration.load(path)
        assert config.metrics.listen == ("0.0.0.0:9999" if values else "unix")
        tomllib.loads(data["mfsd.toml"])


def test_wrong_values_are_refused() -> None:
    with pytest.raises(helm_python.HelmError):
        render({"ptrcae": True})
