"""Where the developers' data is missing, the reason is told: a skip for a user, a failure in CI."""

from collections.abc import Callable
from pathlib import Path

import pytest


def test_missing_data_is_skipped_with_the_reason_but_not_in_ci(
    real_data: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = r"shared/data/nothing is missing: .* comes with the developers' checkout"
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=reason):
        real_data("nothing")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=f"CI must have it: .*{reason}"):
        real_data("nothing")
