"The head of every notebook: its time, its link to Colab and the cell that fetches the course there"
import importlib.util, os, subprocess, sys
from pathlib import Path
from unittest.mock import Mock
import pytest
from execnb.nbio import mk_cell, new_nb
from IPython.core.inputtransformer2 import TransformerManager
from nbdev.config import get_config

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import heads, times

CFG = get_config(path=ROOT)

def notebook(): return new_nb([mk_cell('# Masks\n\n> What to hide', 'markdown'), mk_cell('#| default_exp masks')])

def test_heads_are_current():
    r = subprocess.run([sys.executable, 'tools/heads.py', '--check'], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert r.returncode==0, r.stderr

def test_every_notebook_has_a_time():
    assert {p.stem for p in (ROOT/'nbs').glob('*.ipynb')} - times.read_times().keys() == set()

def test_a_head_is_put_below_the_title_once():
    nb = heads.with_head(heads.with_head(notebook(), '02_masks', 20, CFG), '02_masks', 34, CFG)
    title,head,install,*rest = [c.source for c in nb.cells]
    assert title.startswith('# Masks') and rest==['#| default_exp masks']
    assert '35 seconds' in head and f'({heads.get_config().git_url.replace("github.com", "colab.research.google.com/github")}/blob/main/nbs/02_masks.ipynb)' in head
    assert install.startswith('#| hide\n#| eval: false\n')

@pytest.mark.parametrize('seconds,said', [(2, 'about 5 seconds'), (37, 'about 35 seconds'), (59, 'about a minute'), (80, 'about 1½ minutes'), (170, 'about 3 minutes')])
def test_times_are_said_as_one_would(seconds, said): assert heads.spoken(seconds)==said

def install(monkeypatch, folder, there):
    "What the cell asks the system and pip to do, and where it goes"
    if not there: monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    monkeypatch.chdir(folder)
    shell = Mock(); code = TransformerManager().transform_cell(heads.head('02_masks', None, CFG)[1].source)
    exec(code, dict(get_ipython=lambda: shell))
    return [c.args for c in shell.method_calls], Path(os.getcwd())

def test_install_cell_leaves_a_working_course_alone(monkeypatch, tmp_path):
    assert install(monkeypatch, tmp_path, True)==([], tmp_path)

def test_install_cell_fetches_the_course_and_goes_where_notebooks_live(monkeypatch, tmp_path):
    (tmp_path/'mim_nb'/'nbs').mkdir(parents=True)              # what the clone leaves
    (clone,),(_,pip) = install(monkeypatch, tmp_path, False)[0]
    assert clone=='git clone -q --depth 1 https://github.com/mim-nb/mim_nb' and pip=='install -q "./mim_nb[dev]"'
    assert Path(os.getcwd())==tmp_path/'mim_nb'/'nbs'

def test_times_come_from_a_report_of_pytest():
    report = '''======= slowest durations =======
168.50s call     tests/test_notebooks.py::test_notebook[08_beit]
0.61s setup    tests/test_notebooks.py::test_notebook[08_beit]
24.00s call     tests/test_notebooks.py::test_notebook[03_attention]
38.78s call     tests/test_pretrain.py::test_a_killed_run_resumes_to_the_same_bytes[tokenizer-9]'''
    assert times.reported(report)=={'08_beit': 168, '03_attention': 24}
