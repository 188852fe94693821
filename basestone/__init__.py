"""Pre-train Transformers: Megatron-core blocks, DeepSpeed ZeRO, WebDataset streams."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_here = Path(__file__).resolve().parent
if __name__ == "basestone" and not (_here / "trainer").is_dir():
    __path__.append(str(_here.parent))  # a checkout: the sub-packages are this folder's siblings

try:
    __version__ = version("basestone")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+checkout"
