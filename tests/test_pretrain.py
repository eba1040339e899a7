"The commands as a user meets them: in processes of their own, killed, resumed, and fed with mistakes"
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import pytest, timm, torch
import mim_nb.pretrain
from PIL import Image
from safetensors.torch import load_file
from mim_nb.data import load_data
from mim_nb.evaluate import features, load_encoder, mim_evaluate_cli
from mim_nb.files import lock
from mim_nb.pretrain import mim_pretrain_cli
from mim_nb.runconfig import read_config, write_config
from mim_nb.runfolder import run_folder, run_settings as settings

ENV = os.environ | dict(MPLBACKEND='agg')
def command(name, *args, cwd=None): return [str(Path(sys.executable).parent/name), *map(str, args)]
def run(cwd, name, *args, **kw): return subprocess.run(command(name, *args), cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, **kw)
def error(r): return r.stderr.strip().splitlines()[-1]

@pytest.fixture
def here(monkeypatch, capsys, tmp_path):
    "Call a command in this process, as its console script would: `here(cli, *args)` gives exit code, output and errors"
    def call(cli, *args, cwd=tmp_path):
        monkeypatch.chdir(cwd); monkeypatch.setattr(sys, 'argv', ['command', *map(str, args)])
        code = cli()
        out,err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)
    return call

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A folder of 160 images in two class subfolders, one of them corrupt"
    folder = tmp_path_factory.mktemp('photos')
    clothes = load_data('fashion_mnist')
    for i in range(800):
        image,label = clothes[i]
        if label in (1,9):
            (folder/str(label)).mkdir(exist_ok=True)
            Image.fromarray(image[0].numpy()).save(folder/str(label)/f'{i:03}.png')
    (folder/'1'/'000_broken.png').write_bytes(b'not an image')
    return folder

ARGS = ['--epochs', 3, '--batch', 16, '--size', 16, '--device', 'cpu', '--lr', '1e-3']

@pytest.fixture(scope='module')
def whole(photos, tmp_path_factory):
    "A run that nobody disturbs"
    cwd = tmp_path_factory.mktemp('whole')
    r = run(cwd, 'mim_pretrain', 'beit', '--data', photos, *ARGS)
    assert r.returncode==0, r.stderr
    return cwd/'runs'/'beit',r

def test_a_run_folder_is_complete(whole):
    folder,r = whole
    assert {'config.json','log.jsonl','metrics.json','last.ckpt','previous.ckpt','encoder','tokenizer','reconstructions.png'} <= {p.name for p in folder.iterdir()}
    assert not list(folder.rglob('*.tmp'))
    metrics = json.loads((folder/'metrics.json').read_text())
    assert {'before','after','seconds','images_per_second'} <= metrics.keys()
    assert all(0<=metrics[k][p]<=1 for k in ('before','after') for p in ('knn','linear'))
    assert '000_broken.png' in r.stderr and 'pretrained' in r.stdout
    assert Image.open(folder/'reconstructions.png').size[0]>600

