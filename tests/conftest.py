import pytest
import torch
from forks import serving
from hypothesis import settings

# Deterministic, so that a red run is red for everybody. `pytest --hypothesis-profile=thorough` looks further.
settings.register_profile("suite", deadline=None, max_examples=20, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile("suite")

torch.set_num_threads(1)  # the tensors here are tiny


@pytest.fixture(scope="module")
def server(request):
    """Forks processes that run functions of the test's file, which calls `serve(globals())` as a program."""
    yield from serving(request.path)


@pytest.fixture
def forks(server):
    yield server
    server.clear()
