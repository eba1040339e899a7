"The five commands on bad input: refused in a sentence, within limits, and nothing is left behind (tests/attack.py)"
import json, os, subprocess, sys
from pathlib import Path
import pytest
from filelock import FileLock
sys.path.insert(0, str(Path(__file__).parent))
import attack
from attack_cases import Case, cases

commands = 'pretrain evaluate show convert benchmark'.split()
every = 3        # here; `python tests/attack.py` tries all

def run(*args):
    return subprocess.run([sys.executable, attack.__file__, *map(str, args)], capture_output=True,
                          text=True, timeout=580, env=os.environ | dict(OMP_NUM_THREADS='1'))

@pytest.fixture(scope='session')
def base(tmp_path_factory):
    "The files that all cases share; processes that test side by side make them once"
    top = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: top = top.parent
    with FileLock(top/'attack.lock'):
        if not (top/'attack'/'done').exists(): run('0', '--base', top/'attack')
    return top/'attack'

@pytest.mark.parametrize('command', commands)
def test_bad_input_is_refused(command, base, tmp_path):
    r = run(command, '--every', every, '--base', base, '--json', tmp_path/'found.json')
    assert (tmp_path/'found.json').exists(), r.stderr[-2000:]
    found = json.loads((tmp_path/'found.json').read_text())
    wrong = [f"{row['number']} {row['command']}: {'; '.join(row['faults'])}" for row in found['rows'] if row['faults']]
    assert not wrong, '\n'.join(wrong)
    assert not found['changed']
    assert r.returncode==0, r.stderr[-2000:]

def test_there_are_500_and_none_is_there_twice():
    some = [c for _,c in attack.chosen([], every)]
    assert len(some)>=500 and {c.command.removeprefix('mim_') for c in some}==set(commands)
    refused = [c for c in some if not c.ok]
    assert len(refused)>=500
    assert len({(c.command, c.args, c.note) for c in cases()})==len(cases())

# The judge

case = Case('mim_show', ('my/run',), says='log')
good = dict(code=1, out='', err='mim_show: my/run has no log: name another folder\n', seconds=1., busy=.1,
            grown=0, changes=[], then=None)

def test_a_refusal_in_a_sentence_is_right(): assert attack.faults(case, good)==[]

@pytest.mark.parametrize('change,fault', [
    (dict(err='Traceback (most recent call last):\nmim_show: the log is no log'), 'traceback'),
    (dict(err='mim_show: unexpected KeyError: log'), 'unexpected'), (dict(code=0), 'exit code 0'),
    (dict(err='the log of the run is not there'), "command's name"), (dict(err='mim_show: no log'), 'too little'),
    (dict(err='mim_show: log'+'x'*2000), 'characters'), (dict(err='mim_show: something is not as it should be'), 'no word of'),
    (dict(seconds=31.), 'seconds'), (dict(grown=3*2**30), 'GiB'), (dict(changes=['new my/run/x']), 'left behind'),
    (dict(changes=['changed in/photos/x.png']), 'left behind'), (dict(then='mim_show: no'), 'corrected'), (dict(err=''), 'name')])
def test_each_fault_is_seen(change, fault):
    assert any(fault in f for f in attack.faults(case, good|change))

def test_arguments_are_to_be_refused_at_once():
    assert attack.faults(case._replace(quick=True), good|dict(busy=3.))
    assert not attack.faults(case, good|dict(busy=3.))

def test_what_is_accepted_must_be_so_on_purpose():
    accepted = good | dict(code=0, err='')
    assert attack.faults(case._replace(may='it is fine'), accepted)==[]
    assert attack.faults(case._replace(ok='it is fine'), good)==['it must be accepted']
    assert attack.faults(case._replace(may='it is fine'), accepted|dict(out='accuracy nan'))
    assert attack.faults(case._replace(may='it is fine'), accepted|dict(changes=['changed in/run/x']))
    assert attack.faults(case._replace(may='it is fine', warns='left out'), accepted)
