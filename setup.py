"""Maps the top-level folders into one import package, ``basestone``.

Everything else about the build is declared in pyproject.toml.
"""

from setuptools import find_packages, setup

FOLDERS = ("launch", "trainer", "model", "data", "ds_configs", "recipes")
PATTERNS = [pattern for folder in FOLDERS for pattern in (folder, f"{folder}.*")]

if __name__ == "__main__":  # a checkout makes `basestone.setup` importable; importing it must build nothing
    setup(
        packages=["basestone", *(f"basestone.{name}" for name in find_packages(include=PATTERNS))],
        package_dir={f"basestone.{folder}": folder for folder in FOLDERS},
        package_data={
            "basestone": ["py.typed"],
            "basestone.ds_configs": ["*.json"],
            "basestone.recipes": ["*.toml"],
            "basestone.trainer.meters": ["*.csv"],
        },
    )
