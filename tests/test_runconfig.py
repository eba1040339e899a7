"What describes a run: edited, damaged and hostile files get a sentence, and nothing of a stranger's is followed"
import json, os, stat
from pathlib import Path
import pytest
from mim_nb.methods import methods
from mim_nb.runconfig import (build_method, check_recipe, data_of, read_config, teacher_of, tokenizer_of,
                              trusted, write_config)
from mim_nb.runfolder import run_settings

@pytest.fixture
def home(tmp_path, monkeypatch):
    "A state folder of the test's own"
    monkeypatch.setenv('XDG_STATE_HOME', str(tmp_path/'state'))
    return tmp_path/'state'

@pytest.fixture
def run(tmp_path, home):
    "A run's folder with a sealed description"
    write_config(tmp_path/'run', run_settings('mae', data='photos', seed=0))
    return tmp_path/'run'

def put(run, text):
    (run/'config.json').write_bytes(text if isinstance(text, bytes) else text.encode())

def edit(run, path, value):
    "Change one entry, such as 'recipe.lr'"
    config = json.loads((run/'config.json').read_text())
    *parts,last = path.split('.')
    place = config
    for p in parts: place = place[p]
    if value is KeyError: del place[last]
    else: place[last] = value
    put(run, json.dumps(config))

EDITS = [('method', 'biet'), ('method', ['mae']), ('method', KeyError), ('preset', 3), ('preset', KeyError),
         ('data', KeyError), ('data', ''), ('data', ['photos']), ('seed', -1), ('seed', 1.5), ('seed', True),
         ('seed', 2**70), ('model', []), ('model', None), ('recipe', 'fast'), ('seal', 5), ('started_in', {}),
         ('accumulate', 0), ('tokenizer', []),
         ('model.depth', 'four'), ('model.depth', 10**12), ('model.depth', {}), ('model.depth', [[1]]),
         ('model.depth', float('inf')), ('model.depth', 10**400), ('model.norm_pix', 'yes'),
         ('model.img_size', 10**6), ('model.img_size', [28]), ('model.img_size', 0), ('model.dept', 4),
         ('model.encoder', 'vit'), ('model.tokenizer', '/etc'), ('model.mean', ['x', {}]),
         ('recipe.lr', float('nan')), ('recipe.lr', '0.1'), ('recipe.lr', -1), ('recipe.lr', KeyError),
         ('recipe.epochs', 10**400), ('recipe.epochs', 1e300), ('recipe.epochs', 0), ('recipe.batch_size', 1.5),
         ('recipe.batch_size', 0), ('recipe.betas', 3), ('recipe.betas', [.9]), ('recipe.betas', [.9, 2]),
         ('recipe.clip', 'no'), ('recipe.folder', '/tmp'), ('recipe.device', 'cuda'), ('recipe.augment', []),
         ('recipe.augment.scale', [0, 2]), ('recipe.augment.scale', 'x'), ('recipe.augment.size', 3),
         ('recipe.augment.interpolation', []), ('recipe.augment.flip', None)]

@pytest.mark.parametrize('path,value', EDITS, ids=lambda v: str(v)[:20])
def test_an_edited_entry_is_named(run, path, value):
    edit(run, path, value)
    with pytest.raises(ValueError) as e: read_config(run)
    said = str(e.value)
    assert str(run/'config.json') in said and '\n' not in said and len(said)<2000
    if not (isinstance(value, float) or value==10**400): assert path.split('.')[-1].replace('img_', '') in said

TEXTS = dict(empty=b'', cut=b'{"method": "mae", "pres', binary=bytes(range(256)), list=b'[]', number=b'5',
             deep=b'['*100_000, deep_dict=b'{"a":'*100_000, not_utf8='{"method": "ä"}'.encode('latin-1'),
             utf16='{"method": "mae"}'.encode('utf-16'), nan=b'{"seed": NaN}', digits=b'{"seed": '+b'9'*10_000+b'}',
             huge=b'{"a": "'+b'x'*2**21+b'"}')

@pytest.mark.parametrize('kind', TEXTS)
def test_a_damaged_file_is_named(run, kind):
    put(run, TEXTS[kind])
    with pytest.raises(ValueError) as e: read_config(run)
    assert str(run/'config.json') in str(e.value) and len(str(e.value))<1000

def test_a_mark_at_the_beginning_does_no_harm(run):
    put(run, b'\xef\xbb\xbf'+(run/'config.json').read_bytes())
    assert read_config(run)['method']=='mae'

def test_no_file_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match='config.json'): read_config(tmp_path)
    os.mkfifo(tmp_path/'config.json')                        # reading it would wait for ever
    with pytest.raises(ValueError, match='config.json'): read_config(tmp_path)

