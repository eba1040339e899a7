"Every process of the tests computes on one thread: sums then come out the same to the last bit, and tests that run side by side do not wait for each other"
import os, shutil
os.environ['OMP_NUM_THREADS'] = '1'        # also for the processes that tests start
from pathlib import Path
import pytest, torch

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns('.git', '.venv', '_docs', '_proc', 'build', 'dist', 'runs', '*.egg-info', '__pycache__', '.pytest_cache', '.hypothesis', '.ipynb_checkpoints')

@pytest.fixture
def copy(tmp_path):
    "A copy of the project's sources, for tests that write into the project"
    return Path(shutil.copytree(ROOT, tmp_path/'copy', ignore=NOT_SOURCE))
