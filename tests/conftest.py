"Every process of the tests computes on one thread: sums then come out the same to the last bit, and tests that run side by side do not wait for each other"
import os, shutil, subprocess, sys
os.environ['OMP_NUM_THREADS'] = '1'        # also for the processes that tests start
from pathlib import Path
import pytest, torch
from filelock import FileLock

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns('.git', '.venv', '_docs', '_proc', 'build', 'dist', 'runs', '*.egg-info', '__pycache__', '.pytest_cache', '.hypothesis', '.ipynb_checkpoints')

@pytest.fixture
def copy(tmp_path):
    "A copy of the project's sources, for tests that write into the project"
    return Path(shutil.copytree(ROOT, tmp_path/'copy', ignore=NOT_SOURCE))

@pytest.fixture(scope='session')
def built(tmp_path_factory):
    "The built site and what was said on the way; processes that test side by side share one"
    base = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: base = base.parent
    copy,log = base/'site',base/'site.log'
    with FileLock(base/'site.lock'):
        if not log.exists(): log.write_text(build(copy))
    return copy/'_docs', log.read_text()

def build(copy):
    "Build the site in a copy of what it needs; returns what went wrong"
    for o in ('nbs', 'mim_nb', 'tools', 'results'): shutil.copytree(ROOT/o, copy/o, ignore=NOT_SOURCE)
    shutil.copy(ROOT/'settings.ini', copy)
    r = subprocess.run([sys.executable, 'tools/site.py'], cwd=copy, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
                       env=os.environ | dict(PYTHONPATH=str(copy), MPLBACKEND='agg'))
    return r.stderr if r.returncode else ''

@pytest.fixture(scope='session')
def site(built):
    "The folder of the built site"
    folder,errors = built
    if 'npm pack' in errors: pytest.skip(errors.strip().splitlines()[-1])
    if errors: pytest.fail('tools/site.py failed:\n' + errors[-1500:], pytrace=False)
    return folder

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'google-chrome', 'chromium-browser'))), None)

@pytest.fixture(scope='module')
def browser():
    "The machine's Chromium, headless; Playwright's own is never fetched"
    playwright = pytest.importorskip('playwright.sync_api', reason='tests in a browser need playwright')
    if not CHROMIUM: pytest.skip('there is no chromium to open the pages with')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--disable-dev-shm-usage', *(['--no-sandbox'] if os.geteuid()==0 else [])])
        yield browser
        browser.close()