@pytest.mark.parametrize('change', [dict(num_heads=5), dict(num_heads=[1,2]), dict(patch_size=5), dict(decoder_dim=-4), dict(mean=[1,2,3,4,5])])
def test_sizes_that_do_not_fit_together_name_the_file(run, change):
    config = read_config(run)
    config['model'] |= change
    with pytest.raises(ValueError) as e: build_method(config, run)
    assert str(e.value).startswith(str(run/'config.json')) and '\n' not in str(e.value)

@pytest.mark.parametrize('name', methods)
def test_every_preset_comes_back(tmp_path, home, name):
    for preset in methods[name].presets:
        config = run_settings(name, preset, data='x', seed=1)
        write_config(tmp_path/preset, config)
        found = read_config(tmp_path/preset)
        assert {k: found[k] for k in config}==config and trusted(found)

def test_a_seal_breaks_with_any_change(run):
    assert trusted(read_config(run))
    edit(run, 'recipe.lr', .5)
    assert not trusted(read_config(run))
    edit(run, 'seal', 'ä'*64)
    assert not trusted(read_config(run))

def test_a_stranger_has_another_key(run, monkeypatch, tmp_path):
    assert trusted(read_config(run))
    monkeypatch.setenv('XDG_STATE_HOME', str(tmp_path/'stranger'))
    assert not trusted(read_config(run))

def test_the_key_is_secret(run, home):
    key = home/'mim_nb'/'key'
    assert stat.S_IMODE(key.stat().st_mode)==0o600 and len(key.read_bytes())==32
    assert [p.name for p in key.parent.iterdir()]==['key']
    key.chmod(0o644)                                          # others may have read it
    assert not trusted(read_config(run))

@pytest.mark.parametrize('state', ['/dev/null/state', '/proc/none'])
def test_without_a_home_there_is_no_seal(tmp_path, monkeypatch, state):
    monkeypatch.setenv('XDG_STATE_HOME', state)
    write_config(tmp_path/'run', run_settings('mae', data='photos', seed=0))
    config = read_config(tmp_path/'run')
    assert 'seal' not in config and not trusted(config)

def test_a_damaged_key_is_no_key(run, home):
    (home/'mim_nb'/'key').write_bytes(b'')
    assert not trusted(read_config(run))

def test_names_of_a_stranger_are_not_followed(run):
    edit(run, 'data', '/home/you/letters')
    edit(run, 'method', 'deepmim')
    edit(run, 'model.teacher', 'vit_base_patch16_224')
    edit(run, 'tokenizer', '/home/you/words')
    config = read_config(run)
    for f,flag in ((data_of, '--data'), (teacher_of, '--teacher'), (tokenizer_of, '--tokenizer')):
        with pytest.raises(ValueError, match=f'repeat it with {flag}'): f(run, config)
        assert f(run, config, 'mine')=='mine'

@pytest.fixture
def deepmim(run):
    write_config(run, run_settings('deepmim', model=dict(teacher='runs/mae'), data='fashion_mnist', seed=0, tokenizer='t'))
    return run

def test_names_of_ones_own_are(deepmim):
    config = read_config(deepmim)
    assert data_of(deepmim, config)=='fashion_mnist'
    assert (teacher_of(deepmim, config), tokenizer_of(deepmim, config))==('runs/mae', 't')

@pytest.mark.parametrize('name', ['wds/pipe:touch /tmp/x', 'pipe:cat', 'wds/https://example.org/{0..9}.tar', 's3://x/y.tar', 'a|b.tar'])
def test_addresses_and_commands_are_never_taken_from_a_file(run, name):
    write_config(run, run_settings('mae', data=name, seed=0))
    config = read_config(run)
    assert trusted(config)
    with pytest.raises(ValueError, match='an address or a command.*--data'): data_of(run, config)
    assert data_of(run, config, name)==name

def test_the_clothes_are_always_there(run):
    edit(run, 'data', 'fashion_mnist')
    assert data_of(run, read_config(run))=='fashion_mnist'

@pytest.mark.parametrize('name,here', [('photos', '../photos'), ('shards/{0..3}.tar', '../shards/{0..3}.tar'), ('torch/cifar10', 'torch/cifar10'), ('/abs/photos', '/abs/photos'), ('gone', 'gone')])
def test_relative_names_hold_from_everywhere(tmp_path, home, monkeypatch, name, here):
    for d in ('photos', 'shards', 'elsewhere'): (tmp_path/d).mkdir()
    monkeypatch.chdir(tmp_path)
    write_config('runs/a', run_settings('mae', data=name, seed=0))
    assert data_of('runs/a', read_config('runs/a'))==name
    monkeypatch.chdir('elsewhere')
    assert data_of('../runs/a', read_config('../runs/a'))==here

def test_every_recipe_is_sound():
    for m in methods.values():
        for recipe in m.recipes.values(): check_recipe(recipe)
