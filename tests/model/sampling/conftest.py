from __future__ import annotations

from collections.abc import Callable

import pytest

from model.ops.kernels import NoKernels
from model.ops.native import NativeOps
from model.sampling.native import NativeSampler
from model.sampling.sampler import Sampler


@pytest.fixture(params=["torch", "best", "avx2", "portable"])
def make_sampler(request: pytest.FixtureRequest) -> Callable[[int], Sampler]:
    """Makes a sampler for a vocabulary: torch's, or ours by each instruction set."""
    if request.param == "torch":
        return lambda vocab_size: Sampler(vocab_size, "cpu")
    try:
        ops = NativeOps(2, request.param)
    except NoKernels as error:
        pytest.skip(str(error))
    return lambda vocab_size: NativeSampler(vocab_size, ops)
