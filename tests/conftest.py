"Tests that write into the project do so in a copy of it"
import shutil
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns('.git', '.venv', '_docs', '_proc', 'build', 'dist', 'runs', '*.egg-info', '__pycache__', '.pytest_cache', '.hypothesis', '.ipynb_checkpoints')

@pytest.fixture
def copy(tmp_path):
    "A copy of the project's sources, to be written into"
    return Path(shutil.copytree(ROOT, tmp_path/'copy', ignore=NOT_SOURCE))
