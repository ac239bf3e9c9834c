"""What quick runs on real data share."""

import os
from pathlib import Path

import pytest

from epsball.errors import BadInput
from epsball.reproduce import Setting, experiments


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """Gives the setting of a quick run of the named experiment, or skips where its data is not there."""
    root, cache = os.environ.get("EPSBALL_DATA"), tmp_path_factory.mktemp("quick-nets")

    def ask(name):
        setting = Setting(Path(root) if root else None, seed=0, quick=True, cache=cache)
        try:
            for need in experiments()[name].needs:
                setting.place(need)
        except BadInput as error:
            pytest.skip(str(error))
        return setting

    return ask
