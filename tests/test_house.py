"How the package is built: small modules that depend on earlier chapters only, one name for one thing, declared requirements"
import ast, importlib, re, sys
from configparser import ConfigParser
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(p.stem for p in (ROOT/'mim_nb').glob('[!_]*.py'))
TREES = {m: ast.parse((ROOT/'mim_nb'/f'{m}.py').read_text()) for m in MODULES}

def chapters():
    "Module -> the notebook that exports it, in the order of the course"
    found = {}
    for p in sorted((ROOT/'nbs').rglob('*.ipynb')):
        if exported := re.search(r'#\| default_exp (\w+)', p.read_text()): found[exported[1]] = p.name
    return found

def uses(module):
    "The modules of the package that a module imports, wherever in it, and the names that it takes"
    for o in ast.walk(TREES[module]):
        if isinstance(o, ast.ImportFrom):
            names = [a.name for a in o.names]
            if o.level and o.module: yield o.module, names
            elif o.level: yield from ((n, []) for n in names if n in MODULES)
            elif (o.module or '').startswith('mim_nb.'): yield o.module.removeprefix('mim_nb.'), names
            elif o.module=='mim_nb': yield from ((n, []) for n in names if n in MODULES)
        elif isinstance(o, ast.Import):
            yield from ((a.name.removeprefix('mim_nb.'), []) for a in o.names if a.name.startswith('mim_nb.'))

@pytest.mark.parametrize('module', MODULES)
def test_a_module_is_at_most_250_lines(module):
    assert len((ROOT/'mim_nb'/f'{module}.py').read_text().splitlines())<=250

@pytest.mark.parametrize('module', MODULES)
def test_a_module_uses_earlier_chapters_only(module):
    order = list(chapters())
    later = {other for other,_ in uses(module) if order.index(other)>order.index(module)} - {'methods'}
    if module=='timm_models': later -= {'mixmim', 'mixmim_encoder'}        # looked up when such a model is made
    if module=='tokenizers': later -= {'authors_tokenizers'}               # the published ones have this address, too
    assert not later

def test_imports_go_in_no_circle():
    ahead = {m: {other for other,_ in uses(m)} for m in MODULES}
    while free := [m for m,needs in ahead.items() if not needs & ahead.keys()]:
        for m in free: del ahead[m]
    assert ahead.keys() <= {'timm_models', 'mixmim', 'mixmim_encoder'}

@pytest.mark.parametrize('module', MODULES)
def test_no_private_name_crosses_modules(module):
    assert [n for _,names in uses(module) for n in names if n[0]=='_']==[]

def test_one_name_is_one_thing():
    "A public name means the same object everywhere, and no other module has that name"
    meaning,clash = {},set()
    for m in MODULES:
        module = importlib.import_module(f'mim_nb.{m}')
        for n in getattr(module, '__all__', []):
            o = getattr(module, n)
            meaning.setdefault(n, {})[id(o)] = m
            if n in MODULES and n not in ('methods', 'evaluate') and getattr(o, '__module__', '')!=f'mim_nb.{n}': clash.add((m, n))
    assert not {n: sorted(ms.values()) for n,ms in meaning.items() if len(ms)>1} and not clash

def test_what_is_imported_is_declared():
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    declared = {re.match(r'[\w-]+', r)[0] for r in cfg['DEFAULT']['requirements'].split()}
    declared = {dict(pillow='PIL').get(d, d) for d in declared}
    found = set()
    for tree in TREES.values():
        optional = {id(o) for t in ast.walk(tree) if isinstance(t, ast.Try) for o in ast.walk(t)}
        for o in ast.walk(tree):
            if id(o) in optional: continue
            if isinstance(o, ast.Import): found |= {a.name.split('.')[0] for a in o.names}
            elif isinstance(o, ast.ImportFrom) and not o.level: found.add(o.module.split('.')[0])
    assert found - set(sys.stdlib_module_names) - {'mim_nb'} <= declared
