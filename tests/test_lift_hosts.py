"""Every host of host_models, lifted: each check on the package itself, with the result in docs/how-to/lift.md."""

import copy

import pytest
import torch
from torch import distributed, multiprocessing, nn

from host_checks import CHECKS, HOSTS, N, lifted, loss, rows_of_the_page


@pytest.fixture(scope="module", autouse=True)
def _process_group():
    """One process over gloo, for DistributedDataParallel."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", HOSTS)
def test_host(name, check):
    assert CHECKS[check](name) == rows_of_the_page()[name][check]


def test_the_page_names_hosts_versions_and_blocks():
    page = rows_of_the_page()
    assert list(page) == list(HOSTS)
    for name, host in HOSTS.items():
        kinds = sorted({entry.kind.split(":")[0] for entry in lifted(name)[3]})
        assert (page[name]["version"], page[name]["block"]) == (host.version, ", ".join(kinds))


def test_two_processes_average_their_gradients(tmp_path):
    names = ["timm vit", "transformers SamVisionModel", "torch TransformerEncoder, sequence first"]
    multiprocessing.spawn(_one_of_two, (str(tmp_path / "store"), names), nprocs=2)


def _one_of_two(process: int, store: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", store=distributed.FileStore(store, 2), rank=process, world_size=2)
    for name in names:
        host, model, x, _ = lifted(name)
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=True)
        groups = x.split(N)
        loss(host, wrapped, groups[process]).backward()
        for group in groups:
            (loss(host, model, group) / 2).backward()
        for (key, one), other in zip(model.named_parameters(), wrapped.parameters(), strict=True):
            if one.grad is not None:
                torch.testing.assert_close(other.grad, one.grad, msg=f"{name}: {key}")
    distributed.destroy_process_group()
