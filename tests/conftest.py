import torch
from hypothesis import settings

# Deterministic, so that a red run is red for everybody. `pytest --hypothesis-profile=thorough` looks further.
settings.register_profile("suite", deadline=None, max_examples=20, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile("suite")

torch.set_num_threads(1)  # the tensors here are tiny
