"What pip would install: the wheel has all it needs, and asks for all that it imports"
import ast, importlib.util, json, re, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = {'mim_nb/fashion_mnist/fashion_mnist.npz', 'mim_nb/fashion_mnist/LICENSE', 'mim_nb/__init__.py', 'mim_nb/_modidx.py', 'mim_nb/data.py'}

OURS = {'mim_nb'} | set(sys.stdlib_module_names)

def settings():
    cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

# what a plain `pip install` brings: settings.ini's requirements, by the names under which they are imported
RUNTIME = {dict(pillow='PIL').get(n, n) for n in re.findall(r'^[\w-]+', settings()['requirements'].replace(' ', '').strip(), re.M)}

def isolation():
    "Without build isolation nothing is fetched, but the environment's setuptools must know how to build a wheel alone"
    try: return ['--no-build-isolation'] if int(version('setuptools').split('.')[0])>=71 else []
    except ImportError: return []

def wheel(source, out):
    "The files and the metadata of the wheel that pip builds from a folder or an sdist"
    r = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--no-deps', '-q', *isolation(), '-w', out, source], capture_output=True, text=True, timeout=300)
    assert r.returncode==0, r.stdout+r.stderr
    with zipfile.ZipFile(next(Path(out).glob('*.whl'))) as z:
        names = z.namelist()
        return set(names), {Path(n).name: z.read(n).decode() for n in names if Path(n).parent.suffix=='.dist-info'}

@pytest.fixture
def sdist(copy):
    if importlib.util.find_spec('setuptools') is None: pytest.skip('this environment has no setuptools to make an sdist with')
    subprocess.run([sys.executable, 'setup.py', '-q', 'sdist'], cwd=copy, check=True, capture_output=True, timeout=120)
    return next((copy/'dist').glob('*.tar.gz'))

def test_wheel(copy, tmp_path):
    names,meta = wheel(copy, tmp_path/'wheel')
    assert PACKAGE<=names
    assert any(n.endswith('LICENSE') and '.dist-info/' in n for n in names)
    assert {n.split('/')[0] for n in names if '.dist-info/' not in n}=={'mim_nb'}         # no tests, no tools
    assert 'License-Expression: Apache-2.0' in meta['METADATA'] or 'License: Apache-2.0' in meta['METADATA']
    assert 'mim_pretrain = mim_nb.pretrain:mim_pretrain' in meta['entry_points.txt']

def test_wheel_from_sdist(sdist, tmp_path):
    with tarfile.open(sdist) as t: assert any(n.endswith('/settings.ini') for n in t.getnames())
    names,_ = wheel(sdist, tmp_path/'wheel')
    assert PACKAGE<=names

def imports(source):
    "The top-level packages that some code imports, wherever in it; those behind a `try` are optional"
    tree = ast.parse(source)
    optional = {id(o) for t in ast.walk(tree) if isinstance(t, ast.Try) for o in ast.walk(t)}
    for o in ast.walk(tree):
        if id(o) in optional: continue
        if isinstance(o, ast.Import): yield from (a.name.split('.')[0] for a in o.names)
        elif isinstance(o, ast.ImportFrom) and not o.level: yield o.module.split('.')[0]

@pytest.mark.parametrize('file', sorted((ROOT/'mim_nb').glob('[!_]*.py')), ids=lambda p: p.stem)
def test_imports_only_what_is_required(file):
    assert set(imports(file.read_text())) - OURS - RUNTIME==set()

@pytest.mark.parametrize('nb', sorted((ROOT/'nbs').glob('*.ipynb')), ids=lambda p: p.stem)
def test_notebooks_import_only_what_dev_brings(nb):
    cells = [''.join(c['source']) for c in json.loads(nb.read_text())['cells'] if c['cell_type']=='code']
    code = [re.sub(r'^(\s*)[%!].*$', r'\1pass', c, flags=re.M) for c in cells if not c.startswith(('%%', '#| eval: false'))]      # what never runs may need an extra
    dev = {re.match(r'[\w-]+', r)[0].replace('-', '_') for r in settings()['dev_requirements'].split()} | {'IPython', 'nbformat', 'yaml'}
    assert {o for c in code for o in imports(c)} - OURS - RUNTIME - dev==set()

def test_requirements_have_no_spaces():
    "setup.py splits them at white space"
    for key in ('requirements', 'dev_requirements', 'console_scripts'):
        assert all(len(line.split())==1 for line in settings()[key].strip().splitlines()), key
    assert '<' not in settings()['requirements']                        # upper bounds are for development only

@pytest.mark.parametrize('script', settings()['console_scripts'].split(), ids=lambda s: s.split('=')[0])
def test_commands_exist(script):
    module,function = script.split('=')[1].split(':')
    tree = ast.parse((ROOT/(module.replace('.', '/')+'.py')).read_text())
    assert function in {o.name for o in tree.body if isinstance(o, ast.FunctionDef)} | {t.id for o in tree.body if isinstance(o, ast.Assign) for t in o.targets if isinstance(t, ast.Name)}