@pytest.mark.parametrize('where,signum', [('tokenizer_training', signal.SIGKILL), ('.', signal.SIGKILL), ('.', signal.SIGTERM), ('.', signal.SIGINT)])
def test_a_killed_run_resumes_to_the_same_bytes(whole, photos, tmp_path, where, signum):
    log = tmp_path/'runs/beit'/where/'log.jsonl'
    ready = ['--tokenizer', whole[0]/'tokenizer'] if where=='.' else []
    p = subprocess.Popen(command('mim_pretrain', 'beit', '--data', photos, *ARGS, *ready), cwd=tmp_path, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while p.poll() is None and not (log.exists() and len(log.read_text().splitlines())>=2): time.sleep(.02)
    p.send_signal(signum)
    err = p.communicate(timeout=60)[1]
    assert p.returncode==(-9 if signum==signal.SIGKILL else 128+signum)
    if signum!=signal.SIGKILL: assert 'stopped at step' in err and '--resume' in err and 'Traceback' not in err
    assert not (tmp_path/'runs/beit/encoder').exists()
    r = run(tmp_path, 'mim_pretrain', '--resume', '--device', 'cpu')
    assert r.returncode==0, r.stderr
    for f in ('encoder/model.safetensors', 'tokenizer/model.safetensors', 'encoder/config.json'):
        assert (tmp_path/'runs/beit'/f).read_bytes()==(whole[0]/f).read_bytes(), f
    steps = [json.loads(l)['step'] for l in (tmp_path/'runs/beit/log.jsonl').read_text().splitlines()]
    assert steps==sorted(set(steps))

def test_the_encoder_leaves(whole, tmp_path):
    "Plain timm, in a process that never imports the package, gives the same features as the method that was trained"
    from mim_nb.beit import BEiT
    folder,_ = whole
    config = json.loads((folder/'config.json').read_text())
    m = BEiT(**config['model']).eval()
    ckpt = torch.load(folder/'last.ckpt', weights_only=True)['model']
    m.load_state_dict({k: v for k,v in ckpt.items() if not k.startswith('tokenizer.')})
    x = m.normalize(load_data('fashion_mnist', 'test', img_size=16).images[:16]/255)
    torch.save(x, tmp_path/'x.pt')
    code = f'''import sys, timm, torch
m = timm.create_model('local-dir:{folder}/encoder', pretrained=True).eval()
with torch.no_grad(): torch.save((m.forward_features(torch.load('x.pt')), m.pretrained_cfg['mean'], m.pretrained_cfg['std']), 'y.pt')
assert not any(k.split('.')[0]=='mim_nb' for k in sys.modules)'''
    subprocess.run([sys.executable, '-c', code], check=True, cwd=tmp_path)
    y,mean,std = torch.load(tmp_path/'y.pt')
    with torch.no_grad(): torch.testing.assert_close(y, m.encoder.forward_features(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(list(mean)+list(std)), torch.cat([m.mean.flatten(), m.std.flatten()]))

def test_evaluate_a_run(whole, photos, tmp_path, here):
    r = here(mim_evaluate_cli, whole[0], '--data', photos, '--out', 'r.json', '--device', 'cpu')
    assert r.returncode==0, r.stderr
    after = json.loads((whole[0]/'metrics.json').read_text())['after']
    result = json.loads((tmp_path/'r.json').read_text())
    assert abs(result['knn']-after['knn'])<.2 and 'knn' in r.stdout

def test_resume_of_a_finished_run_changes_nothing(whole, tmp_path, here):
    shutil.copytree(whole[0], tmp_path/'runs/beit')
    r = here(mim_pretrain_cli, '--resume', '--device', 'cpu')
    assert r.returncode==0, r.stderr
    assert (tmp_path/'runs/beit/encoder/model.safetensors').read_bytes()==(whole[0]/'encoder/model.safetensors').read_bytes()

@pytest.mark.parametrize('damage', ['truncated', 'foreign', 'gone'])
def test_a_damaged_checkpoint_falls_back(whole, tmp_path, here, damage):
    folder = Path(shutil.copytree(whole[0], tmp_path/'runs/beit'))
    last = folder/'last.ckpt'
    if damage=='truncated': last.write_bytes(last.read_bytes()[:5000])
    if damage=='foreign': torch.save(dict(weights=torch.ones(3)), last)
    if damage=='gone': last.rename(folder/'away')
    shutil.rmtree(folder/'encoder')
    r = here(mim_pretrain_cli, '--resume', '--device', 'cpu')
    assert r.returncode==0, r.stderr
    if damage!='gone': assert 'last.ckpt cannot be used' in r.stdout and 'falling back to previous.ckpt' in r.stdout
    assert (folder/'encoder/model.safetensors').read_bytes()==(whole[0]/'encoder/model.safetensors').read_bytes()

MISTAKES = [
    (['biet'],                              "did you mean 'beit'"),
    (['--preset', 'tny'],                   "did you mean 'tiny'"),
    (['--data', 'fashion_mist'],            'did you mean fashion_mnist'),
    (['--data', './no_such_folder'],        'There is no folder'),
    (['--data', 'EMPTY'],                   'image'),
    (['--size', '30'],                      'not a multiple of the patch'),
    (['--size', '2'],                       'smaller than'),
    (['--mask', '1.5'],                     'between 0 and 1'),
    (['--resume'],                          'nothing to resume'),
    (['--tokenizer', 'nowhere'],            "not a tokenizer's folder"),
    (['--device', 'gpu'],                   'unknown device'),
    (['--batch', '20000'],                  'cannot be filled'),
    (['--lr', '-1'],                        'lr'),
    (['--accumulate', '3'],                 'cannot be cut into 3 equal slices'),
    (['--scale', 'cubic'],                  'scaling of the learning rate'),
    (['--epochs', '0'],                     'epochs'),
    (['--size', '48y64'],                   'height x width'),
    (['mae', '--tokenizer', 'nowhere'],     'takes no tokenizer'),
    (['saim', '--mask', '.5'],              "unknown setting of saim 'mask_ratio'"),
] + ([] if torch.cuda.is_available() else [(['--device', 'cuda'], '0 CUDA devices')])

@pytest.mark.parametrize('args,says', MISTAKES, ids=lambda v: ' '.join(v) if isinstance(v, list) else None)
def test_mistakes_get_one_sentence_and_leave_nothing(tmp_path, here, args, says):
    (tmp_path/'EMPTY').mkdir()
    r = here(mim_pretrain_cli, *args)
    assert r.returncode==1 and says in error(r), r.stderr
    assert error(r).startswith('mim_pretrain: ') and len(r.stderr.strip().splitlines())==1
    assert not (tmp_path/'runs').exists()

def test_a_run_is_never_overwritten(whole, photos, here):
    cwd = whole[0].parents[1]
    before = {p: p.stat().st_mtime_ns for p in whole[0].rglob('*')}
    r = here(mim_pretrain_cli, '--data', photos, *ARGS, cwd=cwd)
    assert r.returncode==1 and 'already holds a run' in error(r)
    r = here(mim_pretrain_cli, '--resume', '--lr', '0.1', cwd=cwd)
    assert r.returncode==1 and 'lr was 0.001 and is now 0.1' in error(r)
    assert before=={p: p.stat().st_mtime_ns for p in whole[0].rglob('*')}

def test_flat_colour_photographs_without_labels(tmp_path, here):
    g = torch.Generator().manual_seed(0)
    (tmp_path/'flat').mkdir()
    for i in range(40): Image.fromarray(torch.randint(0, 256, (50+i, 70, 3), generator=g).to(torch.uint8).numpy()).save(tmp_path/'flat'/f'{i}.jpg')
    r = here(mim_pretrain_cli, '--data', 'flat', '--epochs', 1, '--batch', 8, '--size', 32, '--patch', 8, '--out', 'out', '--device', 'cpu')
    assert r.returncode==0, r.stderr
    assert 'no labels' in r.stdout and json.loads((tmp_path/'out/metrics.json').read_text())['after']=={}
    e = load_encoder(tmp_path/'out')
    assert features(e, torch.rand(3,3,32,32)).shape==(3,96) and e.patch_embed.grid_size==(4,4)

def test_the_learning_rate_scales_with_the_batch_when_asked():
    lr = lambda scale, **recipe: settings('mae', 'base', recipe=recipe, scale=scale)['recipe']['lr']
    assert lr(None, batch_size=1024)==lr('linear')==2.4e-3
    assert abs(lr('linear', batch_size=1024)-6e-4)<1e-12 and abs(lr('sqrt', batch_size=1024)-1.2e-3)<1e-12

def test_the_script_for_slurm_is_sound():
    subprocess.run(['bash', '-n', Path(__file__).parents[1]/'tools/slurm.sh'], check=True)

def test_a_tokenizer_is_reused(whole, photos, tmp_path, here):
    r = here(mim_pretrain_cli, '--data', photos, *ARGS, '--tokenizer', whole[0]/'tokenizer')
    assert r.returncode==0, r.stderr
    assert (tmp_path/'runs/beit/encoder/model.safetensors').read_bytes()==(whole[0]/'encoder/model.safetensors').read_bytes()

def test_as_a_module_and_help(tmp_path):
    r = subprocess.run([sys.executable, '-m', 'mim_nb.pretrain', 'biet'], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=120)
    assert r.returncode==1 and "did you mean 'beit'" in r.stderr
    for name in ('mim_pretrain', 'mim_evaluate'):
        r = run(tmp_path, name, '-h')
        assert r.returncode==0 and '--data' in r.stdout

@pytest.mark.parametrize('args,says', [(['.'], 'holds no encoder'), (['no_such_model'], 'neither a folder nor a model'),
                                       (['RUN', '--probe', 'magic'], "unknown probe 'magic'"), (['RUN', '--layer', '9'], 'between 1 and 4'), (['RUN', '--data', 'nope'], 'no data called')])
def test_mistakes_of_evaluate(whole, here, args, says):
    r = here(mim_evaluate_cli, *[whole[0] if a=='RUN' else a for a in args], '--device', 'cpu')
    assert r.returncode==1 and says in error(r), r.stderr

# ---- mistakes that cost no time

FLAGS = [['--data', ''], ['--out', ''], ['--tokenizer', ''], ['--teacher', ''], ['--epochs', '-1'], ['--epochs', 'inf'], ['--epochs', 'nan'],
         ['--epochs', '1e300'], ['--lr', 'nan'], ['--lr', 'inf'], ['--lr', '0'], ['--batch', '0'], ['--batch', '-4'], ['--seed', '-1'], ['--seed', '9'*40],
         ['--mask', 'nan'], ['--mask', '0'], ['--mask', '1'], ['--mask', '-.5'], ['--workers', '-1'], ['--workers', '100000'],
         ['--size', '0'], ['--size', '30'], ['--size', '-28'], ['--size', '1000000'], ['--size', '28x30'], ['--size', '1x2x3'],
         ['--patch', '0'], ['--patch', '5'], ['--accumulate', '0'], ['--accumulate', '-2'], ['--accumulate', '7'], ['--batch', '7'*400]]

@pytest.mark.parametrize('args', FLAGS, ids=lambda a: ' '.join(a)[:20])
def test_a_flag_that_cannot_work_is_refused_at_once(tmp_path, here, monkeypatch, args):
    def loaded(*_, **__): raise AssertionError('images were loaded first')
    monkeypatch.setattr('mim_nb.prepare.load_like', loaded)
    start = time.process_time()
    r = here(mim_pretrain_cli, *args)
    assert r.returncode==1 and time.process_time()-start<2, r.stderr
    assert len(r.stderr.strip().splitlines())==1 and len(r.stderr)<1000
    assert list(tmp_path.iterdir())==[]

@pytest.mark.parametrize('args,allowed', [(['--data', 'wds/https://example.org/x.tar'], True), ([], False)])
def test_only_the_command_line_may_name_an_address(tmp_path, here, monkeypatch, args, allowed):
    asked = []
    def load_like(name, *_, allow_remote, **__):
        asked.append(allow_remote)
        raise OSError('no network here')
    monkeypatch.setattr('mim_nb.prepare.load_like', load_like)
    assert here(mim_pretrain_cli, 'mae', *args, '--device', 'cpu').returncode==1
    assert asked==[allowed] and list(tmp_path.iterdir())==[]

# ---- whose folder it is

FAST = ['--epochs', 1, '--batch', 8, '--size', 16, '--device', 'cpu']

def images(folder, n, seed=0, side=16):
    "Write `n` random images, the same ones for the same seed"
    g = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n): Image.fromarray(torch.randint(0, 256, (side,side), generator=g).to(torch.uint8).numpy()).save(folder/f'{i:02}.bmp')
    return folder

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "A finished run on a folder `flat` beside it, named relatively"
    cwd = tmp_path_factory.mktemp('small')
    images(cwd/'flat', 40)
    r = run(cwd, 'mim_pretrain', 'mae', '--data', 'flat', *FAST, '--out', 'run')
    assert r.returncode==0, r.stderr
    return cwd

def copy(small, tmp_path): return Path(shutil.copytree(small, tmp_path/'copy'))
def contents(folder): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}
def same_encoder(a, b): return (a/'encoder/model.safetensors').read_bytes()==(b/'encoder/model.safetensors').read_bytes()

