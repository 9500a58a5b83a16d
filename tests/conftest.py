"""Fixtures of all tests: nothing leaves the machine, and what is downloaded or prepared stays in a temporary folder."""

import signal

import pytest
import torch

collect_ignore = ["days"]  # scripts that test_days.py runs with the wheel alone

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background; tests interrupt what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("CONSISTENCY_REG_CACHE", str(tmp_path_factory.mktemp("corpus")))
        yield


@pytest.fixture
def compiler():
    """Give a compiler that has compiled nothing yet."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
