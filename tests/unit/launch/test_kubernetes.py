"""launch/kubernetes.yaml: Kubernetes' own schema, and what its pods would run."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[3]
INSTALLED_AT = "/opt/megatron_opdlm"
SERVICE, JOB = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]
(RANKS,), (STAGING,) = POD["containers"], POD["initContainers"]


@pytest.mark.parametrize("resource", [SERVICE, JOB], ids=["service", "job"])
def test_kubernetes_schema_accepts_it(resource):
    kubernetes_validate.validate(resource, "1.31", strict=True)


def test_the_schema_can_refuse():
    spoilt = JOB | {"spec": JOB["spec"] | {"paralellism": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(spoilt, "1.31", strict=True)


def words(container: dict) -> list[str]:
    return [word.replace(INSTALLED_AT, str(ROOT)) for word in container["command"] + container["args"]]


@pytest.mark.parametrize("index", [0, 1])
def test_each_pod_starts_its_ranks_which_meet_at_the_first_pod(index):
    given = {variable["name"]: variable.get("value", "10.0.0.9") for variable in RANKS["env"]}
    command = words(RANKS)
    done = subprocess.run(
        [*command[:2], "--dry-run", *command[2:]],
        env={"PATH": os.environ["PATH"], "JOB_COMPLETION_INDEX": str(index)} | given,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    ranks = shlex.split(done.stdout.splitlines()[-1])
    assert ranks[3:7] == ["--nnodes", str(JOB["spec"]["completions"]), "--nproc-per-node", "8"]
    assert "opdlm-0.opdlm:29500" in ranks and "10.0.0.9" in ranks
    assert f"is_host={int(index == 0)}," in ranks[ranks.index("--rdzv-conf") + 1]
    assert "export GLOO_SOCKET_IFNAME=eth0" in done.stdout


def test_the_training_command_is_one_that_the_package_accepts():
    from megatron_opdlm.config.load import load_config

    settings = RANKS["args"][RANKS["args"].index("megatron_opdlm.train") + 1 :]
    config = load_config([word for setting in settings for word in setting.split("=", 1)])
    assert config.training.grace_seconds < POD["terminationGracePeriodSeconds"]
    staged = [f"{STAGING['args'][1]}/{Path(source).name}" for source in STAGING["args"][2:]]
    assert [config.student.hf, *config.data.train_files] == staged and config.teacher.hf == staged[0]


def test_names_and_numbers_that_have_to_agree_do():
    name = JOB["metadata"]["name"]
    assert SERVICE["metadata"]["name"] == POD["subdomain"] and SERVICE["spec"]["selector"] == {"job-name": name}
    assert SERVICE["spec"]["clusterIP"] == "None" and JOB["spec"]["completionMode"] == "Indexed"
    environment = {variable["name"]: variable.get("value") for variable in RANKS["env"]}
    assert environment["MASTER_ADDR"] == f"{name}-0.{POD['subdomain']}"
    assert JOB["spec"]["completions"] == JOB["spec"]["parallelism"] == int(environment["NNODES"])
    assert RANKS["resources"]["limits"]["nvidia.com/gpu"] == int(environment["GPUS_PER_NODE"])
    mounted = {mount["name"] for container in (RANKS, STAGING) for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in POD["volumes"]}
    for container in (RANKS, STAGING):
        assert (ROOT / container["command"][1].removeprefix(f"{INSTALLED_AT}/")).is_file()
