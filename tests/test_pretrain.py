"The commands as a user meets them: in processes of their own, killed, resumed, and fed with mistakes"
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import pytest, timm, torch
from PIL import Image
from safetensors.torch import load_file
from mim_nb.data import load_data
from mim_nb.evaluate import features, load_encoder, mim_evaluate_cli
from mim_nb.pretrain import mim_pretrain_cli, settings

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

@pytest.mark.parametrize('where,signum', [('tokenizer', signal.SIGKILL), ('.', signal.SIGKILL), ('.', signal.SIGTERM), ('.', signal.SIGINT)])
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
