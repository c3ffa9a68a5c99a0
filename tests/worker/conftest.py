"""What tests of real training compare with."""

from __future__ import annotations

import pytest

from tests.worker.undisturbed import Undisturbed


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Runs that nothing befell."""
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))
