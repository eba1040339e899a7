"The course in JupyterLab: it opens where the README says, its links work there, and Run All runs"
import ast, json, os, re, shutil, socket, subprocess, sys, time
from pathlib import Path
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from conftest import NOT_SOURCE

pytest.importorskip('jupyterlab', reason='the tests in JupyterLab need jupyterlab')
ROOT = Path(__file__).parents[1]

@pytest.fixture(scope='module')
def course(tmp_path_factory):
    "A copy of the project, since Run All exports modules"
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp('lab')/'course', ignore=NOT_SOURCE))

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

@pytest.fixture(scope='module')
def lab(course, tmp_path_factory):
    "The address at which `jupyter lab nbs/index.ipynb` opens, with settings and history of its own"
    own = tmp_path_factory.mktemp('jupyter')
    quiet = own/'LAB_SETTINGS'/'@jupyterlab'/'apputils-extension'/'notification.jupyterlab-settings'
    quiet.parent.mkdir(parents=True); quiet.write_text(json.dumps(dict(fetchNews='false', checkForUpdates=False)))      # ask nobody for news
    env = os.environ | {f'JUPYTER{k}_DIR': str(own/k) for k in ('_CONFIG', '_DATA', '_RUNTIME', 'LAB_SETTINGS', 'LAB_WORKSPACES')}
    env |= dict(IPYTHONDIR=str(own/'ipython'), PYTHONPATH=str(course), MPLBACKEND='module://matplotlib_inline.backend_inline')
    command = [sys.executable, '-m', 'jupyter', 'lab', 'nbs/index.ipynb', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={free_port()}',
               '--expose-app-in-browser']
    with open(own/'log', 'w') as log, subprocess.Popen(command, cwd=course, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as server:
        try: yield opening_address(server, own/'_RUNTIME', own/'log')
        finally: server.terminate(); server.wait(30)

def opening_address(server, runtime, log):
    "Where Jupyter would have sent a browser: it leaves a page for that"
    for _ in range(600):
        if server.poll() is not None: break
        if pages := list(runtime.glob('jpserver-file-to-run-*-open.html')):
            if to := re.search(r'href="(http://[^"]+)"', pages[0].read_text()): return to[1]
        time.sleep(.1)
    pytest.fail('jupyter lab did not start:\n' + log.read_text()[-1500:], pytrace=False)

@pytest.fixture(scope='module')
def tab(browser, lab):
    page = browser.new_page(); page.set_default_timeout(150_000)
    page.goto(lab)
    tab_of(page, 'index.ipynb').wait_for()
    yield page
    page.close()

def tab_of(page, name): return page.locator('#jp-main-dock-panel .lm-TabBar-tabLabel', has_text=re.compile(f'^{re.escape(name)}$'))

def run(page, command, **args):
    "Let JupyterLab carry out one of its commands, to the end"
    page.evaluate('([command, args]) => { window.done = false; jupyterapp.commands.execute(command, args).then(() => { window.done = true }) }', [command, args])
    page.wait_for_function('window.done')

def wait_idle(page, name):
    page.wait_for_function("""name => { const w = jupyterapp.shell.currentWidget
        return w?.title.label == name && w.sessionContext?.session?.kernel?.status == 'idle' }""", arg=name)

def code_cells(path): return [c for c in json.loads(path.read_text())['cells'] if c['cell_type']=='code']

def test_lab_opens_the_index_and_its_links_lead_to_notebooks(tab):
    tab.locator('.jp-NotebookPanel a:visible', has_text=re.compile('^Images$')).first.click()
    tab_of(tab, '00_images.ipynb').wait_for()

@pytest.mark.parametrize('name', ['02b_playground', '06b_cli'])
def test_run_all(tab, course, name):
    path = course/'nbs'/f'{name}.ipynb'
    assert all(c['execution_count'] is None for c in code_cells(path))
    run(tab, 'docmanager:open', path=path.name); wait_idle(tab, path.name)
    run(tab, 'notebook:run-all-cells'); wait_idle(tab, path.name)
    run(tab, 'docmanager:save')
    assert [o['evalue'] for c in code_cells(path) for o in c['outputs'] if o['output_type']=='error']==[]
    assert all(c['execution_count'] for c in code_cells(path))
    if name=='02b_playground': assert 'hidden' in tab.locator('#playground .said:visible').inner_text()

GUARDED = ast.FunctionDef, ast.ClassDef, ast.If, ast.Try, ast.Import, ast.ImportFrom

def test_run_all_passes_over_what_tests_skip():
    "Jupyter knows nothing of `#| slow`, `#| cuda` and `#| eval: false`: such cells look for themselves whether they should run"
    for path in sorted((ROOT/'nbs').glob('*.ipynb')):
        for c in code_cells(path):
            code = ''.join(c['source'])
            if not re.search(r'^#\|\s*(slow|cuda|notest|eval:\s*false)', code, re.M): continue
            body = ast.parse(TransformerManager().transform_cell(code)).body
            assert all(isinstance(o, GUARDED) for o in body), f'{path.name}: {code[:80]}'
            assert '__main__' not in code or 'IN_NOTEBOOK' in code, f'{path.name}: a notebook is called __main__, too'