HOLD = """import sys, time
from mim_nb.files import lock
with lock(sys.argv[1]):
    print('held', flush=True)
    time.sleep(600)"""

def test_two_runs_cannot_share_a_folder(small, tmp_path, here):
    folder = copy(small, tmp_path)/'run'
    before = contents(folder)
    p = subprocess.Popen([sys.executable, '-c', HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    p.stdout.readline()
    for args in (['--resume'], ['mae']):
        start = time.process_time()
        r = here(mim_pretrain_cli, *args, '--out', 'copy/run', '--device', 'cpu')
        assert r.returncode==1 and 'another process is writing' in error(r) and time.process_time()-start<1
    assert contents(folder)==before
    p.kill(); p.wait()
    with lock(folder): pass                                   # death has released it

def test_a_run_holds_its_folder(small, tmp_path, here, monkeypatch):
    found = []
    def fit(*_, folder, **__):
        with pytest.raises(ValueError, match='another process'):
            with lock(folder): pass
        found.append(sorted(p.name for p in folder.iterdir()))
        raise RuntimeError('enough')
    monkeypatch.setattr(mim_nb.pretrain, 'fit', fit)
    assert 'enough' in here(mim_pretrain_cli, 'mae', '--data', small/'flat', *FAST).stderr
    assert found==[['.lock', 'config.json']]

FAILURES = [OSError(28, 'No space left on device'), RuntimeError('the memory of the device is too small'), KeyError('x'), KeyboardInterrupt(), FloatingPointError('the loss became nan')]

@pytest.mark.parametrize('e', FAILURES, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('where', ['evaluate', 'fit', 'save_encoder'])
def test_a_failed_start_leaves_nothing_and_touches_nothing(small, tmp_path, here, monkeypatch, e, where):
    def fail(*_, **__): raise e
    monkeypatch.setattr(mim_nb.pretrain, '_examine' if where=='evaluate' else where, fail)
    (tmp_path/'out').mkdir()
    for name in ('notes.txt', 'model.safetensors', '.mim_nb-notes', 'mine.ckpt'): (tmp_path/'out'/name).write_text('mine')
    before = contents(tmp_path)
    args = ['mae', '--data', small/'flat', *FAST]
    for out in ('out', 'new/deep'):
        r = here(mim_pretrain_cli, *args, '--out', out)
        assert r.returncode in (1, 70, 130) and 'Traceback' not in r.stderr
    if where=='save_encoder':                                 # training is done: nothing is thrown away
        assert 'already holds a run' in here(mim_pretrain_cli, *args, '--out', 'out').stderr
        assert (tmp_path/'new/deep/last.ckpt').exists()
    else: assert contents(tmp_path)==before and not (tmp_path/'new').exists()
    assert {k: v for k,v in contents(tmp_path).items() if k in before}==before

def test_files_of_the_user_stay(small, tmp_path, here):
    folder = tmp_path/'mine'
    (folder/'sub').mkdir(parents=True)
    for name in ('notes.txt', 'config.json.tmp', 'new.ckpt.tmp', 'encoder.tmp', 'log.jsonl.bak', 'sub/encoder', '.hidden'): (folder/name).write_text('mine')
    before = contents(folder)
    r = here(mim_pretrain_cli, 'mae', '--data', small/'flat', *FAST, '--out', 'mine')
    assert r.returncode==0, r.stderr
    assert before.items() <= contents(folder).items() and (folder/'encoder').exists()

@pytest.mark.parametrize('name', ['log.jsonl', 'last.ckpt', 'metrics.json', 'reconstructions.png', 'encoder', 'tokenizer', 'tokenizer_training'])
def test_a_name_that_a_run_needs_is_refused(tmp_path, here, name):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/name).write_text('mine')
    r = here(mim_pretrain_cli, 'mae', '--out', 'mine', '--device', 'cpu')
    assert r.returncode==1 and f'mine holds {name}' in error(r)
    assert contents(tmp_path)=={Path('mine')/name: b'mine'}

def test_places_where_no_run_should_be(small, tmp_path, here):
    (tmp_path/'file').write_text('mine')
    flat = images(tmp_path/'flat', 3)
    for out,says in (('file', 'is a file'), ('file/run', 'Not a directory'), ('flat/run', 'lies in the folder of the images'), ('flat', 'lies in the folder of the images')):
        before = contents(tmp_path)
        r = here(mim_pretrain_cli, 'mae', '--data', flat, '--out', out, '--device', 'cpu')
        assert r.returncode==1 and says in error(r), r.stderr
        assert contents(tmp_path)==before

def test_a_missing_package_is_found_before_the_images(tmp_path, here, monkeypatch):
    monkeypatch.setattr('mim_nb.prepare.find_spec', lambda name: None)
    r = here(mim_pretrain_cli, 'mae', '--tensorboard', '--device', 'cpu')
    assert r.returncode==1 and 'pip install tensorboard' in error(r) and not list(tmp_path.iterdir())

@pytest.mark.parametrize('kind', ['encoder', 'run', 'empty', 'text', 'list'])
def test_another_folder_is_no_tokenizer(small, tmp_path, here, kind):
    folder = small/'run'/'encoder' if kind=='encoder' else small/'run' if kind=='run' else tmp_path/'t'
    if kind in ('text', 'list', 'empty'):
        folder.mkdir()
        if kind!='empty': (folder/'model.safetensors').write_bytes(b'x'); (folder/'config.json').write_text('{"width": "x"}' if kind=='text' else '[]')
    r = here(mim_pretrain_cli, 'beit', '--data', small/'flat', *FAST, '--tokenizer', folder)
    assert r.returncode==1 and len(r.stderr.strip().splitlines())==1 and not (tmp_path/'runs').exists(), r.stderr

# ---- resumed

def test_relative_names_hold_in_another_folder(small, tmp_path, here):
    cwd = copy(small, tmp_path)
    shutil.rmtree(cwd/'run/encoder')
    (tmp_path/'other').mkdir()
    r = here(mim_pretrain_cli, '--resume', '--out', '../copy/run', '--device', 'cpu', cwd=tmp_path/'other')
    assert r.returncode==0 and same_encoder(cwd/'run', small/'run'), r.stderr
    shutil.move(cwd/'flat', tmp_path/'moved')
    r = here(mim_pretrain_cli, '--resume', '--out', 'copy/run', '--device', 'cpu')
    assert r.returncode==1 and "'flat'" in error(r)
    r = here(mim_pretrain_cli, '--resume', '--out', 'copy/run', '--device', 'cpu', '--data', 'moved')
    assert r.returncode==0 and same_encoder(cwd/'run', small/'run'), r.stderr

@pytest.mark.parametrize('change,says', [('images', 'the same'), ('turns', 'accumulate was 1 and is now 2'), ('cut', 'config.json'), ('stranger', 'repeat it with --data'), ('edited', 'config.json')])
def test_what_a_resumed_run_must_share(small, tmp_path, here, change, says):
    cwd = copy(small, tmp_path)
    config,args = cwd/'run/config.json',[]
    if change=='images': images(cwd/'flat', 40, seed=1)
    if change=='turns': args = ['--accumulate', 2]
    if change=='cut': config.write_bytes(config.read_bytes()[:300])
    if change=='stranger': config.write_text(config.read_text().replace('"flat"', '"/etc"'))
    if change=='edited': args = ['--data', 'flat']; config.write_text(config.read_text().replace('"depth": 4', '"depth": -4'))
    before = contents(cwd)
    r = here(mim_pretrain_cli, '--resume', '--out', 'run', '--device', 'cpu', *args, cwd=cwd)
    assert r.returncode==1 and says in error(r) and len(r.stderr.strip().splitlines())==1, r.stderr
    assert contents(cwd)==before

def test_a_run_of_somebody_else_goes_on_when_its_images_are_named(small, tmp_path, here):
    cwd = copy(small, tmp_path)
    config = json.loads((cwd/'run/config.json').read_text())
    config.pop('seal')
    (cwd/'run/config.json').write_text(json.dumps(config))
    shutil.rmtree(cwd/'run/encoder')
    assert here(mim_pretrain_cli, '--resume', '--out', 'run', '--device', 'cpu', cwd=cwd).returncode==1
    r = here(mim_pretrain_cli, '--resume', '--out', 'run', '--device', 'cpu', '--data', 'flat', cwd=cwd)
    assert r.returncode==0 and same_encoder(cwd/'run', small/'run'), r.stderr
    assert 'seal' not in read_config(cwd/'run')               # it has not become ours

def test_a_run_killed_before_its_first_checkpoint_has_one_log(small, tmp_path, here):
    cwd = copy(small, tmp_path)
    for f in ('last.ckpt', 'previous.ckpt'): (cwd/'run'/f).unlink(missing_ok=True)
    shutil.rmtree(cwd/'run/encoder')
    r = here(mim_pretrain_cli, '--resume', '--out', 'run', '--device', 'cpu', cwd=cwd)
    assert r.returncode==0 and same_encoder(cwd/'run', small/'run'), r.stderr
    steps = [json.loads(l)['step'] for l in (cwd/'run/log.jsonl').read_text().splitlines()]
    assert steps==sorted(set(steps))

def test_a_tokenizer_that_was_given_is_not_replaced_by_a_new_one(whole, photos, tmp_path, here):
    config = read_config(whole[0]) | dict(tokenizer=str(whole[0]/'tokenizer'))
    write_config(tmp_path/'runs/beit', config)                # killed before the tokenizer was copied
    r = here(mim_pretrain_cli, '--resume', '--device', 'cpu')
    assert r.returncode==0, r.stderr
    assert (tmp_path/'runs/beit/tokenizer/model.safetensors').read_bytes()==(whole[0]/'tokenizer/model.safetensors').read_bytes()
    assert same_encoder(tmp_path/'runs/beit', whole[0]) and not (tmp_path/'runs/beit/tokenizer_training').exists()

# ---- small and odd sets of images

@pytest.mark.parametrize('kind', ['few', 'one class', 'no labels', 'three images'])
def test_small_sets_are_pretrained(tmp_path, here, kind):
    folder = tmp_path/'images'
    if kind=='few': images(folder/'a', 3); images(folder/'b', 3, 1)
    if kind=='one class': images(folder/'a', 20)
    if kind=='no labels': images(folder, 20)
    if kind=='three images': images(folder, 3)
    r = here(mim_pretrain_cli, 'mae', '--data', 'images', '--epochs', 2, '--batch', 2, '--size', 16, '--device', 'cpu')
    assert r.returncode==0 and 'Traceback' not in r.stderr, r.stderr
    assert 'pretrained' in r.stdout or 'no accuracy' in r.stdout
    if kind!='few': assert 'no accuracy' in r.stdout
    assert (tmp_path/'runs/mae/encoder').exists() and (tmp_path/'runs/mae/reconstructions.png').exists()

@pytest.mark.parametrize('method', ['beit', 'mae', 'saim'])
def test_images_that_are_not_square(tmp_path, here, monkeypatch, method):
    monkeypatch.setattr('mim_nb.prepare.min_tokenizer_steps', 4)
    monkeypatch.setattr('mim_nb.prepare.tokenizer_recipe', mim_nb.prepare.tokenizer_recipe | dict(epochs=1))
    images(tmp_path/'images', 20)
    args = [method, '--data', 'images', '--epochs', 1, '--batch', 4, '--device', 'cpu']
    r = here(mim_pretrain_cli, *args, '--size', '16x24')
    assert r.returncode==0, r.stderr
    assert read_config(tmp_path/'runs'/method)['model']['img_size']==[16, 24]
    assert load_encoder(tmp_path/'runs'/method).patch_embed.grid_size==(4, 6)
    r = here(mim_pretrain_cli, '--resume', '--size', '16x24', '--out', f'runs/{method}', '--device', 'cpu')
    assert r.returncode==0, r.stderr
