"""Shared test rules: what may be skipped, and where skipping is a failure."""

import importlib.util
import os
import shutil

import pytest
from hypothesis import settings

ON_CI = os.environ.get("LCCOST_CI") == "1"
# CI must not fail on one commit and pass on the same one again: examples are fixed there. Anywhere
# else every run looks for new ones.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if ON_CI else "dev")


def _has_cuda() -> bool:
    try:
        import torch
    except ModuleNotFoundError:
        return False
    return bool(torch.cuda.is_available())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    browser = shutil.which("chromium") and shutil.which("chromedriver")
    compiler = shutil.which("cc") or shutil.which("gcc")
    triton = importlib.util.find_spec("triton") is not None
    gpu = None
    for item in items:
        if "browser" in item.keywords and not browser:
            reason = "needs headless Chromium (packages chromium and chromium-driver)"
            item.add_marker(pytest.mark.skip(reason=reason))
        if "compiler" in item.keywords and not compiler:
            item.add_marker(pytest.mark.skip(reason="needs a C compiler"))
        if "triton" in item.keywords and not triton:
            item.add_marker(pytest.mark.skip(reason="needs Triton (package triton)"))
        if "gpu" in item.keywords:
            gpu = _has_cuda() if gpu is None else gpu
            if not gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    """On CI, a test whose tool CI installs must run: its skip is a failure."""
    outcome = yield
    report = outcome.get_result()
    installs = {"browser", "ray", "compiler", "triton"}
    if (
        ON_CI
        and report.skipped
        and installs & set(item.keywords)
        and "gpu" not in item.keywords
        and not hasattr(report, "wasxfail")
    ):
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} skipped on CI, which installs what it needs: {report.longrepr}"
        )
