"The comparison of all methods: one task from start to finish on a few images, and a stopped comparison that goes on"
import json, sys
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]/'tools'))
import compare

@pytest.fixture(scope='module')
def budget(tmp_path_factory):
    "A budget of seconds, on pictures whose class is whether they are dark"
    data,rng = tmp_path_factory.mktemp('dark_or_bright'),np.random.default_rng(0)
    for c,level in (('bright', 170), ('dark', 40)):
        (data/c).mkdir()
        for i in range(60): Image.fromarray(rng.integers(level-40, level+40, (28,28), np.uint8)).save(data/c/f'{i:02}.png')
    return dict(preset='tiny', data=str(data), epochs=1, recipe='tiny', finetune={'1': 2, '.1': 2}, model=dict(mae=dict(depth=3)))

@pytest.fixture(scope='module')
def out(budget, tmp_path_factory):
    "The folder after two tasks"
    out = tmp_path_factory.mktemp('out')
    with pytest.MonkeyPatch.context() as mp:
        mp.setitem(compare.budgets, 'tiny', budget)
        for name in ('mae', 'scratch'): compare.one(name, 0, 'tiny', out, 'cpu')
    return out

def test_a_task_measures_everything(out):
    mae,scratch = (json.loads((out/f'{n}_0'/'compare.json').read_text()) for n in ('mae','scratch'))
    assert len(mae['layers'])==3 and set(mae['best'])=={'knn','linear'} and all(0<=l<3 for l in mae['best'].values())
    assert set(mae['finetune'])==set(scratch['finetune'])=={'1','.1'}
    assert mae['finetune']['1']==1. and mae['layers'][mae['best']['linear']]['linear']==1.        # dark or bright: that much anybody learns
    assert len(mae['processor_seconds'])==2 and len(scratch['processor_seconds'])==1 and 'layers' not in scratch

def test_the_block_is_chosen_without_the_test_images(monkeypatch):
    seen = []
    def fake(m, train, test):
        seen.append((len(train), len(test)))
        return [dict(knn=.9 if i==(0 if len(test)==20 else 2) else .1, linear=.9 if i==(3 if len(test)==20 else 1) else .1) for i in range(4)]
    monkeypatch.setattr(compare, 'evaluate_layers', fake)
    some = lambda n: compare.load_data('fashion_mnist').take(slice(n))
    r = compare.examined(None, some(100), some(20), 0)
    (n,test),(rest,held) = seen
    assert (n,test)==(100,20) and rest+held==100 and 5<=held<=15
    assert r['best']==dict(knn=2, linear=1)                                                       # what the held-out images say, not the test's

def test_a_stopped_comparison_goes_on(out, monkeypatch, tmp_path):
    done = []
    monkeypatch.setattr(compare, '__file__', str(tmp_path/'tools'/'compare.py')); (tmp_path/'results').mkdir()
    (out/'tokenizer_0').mkdir(exist_ok=True); (out/'tokenizer_0'/'config.json').write_text('{}')
    def run(args, **kw):
        name,seed = args[args.index('--only')+1].split(':'); done.append(name)
        (out/f'{name}_{seed}').mkdir(); (out/f'{name}_{seed}'/'compare.json').write_text(json.dumps(dict(method=name, seed=int(seed))))
    monkeypatch.setattr(compare.subprocess, 'run', run)
    compare.main(seeds='0', names='mae,saim,scratch', out=str(out), device='cpu')
    assert done==['saim']                                                                         # the others were there
    rows = json.loads((tmp_path/'results'/'compare_tiny_cpu.json').read_text())['rows']
    assert [r['method'] for r in rows]==['mae','saim','scratch']

def test_costs_are_counted():
    c = {n: compare.cost(n, 'tiny') for n in ('mae','beit')}
    assert c['mae']['encoder_gflops']==pytest.approx(c['beit']['encoder_gflops'], rel=.1)
    assert c['mae']['step_gflops']<c['beit']['step_gflops']                                       # three quarters of the patches never enter

def test_each_budget_has_a_folder_and_a_command_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path); (tmp_path/'results').mkdir()
    monkeypatch.setattr(compare, '__file__', str(tmp_path/'tools'/'compare.py'))
    for budget in ('tiny','wider'):
        for task in ('tokenizer_0/config.json', 'mae_0/compare.json'):
            file = tmp_path/'runs'/f'compare_{budget}'/task; file.parent.mkdir(parents=True); file.write_text(json.dumps(dict(budget=budget)))
        compare.main(budget=budget, seeds='0', names='mae', device='cpu')
        result = json.loads((tmp_path/'results'/f'compare_{budget}_cpu.json').read_text())
        assert result['rows']==[dict(budget=budget)] and f'--budget {budget} --seeds 0 --names mae' in result['command']
