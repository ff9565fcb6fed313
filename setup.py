"""What pyproject.toml cannot say: files of the checkout's top that a wheel carries inside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# mmref/config/shipped.py finds them
SHIPPED = ("tune/rows", "tune/spaces", "configs", "data_shards/emoji/LICENSES", "data_shards/icons/LICENSES")


class BuildWithShipped(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in SHIPPED:
                shutil.copytree(folder, Path(self.build_lib, "mmref", "shipped", folder), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithShipped})
