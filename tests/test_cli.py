"Commands in a shell: every error is a sentence or a short report, and the output may end or lack letters"
import io, json, os, pickle, subprocess, sys, zipfile
from pathlib import Path
import numpy as np, pytest, torch
from torch.utils.data import DataLoader
from mim_nb.cli import command, issues
from mim_nb.data import LazySet

def tool(
    kind:str='',   # what goes wrong
    times:int=1,   # lines to print
):
    "A toy command"
    for i in range(times): print('line', i)
    if kind: errors[kind]()

def deep(): deep()
def from_worker():
    "None of these images can be read, which a process that loads them finds out"
    data = LazySet([None]*3, 28, name='clothes')
    list(DataLoader(data, num_workers=1, multiprocessing_context='fork'))
def sentence(): raise ValueError('times must be at least 1, got 0: take 1')
def two_lines(): raise RuntimeError('first line\n   second line')
def silent(): raise ValueError
def not_written(): raise NotImplementedError('later')

errors = dict(
    sentence=sentence, two_lines=two_lines, silent=silent, not_written=not_written, deep=deep, from_worker=from_worker,
    key=lambda: {}['kind'], type=lambda: 1+'1', attribute=lambda: None.x, index=lambda: [][0], zero=lambda: 1/0,
    truth=lambda: np.testing.assert_equal(1, 2),
    missing=lambda: open('/no/such/file'), folder=lambda: open('/'), package=lambda: __import__('no_such_package'),
    json=lambda: json.loads('{'), utf8=lambda: b'\xff'.decode(), pickle=lambda: pickle.loads(b'nonsense'),
    zip=lambda: zipfile.ZipFile(io.BytesIO(b'PK')), torch=lambda: torch.ones(2) @ torch.ones(3),
    state=lambda: torch.nn.Linear(1, 1).load_state_dict({}),
    memory=lambda: np.empty(2**60, np.uint8), torch_memory=lambda: torch.empty(2**60, dtype=torch.uint8))

@pytest.fixture
def call(monkeypatch, capsys):
    "Call `tool` as its console script would"
    def call(*args, **env):
        for k,v in env.items(): monkeypatch.setenv(k, v)
        monkeypatch.setattr(sys, 'argv', ['tool', *args])
        code = command(tool, 'kind')()
        return code, capsys.readouterr().err.strip()
    return call

@pytest.mark.parametrize('kind,says', dict(
    sentence='times must be at least 1, got 0: take 1', two_lines='first line second line', silent='ValueError',
    from_worker='clothes: no image could be read', missing='No such file or directory: /no/such/file',
    folder='Is a directory: /', package="No module named 'no_such_package'",
    memory='the memory of this machine is too small', torch_memory='the memory of this machine is too small').items())
def test_what_a_user_can_cause_is_one_sentence(call, kind, says):
    code,err = call(kind)
    assert code==1 and err.splitlines()[-1].startswith(f'tool: {says}')
    assert kind=='from_worker' or '\n' not in err          # a worker's warnings stand before it

@pytest.mark.parametrize('kind', 'not_written deep key type attribute index zero truth json utf8 pickle zip torch state'.split())
def test_anything_else_is_a_short_report(call, kind):
    code,err = call(kind)
    assert code==70 and len(err.splitlines())==5 and len(err)<2000
    for part in ('tool: unexpected ', f'command   tool {kind}', 'place     ', '.py:', f'torch {torch.__version__.split("+")[0]}', issues):
        assert part in err
    assert 'Traceback' not in err

def test_the_report_names_the_line_of_ours_that_led_there(call, monkeypatch):
    from mim_nb.patches import patchify
    monkeypatch.setitem(errors, 'patchify', lambda: patchify(None, 4))
    assert 'place     mim_nb/patches.py:' in call('patchify')[1]

def test_a_traceback_is_shown_when_asked_for(call):
    code,err = call('key', MIM_DEBUG='1')
    assert code==70 and 'Traceback' in err and 'tool: unexpected KeyError' in err

def test_a_lost_neighbour_is_no_fault_of_ours(call):
    code,err = call('torch', TORCHELASTIC_RUN_ID='x')
    assert code==1 and '\n' not in err

def test_the_address_is_that_of_the_project():
    settings = (Path(__file__).parents[1]/'settings.ini').read_text()
    assert f"git_url = {issues.removesuffix('/issues')}" in settings

SCRIPT = '''import os, sys, time
from mim_nb.cli import command
def tool(
    lines:int=1,  # how many
    name:str='',  # printed at the end
):
    "Print, and write a file at the end"
    for i in range(lines): print('line', i, flush=i<2)
    print(name)
    if name=='fail': raise ValueError('naïve \\udcff')
    print('late', file=sys.stderr)
    open('done', 'w').close()
sys.exit(command(tool)())'''

def shell(cwd, line, **env):
    (cwd/'tool.py').write_text(SCRIPT)
    line = line.replace('TOOL', f'{sys.executable} tool.py')
    return subprocess.run(['bash', '-c', f'set -o pipefail; {line}'], cwd=cwd, env=os.environ | env, capture_output=True, timeout=60)

@pytest.mark.parametrize('line', ['TOOL --lines 100000 | head -1', 'TOOL --lines 3 2>&1 | true', 'TOOL -h | true', 'TOOL --lines 3 >&-'])
def test_a_reader_that_leaves_kills_nothing(tmp_path, line):
    r = shell(tmp_path, line)
    assert r.returncode==0 and b'rror' not in r.stderr, r.stderr
    assert (tmp_path/'done').exists() or '-h' in line

def test_a_full_disk_for_the_output_is_a_sentence(tmp_path):
    if not Path('/dev/full').exists(): pytest.skip('this system has no /dev/full')
    r = shell(tmp_path, 'TOOL > /dev/full')
    assert r.returncode==1 and r.stderr.decode().startswith('tool: No space left on device')

@pytest.mark.parametrize('env', [dict(PYTHONIOENCODING='ascii'), dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0'), dict(PYTHONIOENCODING='utf-8')])
def test_letters_that_the_terminal_lacks_are_replaced(tmp_path, env):
    r = shell(tmp_path, "TOOL --name $'Kleid\\xc3\\xb6 \\xff'", **env)
    assert r.returncode==0 and b'Kleid' in r.stdout, r.stderr
    r = shell(tmp_path, 'TOOL --name fail', **env)
    assert r.returncode==1 and r.stderr.startswith(b'tool: na') and b'Traceback' not in r.stderr
