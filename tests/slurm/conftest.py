"""The cluster that the tests of this folder share; where none can be started they are skipped, and say why."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes: n1 and n2 with a GPU each, n3 with two. Up in a second."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster") / "slurm") as cluster:
        yield cluster
